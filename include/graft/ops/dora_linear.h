/// A linear layer whose rows have a trained length (DoRA) as one differentiable operation.
///
///   V = W + s B A,  n_i = ||V_i||,  c = m / n  (1 where n is 0),  y = b + c * (x W^T + s S B^T)
///
/// with S = drop(x) A^T. The norm n is a constant of the step: no gradient goes through it
/// (Liu et al. 2024, arXiv 2402.09353, section 4.3). With `dropout_on_base` the base's share of the
/// change sees the dropped input too, at the price of a second base product:
///   y = b + x W^T + (c - 1) * (drop(x) W^T) + c * s S B^T
///
/// Backward, with G = dL/dy and D = s G^T S:
///   dB = c * D,  dA = (s G (c * B))^T drop(x),  dx = (c * G) W + mask(s G (c * B) A),
///   dm_i = (sum_t G_ti (x W^T)_ti + <D_i, B_i>) / n_i  (0 where n_i is 0)
/// The sum over tokens is taken from y, where c is not near 0: it equals sum_t G_ti (y_ti - b_i) /
/// c_i. Rows with a c near 0, and all rows when y was changed in place, multiply again.
///
/// Saves x, S [tokens, r] and the weights by reference, and y by reference where m is trained (with
/// dropout_on_base: drop(x) W^T instead).
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/ops/dropout.h>

namespace graft::ops {

/// What DoRA puts on one layer.
struct DoraTerm {
  at::Tensor A;          ///< [r, in]
  at::Tensor B;          ///< [out, r]
  at::Tensor magnitude;  ///< m [out]
  at::Tensor norm;       ///< n [out], of `dora_norm`
  double scale = 1.0;    ///< s
  Dropout dropout = {};
  bool dropout_on_base = false;  ///< PEFT's form of dropout; the same without dropout
};

/// x: [..., in], weight: [out, in], bias: [out] or undefined; returns [..., out] in x's dtype.
/// The base product runs in x's dtype, the rest in the dtype of A, B and m (fp32 masters).
/// Gradients reach x, A, B, m, and the base's weight and bias where those require them. Where c is
/// 1 and B is 0, y is the base's output bit for bit.
at::Tensor dora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       const DoraTerm& term);

/// c = m / n, and 1 where n is 0; differentiable in m. Both [out].
at::Tensor dora_scale(const at::Tensor& magnitude, const at::Tensor& norm);

/// The sums of squares of a matrix's rows, in fp64.  weight: [out, in]; returns [out].
at::Tensor row_squares(const at::Tensor& weight);

/// n_i = ||W_i + s (B A)_i|| without forming B A, in A's dtype, recorded by no autograd:
///   n_i^2 = ||W_i||^2 + 2 s <B_i, (W A^T)_i> + s^2 B_i (A A^T) B_i^T
/// Rows in which these terms cancel are summed directly. weight: [out, in] in any floating dtype,
/// squares: its `row_squares`, A: [r, in], B: [out, r]; returns [out].
at::Tensor dora_norm(const at::Tensor& weight, const at::Tensor& squares, const at::Tensor& A,
                     const at::Tensor& B, double scale);

}  // namespace graft::ops
