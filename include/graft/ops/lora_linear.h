/// A linear layer with a low-rank term as one differentiable operation.
///
/// y = x W^T + b + s (p * ((g * (drop(x) A^T)) B^T) + c)
///
/// with a gate g on the r hidden units and a factor p on the outputs, both optional: without them
/// this is LoRA (Hu et al. 2021, arXiv 2106.09685); with g, SoRA and AdaLoRA; with both, VeRA.
///
/// Backward, with H = drop(x) A^T, S = g * H and U = s dY (p * B):
///   dB = s p * (dY^T S),  dp = s rowsum((dY^T S) * B),  dg = sum(U * H),  dA = (g * U)^T drop(x),
///   dx = dY W + mask((g * U) A),  dc = s sum(dY)
///
/// Saves H [tokens, r] and the weights by reference, x only where A (or the weight) is trained, and
/// nothing else: no mask, no dropped copy of x. A gradient that nobody wants costs nothing.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/ops/dropout.h>

namespace graft::ops {

/// The low-rank term of one layer.
struct LoraTerm {
  at::Tensor A;            ///< [r, in]
  at::Tensor B;            ///< [out, r]
  at::Tensor bias;         ///< c [out], or undefined
  double scale = 1.0;      ///< s
  Dropout dropout = {};    ///< on the term's input
  at::Tensor gate = {};    ///< g [r], or undefined
  at::Tensor factor = {};  ///< p [out], or undefined
};

/// x: [..., in], weight: [out, in], bias: [out] or undefined; returns [..., out] in x's dtype.
/// The base product runs in x's dtype, the low-rank products in the dtype of A and B (fp32
/// masters), their sum is rounded once. Gradients reach x, A, B, g, p, c, and the base's weight and
/// bias where those require them.
at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       const LoraTerm& term);

}  // namespace graft::ops
