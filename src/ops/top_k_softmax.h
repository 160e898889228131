// A router's choice by one kernel, with its gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace graft::ops {

// Whether a kernel takes the case of top_k from logits [tokens, experts]. `softmax`: the weights
// are a softmax over the chosen logits, what the kernel does.
bool has_router_kernel(const at::Tensor& logits, int64_t top_k, bool softmax);

// The chosen experts (int64, the largest logit first, of equal ones the lower expert) and their
// weights, differentiable: [tokens, top_k] both.
std::pair<at::Tensor, at::Tensor> top_k_softmax(const at::Tensor& logits, int64_t top_k);

}  // namespace graft::ops
