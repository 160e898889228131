// From tensors to what cuda/kernels.h takes.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <graft/core/error.h>
#include <graft/ops/dropout.h>

#include "../../../cuda/kernels.h"
#include "device.h"

namespace graft::ops {

constexpr const char* kCudaArea = "cuda";

// An error of a launch as the library's own.
inline void check_launch(cudaError_t error, const char* kernel) {
  GRAFT_CHECK(error == cudaSuccess, kCudaArea, "a launch must succeed; got '", error_text(error),
              "' (", kernel, ")");
}

// What one call of a kernel works on: the device of its first tensor, made current while the call
// lasts, and that device's current stream. Refuses tensors of other devices.
class Call {
 public:
  Call(const char* kernel, const at::Tensor& first)
      : kernel_(kernel), guard_(first.device()), options_(first.options().requires_grad(false)) {
    GRAFT_CHECK(first.device().type() == kernel_device_type(), kCudaArea,
                "tensors must be on a device of kernels; got ", first.device().str(), " (", kernel_,
                ")");
  }

  // t as a dense matrix (or vector) of this type: itself, or a copy.
  at::Tensor dense(const at::Tensor& t, at::ScalarType type) const {
    GRAFT_CHECK(t.defined() && t.layout() == at::kStrided && t.device() == options_.device(),
                kCudaArea, "all tensors must be dense and on ", options_.device().str(), "; got ",
                t.defined() ? concat(t.toString(), " on ", t.device().str()) : "undefined", " (",
                kernel_, ")");
    return t.detach().to(type).contiguous();
  }
  // Null for an undefined tensor.
  at::Tensor dense_or_none(const at::Tensor& t, at::ScalarType type) const {
    return t.defined() ? dense(t, type) : t;
  }

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const {
    return at::empty(sizes, options_.dtype(type));
  }
  // From LibTorch's caching allocator, which keeps it until the stream is done with it.
  at::Tensor workspace(size_t numbers, at::ScalarType type = at::kFloat) const {
    return empty({static_cast<int64_t>(numbers)}, type);
  }

  cudaStream_t stream() const { return current_stream(options_.device()); }
  void check(cudaError_t error) const { check_launch(error, kernel_); }
  void check_sizes(bool agree, const at::Tensor& a, const at::Tensor& b) const {
    GRAFT_CHECK(agree, kCudaArea, "shapes must agree; got ", a.sizes(), " and ", b.sizes(), " (",
                kernel_, ")");
  }

 private:
  const char* kernel_;
  c10::DeviceGuard guard_;
  at::TensorOptions options_;
};

inline graft::cuda::ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kBFloat16:
      return graft::cuda::ElementType::bf16;
    case at::kHalf:
      return graft::cuda::ElementType::fp16;
    case at::kFloat:
      return graft::cuda::ElementType::fp32;
    default:
      fail(kCudaArea, concat("numbers must be bf16, fp16 or fp32; got ", at::toString(type)));
  }
}

// Where the launches of a capture find what to add to their masks' step; null outside (graph.cpp).
const uint32_t* later_steps();

inline graft::cuda::DropoutMask dropout_mask(const Dropout& dropout) {
  if (!dropout.active()) return {};
  graft::cuda::DropoutMask mask = {dropout.key.seed, dropout.key.site, dropout.key.step,
                                   dropout.threshold()};
  mask.later = later_steps();
  return mask;
}

inline const void* pointer(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr() : nullptr;
}
inline const float* floats(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<float>() : nullptr;
}
inline float* own_floats(const at::Tensor& t) {
  return t.defined() ? t.mutable_data_ptr<float>() : nullptr;
}

}  // namespace graft::ops
