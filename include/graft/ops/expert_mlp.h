/// A frozen gated feed-forward block with a low-rank term for each expert on each of its three
/// layers, over rows that are grouped by expert (ops/expert_rows.h): MixLoRA's block, its experts
/// combined before the down projection.
///
///   h1_m = W1 x_t + b1 + s B1_e A1_e drop(x_t),   h3_m likewise,   z_m = silu(h1_m) h3_m
///   y_t = sum_m w_m (W2 z_m + b2 + s B2_e A2_e drop(z_m))
///       = W2 (sum_m w_m z_m) + b2 sum_m w_m + s sum_m w_m B2_e A2_e drop(z_m)
///
/// where m is a row, t its token, e its expert and the sums go over the rows of token t; rows
/// without expert have no terms. Each frozen weight multiplies T tokens, whatever the number of
/// rows. Dropout is row `pair` of each layer's mask. Sources: Li et al. 2024, arXiv 2404.15159
/// (MixLoRA); the last form is graft's.
///
/// Backward, with S = drop(x) A_e^T and P = drop(z) A2_e^T row by row, v = dY W2 and q = s B2_e^T
/// dY_t:
///   dz_m = w_m v_t + mask(w_m A2_e^T q_m),   dw_m = <z_m, v_t> + <P_m, q_m> (+ <b2, dY_t>),
///   dB2_e = s sum_m dY_t w_m P_m^T,   dA2_e = sum_m w_m q_m drop(z_m)^T;
///   with dh1, dh3 from swiglu's derivative and U1 = s dh1 B1_e row by row:
///   dB1_e = s dh1_e^T S1_e,   dA1_e = U1_e^T drop(x_e),   dB3 and dA3 likewise,
///   dx_t = (sum_m dh1_m) W1 + (sum_m dh3_m) W3 + sum_m mask(U1_m A1_e) + mask(U3_m A3_e)
///
/// Saves W1 x and W3 x of the tokens, as a block with one adapter does, x (computed again in
/// backward where it is an rms_norm's output), S and P [M, r], and the weights by reference: h1, h3
/// and z of the rows are made again in backward, a few columns at a time, and never stored. All
/// sums have a fixed order.
#pragma once

#include <graft/ops/expert_linear.h>

namespace graft::ops {

/// A frozen layer with its experts' terms.
struct ExpertLayer {
  at::Tensor weight;  ///< [out, in]
  at::Tensor bias;    ///< [out] or undefined
  ExpertTerm term;
};

/// gate and up: [f, hidden], down: [hidden, f].
struct ExpertMlp {
  ExpertLayer gate, up, down;
};

/// x: [tokens, hidden], row_weights: w [M] of the factors' dtype; returns [tokens, hidden] in x's
/// dtype. The frozen products run in x's dtype, the rest in that of the factors (fp32 masters), or
/// on a device's kernels as ops/expert_linear.h says; there h1, h3 and z are made in memory.
/// Gradients reach x, w and all factors; an expert without rows gets zeros. `sum_to_one`: the
/// weights of every token sum to 1, so that b2 is added as it is and tells w nothing. Throws on
/// shapes that do not fit and when a weight or a bias requires a gradient.
at::Tensor expert_mlp(const at::Tensor& x, const at::Tensor& row_weights, const ExpertMlp& block,
                      const ExpertRows& rows, bool sum_to_one);

}  // namespace graft::ops
