#include <cstring>
#include <vector>

#include "arguments.h"
#include "cuda_kernels.h"

namespace graft::ops {
namespace {

// The list of tensors in device memory, where the kernels read it.
struct DeviceList {
  at::Tensor memory;
  int count;
  int64_t blocks;
  const graft::cuda::OptimizerTensor* data() const {
    return static_cast<const graft::cuda::OptimizerTensor*>(memory.const_data_ptr());
  }
};

DeviceList to_device(const Call& call, std::vector<graft::cuda::OptimizerTensor> list) {
  const int count = static_cast<int>(list.size());
  const int64_t blocks = graft::cuda::number_blocks(list.data(), count),
                bytes = count * static_cast<int64_t>(sizeof(graft::cuda::OptimizerTensor));
  const at::Tensor memory = call.empty({bytes}, at::kByte);
  // From pinned memory, which LibTorch keeps until the copy is done: the host does not wait for it.
  const bool pinned = kernel_device_type() == c10::DeviceType::CUDA;
  const at::Tensor host = at::empty({bytes}, at::TensorOptions(at::kByte).pinned_memory(pinned));
  std::memcpy(host.mutable_data_ptr(), list.data(), static_cast<size_t>(bytes));
  memory.copy_(host, /*non_blocking=*/pinned);
  return {memory, count, blocks};
}

void check_stretch(const AdamwStretch& s) {
  for (const at::Tensor* t : {&s.parameter, &s.gradient, &s.mean, &s.square})
    GRAFT_CHECK(t->device() == s.parameter.device() && t->scalar_type() == at::kFloat &&
                    t->is_non_overlapping_and_dense() && s.begin >= 0 && s.count >= 0 &&
                    s.begin + s.count <= t->numel(),
                kCudaArea, "a stretch must lie in dense fp32 tensors of one device; got ",
                t->toString(), " of ", t->sizes(), " (adamw)");
}

}  // namespace

void CudaKernels::adamw(const std::vector<AdamwStretch>& stretches,
                        const AdamwConstants& constants) const {
  if (stretches.empty()) return;
  const Call call("adamw", stretches.front().parameter);
  std::vector<graft::cuda::OptimizerTensor> list;
  for (const AdamwStretch& s : stretches) {
    check_stretch(s);
    GRAFT_CHECK(s.parameter.device() == stretches.front().parameter.device(), kCudaArea,
                "all parameters must be on one device; got ", s.parameter.device().str(), " and ",
                stretches.front().parameter.device().str(), " (adamw)");
    list.push_back({.parameter = own_floats(s.parameter) + s.begin,
                    .gradient = floats(s.gradient) + s.begin,
                    .mean = own_floats(s.mean) + s.begin,
                    .square = own_floats(s.square) + s.begin,
                    .size = s.count,
                    .keep = static_cast<float>(s.keep),
                    .step_size = static_cast<float>(s.step_size)});
  }
  const DeviceList device_list = to_device(call, std::move(list));
  at::Tensor grad_scale;
  if (constants.grad_scale != 1.0)
    grad_scale = call.empty({1}, at::kFloat).fill_(constants.grad_scale);
  call.check(graft::cuda::launch_adamw(
      device_list.data(), device_list.count, device_list.blocks, graft::cuda::ElementType::fp32,
      {.beta1 = static_cast<float>(constants.beta1),
       .one_minus_beta1 = static_cast<float>(1.0 - constants.beta1),
       .beta2 = static_cast<float>(constants.beta2),
       .one_minus_beta2 = static_cast<float>(1.0 - constants.beta2),
       .root_bias2 = static_cast<float>(constants.root_bias2),
       .eps = static_cast<float>(constants.eps)},
      floats(grad_scale), call.stream()));
}

at::Tensor CudaKernels::grad_norm(const std::vector<at::Tensor>& gradients) const {
  GRAFT_CHECK(!gradients.empty(), kCudaArea, "there must be a gradient; got none (grad_norm)");
  const Call call("grad_norm", gradients.front());
  std::vector<graft::cuda::OptimizerTensor> list;
  for (const at::Tensor& g : gradients) {
    GRAFT_CHECK(g.device() == gradients.front().device() && g.scalar_type() == at::kFloat &&
                    g.is_non_overlapping_and_dense(),
                kCudaArea, "gradients must be dense, fp32 and on one device; got ", g.toString(),
                " of ", g.sizes(), " (grad_norm)");
    list.push_back({.parameter = nullptr,
                    .gradient = floats(g),
                    .mean = nullptr,
                    .square = nullptr,
                    .size = g.numel(),
                    .keep = 1,
                    .step_size = 0});
  }
  const DeviceList device_list = to_device(call, std::move(list));
  const at::Tensor norm = call.empty({}, at::kDouble), scale = call.empty({1}, at::kFloat),
                   space = call.workspace(device_list.blocks, at::kDouble);
  call.check(graft::cuda::launch_grad_norm(device_list.data(), device_list.count,
                                           device_list.blocks, /*max_norm=*/1.0,
                                           norm.mutable_data_ptr<double>(), own_floats(scale),
                                           space.mutable_data_ptr<double>(), call.stream()));
  return norm;
}

c10::DeviceType CudaKernels::device_type() const {
  return kernel_device_type();
}

int CudaKernels::capability(const at::Device& device) const {
  return compute_capability(device);
}

const DeviceKernels* cuda_kernels() {
  static const CudaKernels kernels;
  return &kernels;
}

}  // namespace graft::ops
