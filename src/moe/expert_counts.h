// How often each expert stands in a list.
#pragma once

#include <ATen/ATen.h>

namespace graft::moe {

// experts: int64, -1 for none; returns int64 [count]. Does not wait for a device, as bincount does.
inline at::Tensor count_experts(const at::Tensor& experts, int64_t count) {
  const at::Tensor places = experts.reshape({-1}) + 1;
  return at::zeros({count + 1}, places.options())
      .scatter_add_(0, places, at::ones_like(places))
      .slice(0, 1);
}

}  // namespace graft::moe
