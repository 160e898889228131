/// A frozen linear layer with a low-rank term for each expert, over rows that are grouped by expert
/// (ops/expert_rows.h). The frozen product runs once over all rows; each expert multiplies its own
/// rows alone.
///
///   expert_linear        y_m = W x_t(m) + b + s B_e A_e drop(x_t(m))     x by token: one frozen
///                                                                        product for T tokens
///   expert_row_linear    y_m = W x_m + b + s B_e A_e drop(x_m)           x by row
///
/// where m is a row, t(m) its token, e its expert. Rows without expert have the frozen product
/// alone. Dropout is row `pair` of the mask, whatever the order of the rows. Source: Li et al.
/// 2024, arXiv 2404.15159 (MixLoRA).
///
/// Backward, with S = drop(x) A_e^T and U = s dY B_e row by row:
///   dB_e = s dY_e^T S_e,  dA_e = U_e^T drop(x_e),  dx = dY W + mask(U A_e), summed over a token's
///   rows where x is by token.
///
/// Saves x (computed again in backward where it is an rms_norm's or a swiglu's output), S [M, r]
/// and the weights by reference. All sums have a fixed order.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/ops/dropout.h>
#include <graft/ops/expert_rows.h>

namespace graft::ops {

/// The experts' low-rank terms on one layer.
struct ExpertTerm {
  at::Tensor A;          ///< [E, r, in]
  at::Tensor B;          ///< [E, out, r]
  double scale = 1.0;    ///< s
  Dropout dropout = {};  ///< on the terms' input
};

/// x: [tokens, in], weight: [out, in], bias: [out] or undefined; returns [M, out] in x's dtype. The
/// frozen product runs in x's dtype, the rest in the dtype of A and B (fp32 masters); on a device
/// with kernels for the case (docs/kernels.md) A and B are rounded to x's dtype first, and sums run
/// in fp32. Gradients reach x, A and B; an expert without rows gets zeros. Throws when the weight
/// or the bias requires a gradient.
at::Tensor expert_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                         const ExpertTerm& term, const ExpertRows& rows);

/// The same for x [M, in].
at::Tensor expert_row_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                             const ExpertTerm& term, const ExpertRows& rows);

}  // namespace graft::ops
