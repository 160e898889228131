/// Linear layers whose frozen weight gets a sparse update, as differentiable operations.
///
///   sparse_linear:  y = x (W + s S)^T + b,             S has K trained entries at fixed positions
///   column_linear:  y = x W^T + b + s x[:, c] D^T,     D trains r whole columns c of W
///
/// On the CPU no dense copy of the update or of W is made. The entries are applied to blocks of
/// tokens that lie with the tokens adjacent, so that an entry costs one vector operation a few
/// tokens; the sums do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

namespace graft::ops {

/// The entries of S, in any order; entries at one position add up.
struct SparseTerm {
  at::Tensor positions;  ///< int32 [2, K]: the entries' rows of W, then their columns
  at::Tensor values;     ///< v [K], float32 or float64
  double scale = 1.0;    ///< s
};

/// x: [..., in], weight: [out, in], bias: [out] or undefined; returns [..., out] in x's dtype.
/// The base product runs in x's dtype, the sparse one in the values', their sum is rounded once.
/// dv_q = s sum_t dY[t, row_q] x[t, column_q], dx = dY (W + s S). Saves x (for dv) and the weights
/// by reference. Gradients reach x, the values, and the base's weight and bias where those require
/// them. Throws for a position outside of W. On a device LibTorch computes it with a dense copy of
/// S, and all of dS = dY^T x before its entries are taken.
at::Tensor sparse_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                         const SparseTerm& term);

/// W + s S, summed in the values' dtype; records nothing for autograd.
at::Tensor add_sparse(const at::Tensor& weight, const SparseTerm& term);

/// The update of some columns.
struct ColumnTerm {
  at::Tensor columns;  ///< c, int32 [r]; a column that stands twice gets both updates
  at::Tensor D;        ///< [out, r], float32 or float64
  double scale = 1.0;  ///< s
};

/// x: [..., in], weight: [out, in], bias: [out] or undefined; returns [..., out] in x's dtype.
/// dD = s dY^T x[:, c], dx = dY W, and s dY D more in the columns c. Saves x[:, c] [tokens, r] and
/// the weights by reference: x itself only where the base's weight is trained. Gradients as above.
/// Throws for a column outside of W.
at::Tensor column_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                         const ColumnTerm& term);

}  // namespace graft::ops
