/// A linear layer with a low-rank term as one differentiable operation.
///
/// y = x W^T + b + s (p * ((g * (drop(x) A^T)) B^T) + c)
///
/// with a gate g on the r hidden units and a factor p on the outputs, both optional: without them
/// this is LoRA (Hu et al. 2021, arXiv 2106.09685); with g, SoRA and AdaLoRA; with both, VeRA.
///
/// Mixtures of experts on one layer are the same operation with a gate that differs from token to
/// token: the experts' factors side by side, A = [A_1; ...; A_E] and B = [B_1 ... B_E] with
/// r = sum r_e, and one number of g for the r_e units of each expert, so that
///   y = x W^T + b + s sum_e g_e drop(x) A_e^T B_e^T
/// without a loop, a gather or a copy of a factor. Experts that a token does not choose have g = 0:
/// they are computed too, E r (in + out) products a token instead of K r (in + out), and a zero
/// does not hold back a NaN: 0 * NaN is NaN.
///
/// Backward, with H = drop(x) A^T, S = g * H and U = s dY (p * B):
///   dB = s p * (dY^T S),  dp = s rowsum((dY^T S) * B),  dg = sum(U * H),  dA = (g * U)^T drop(x),
///   dx = dY W + mask((g * U) A),  dc = s sum(dY)
/// dg is summed over what one number of g stands for: units of a group, and tokens.
///
/// Saves H [tokens, r], the gate and the weights by reference, x only where A (or the weight) is
/// trained, and nothing else: no mask, no dropped copy of x. A gradient that nobody wants costs
/// nothing.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/ops/dropout.h>

#include <cstdint>
#include <vector>

namespace graft::ops {

/// The low-rank term of one layer.
struct LoraTerm {
  at::Tensor A;          ///< [r, in]
  at::Tensor B;          ///< [out, r]
  at::Tensor bias;       ///< c [out], or undefined
  double scale = 1.0;    ///< s
  Dropout dropout = {};  ///< on the term's input
  /// g: [r] or, with `ranks`, [E]; a gate of each token's own has x's leading dimensions before
  /// that. Of A's dtype; undefined: 1.
  at::Tensor gate = {};
  at::Tensor factor = {};  ///< p [out], or undefined
  /// r_e of the E groups of units, at least 1 each, r together, that have one number of g each;
  /// empty: every unit has its own.
  std::vector<int64_t> ranks = {};
};

/// x: [..., in], weight: [out, in], bias: [out] or undefined; returns [..., out] in x's dtype.
/// The base product runs in x's dtype, the low-rank products in the dtype of A and B (fp32
/// masters), their sum is rounded once; on a device with kernels for the case (docs/kernels.md) A
/// and B are rounded to x's dtype first, and sums run in fp32. Gradients reach x, A, B, g, p, c,
/// and the base's weight and bias where those require them.
at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       const LoraTerm& term);

}  // namespace graft::ops
