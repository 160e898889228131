/// The LoRA linear layer as one differentiable operation.
///
/// y = x W^T + b + s (drop(x) A^T B^T + c)       Hu et al. 2021, arXiv 2106.09685
///
/// Backward, with S = drop(x) A^T and dS = s dY B:
///   dB = s dY^T S,  dA = dS^T drop(x),  dx = dY W + mask(dS A),  dc = s sum(dY)
///
/// Saves x and S [tokens, r], the weights by reference, and nothing else: no mask, no dropped copy
/// of x.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/ops/dropout.h>

namespace graft::ops {

/// The low-rank term of one layer.
struct LoraTerm {
  at::Tensor A;          ///< [r, in]
  at::Tensor B;          ///< [out, r]
  at::Tensor bias;       ///< c [out], or undefined
  double scale = 1.0;    ///< s
  Dropout dropout = {};  ///< on the term's input
};

/// x: [..., in], weight: [out, in], bias: [out] or undefined; returns [..., out] in x's dtype.
/// The base product runs in x's dtype, the low-rank products in the dtype of A and B (fp32
/// masters), their sum is rounded once. Gradients reach x, A, B, c, and the base's weight and bias
/// where those require them.
at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       const LoraTerm& term);

}  // namespace graft::ops
