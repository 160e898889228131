#include "cuda_dispatch.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/device_paths.h>

#include <array>
#include <atomic>
#include <map>
#include <mutex>

#ifdef GRAFT_HAS_CUDA_KERNELS
#include "cuda/cuda_kernels.h"
#endif

namespace graft::ops {
namespace {

constexpr std::array<std::string_view, kDeviceOps> kNames = {
    "lora_linear",   "dora_linear", "dora_norm", "dropout", "rms_norm", "swiglu", "rope",
    "cross_entropy", "adamw",       "grad_norm", "experts", "router",   "sparse", "lora_group"};

constexpr int kLeastCapability = 80;             // of bf16 tensor cores and cp.async
constexpr int64_t kMostRank = 64;                // cuda/kernels.h, padded_rank
constexpr int64_t kMostRows = int64_t{1} << 31;  // of a matrix, either way

const DeviceKernels* built_kernels() {
#ifdef GRAFT_HAS_CUDA_KERNELS
  return cuda_kernels();
#else
  return nullptr;
#endif
}

std::atomic<const DeviceKernels*>& current_kernels() {
  static std::atomic<const DeviceKernels*> kernels{built_kernels()};
  return kernels;
}

std::mutex counts_mutex;
std::map<std::pair<int, std::string_view>, int64_t>& counts() {
  static std::map<std::pair<int, std::string_view>, int64_t> table;
  return table;
}

bool has_rank(DeviceOp op) {
  return op == DeviceOp::lora_linear || op == DeviceOp::dora_linear || op == DeviceOp::dora_norm ||
         op == DeviceOp::experts || op == DeviceOp::lora_group;
}

// What an operation's options are called where kernels do not have them.
std::string_view missing_option(DeviceOp op) {
  switch (op) {
    case DeviceOp::dora_linear:
      return "dropout on the base";
    case DeviceOp::experts:
      return "more than 256 experts";
    case DeviceOp::router:
      return "another selection than the top 8 of 256";
    default:
      return "strided elements";
  }
}

}  // namespace

std::string_view device_op_name(DeviceOp op) {
  return kNames[static_cast<size_t>(op)];
}

std::string_view fallback_reason(const DeviceCase& call, const DeviceAbility& ability) {
  if (!ability.built) return "built without kernels";
  if (ability.capability < kLeastCapability) return "compute capability below 8.0";
  if (call.op == DeviceOp::sparse) return "no kernel";
  const bool only_fp32 = call.op == DeviceOp::adamw || call.op == DeviceOp::grad_norm;
  if (only_fp32 && call.type != at::kFloat) return "numbers other than fp32";
  if (call.type != at::kFloat && call.type != at::kBFloat16 && call.type != at::kHalf)
    return "numbers other than bf16, fp16, fp32";
  if (!call.one_type) return "operands of different types";
  if (has_rank(call.op) && (call.rank < 1 || call.rank > kMostRank)) return "rank not in [1, 64]";
  if (call.rows >= kMostRows || call.columns >= kMostRows) return "2^31 rows or columns";
  if (!call.plain) return missing_option(call.op);
  return {};
}

const DeviceKernels* device_kernels() {
  return current_kernels().load(std::memory_order_acquire);
}

const DeviceKernels* set_device_kernels(const DeviceKernels* kernels) {
  return current_kernels().exchange(kernels);
}

bool on_device(const at::Tensor& x) {
  if (x.is_cuda()) return true;
  const DeviceKernels* kernels = device_kernels();
  return kernels != nullptr && x.device().type() == kernels->device_type();
}

const DeviceKernels* kernels_for(const DeviceCase& call, const at::Device& device) {
  const DeviceKernels* kernels = device_kernels();
  DeviceAbility ability;
  if (kernels != nullptr && kernels->device_type() == device.type())
    ability = {true, kernels->capability(device)};
  const std::string_view reason = fallback_reason(call, ability);
  {
    const std::lock_guard lock(counts_mutex);
    ++counts()[{static_cast<int>(call.op), reason}];
  }
  return reason.empty() ? kernels : nullptr;
}

void check_one_device(const char* area, std::initializer_list<at::Tensor> tensors) {
  const at::Tensor* first = nullptr;
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) continue;
    if (first == nullptr) first = &tensor;
    GRAFT_CHECK(tensor.device() == first->device(), area, "all tensors must be on one device; got ",
                first->device().str(), " and ", tensor.device().str());
  }
}

bool built_with_kernels() {
  return built_kernels() != nullptr;
}

int device_capability(const c10::Device& device) {
  const DeviceKernels* kernels = device_kernels();
  return kernels != nullptr && kernels->device_type() == device.type() ? kernels->capability(device)
                                                                       : 0;
}

std::vector<DevicePath> device_paths() {
  const std::lock_guard lock(counts_mutex);
  std::vector<DevicePath> paths;
  for (const auto& [key, count] : counts())
    paths.push_back(
        {std::string(kNames[static_cast<size_t>(key.first)]), std::string(key.second), count});
  return paths;
}

void reset_device_paths() {
  const std::lock_guard lock(counts_mutex);
  counts().clear();
}

std::string describe_device_paths() {
  std::string text;
  for (const DevicePath& path : device_paths()) {
    text +=
        concat(path.operation, ": ", path.count,
               path.reason.empty() ? " by graft's kernel" : " by LibTorch: ", path.reason, "\n");
  }
  return text;
}

}  // namespace graft::ops
