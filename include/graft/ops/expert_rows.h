/// Which rows each expert works on: the plan that all products of one mixture follow, forward and
/// backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace graft::ops {

/// M rows of work over T tokens, grouped by expert. A row is one (token, slot) pair that an expert
/// works on; then come the tokens that no expert works on, one row each. All tensors int64, on the
/// device of the tokens.
struct ExpertRows {
  at::Tensor offsets;        ///< [E + 1]: expert e has rows offsets[e] ... offsets[e + 1] - 1
  at::Tensor token;          ///< [M]: whose token a row is
  at::Tensor pair;           ///< [M]: token * slots + slot; names the row's dropout mask
  at::Tensor token_offsets;  ///< [T + 1]: token t has token_rows[token_offsets[t]] ...
  at::Tensor token_rows;     ///< [M]: rows by token, in the order of slots: the order of all sums
  int64_t slots = 0;         ///< of a token; operations on a device need it
  int64_t routed_rows = -1;  ///< routed(), where it is known without reading `offsets`

  int64_t experts() const { return offsets.size(0) - 1; }
  int64_t rows() const { return token.size(0); }
  int64_t tokens() const { return token_offsets.size(0) - 1; }
  /// Rows that an expert works on: the first ones. Waits for a device where `routed_rows` is unset.
  int64_t routed() const;
  /// The expert that is alone to work, on every token once, so that rows and tokens are the same;
  /// -1: there is none, or a device would have to be waited for to know.
  int64_t only_expert() const;
};

/// x[token of the row]: [tokens, n] to [M, n]; differentiable, its gradient summed in the order of
/// slots.
at::Tensor gather_tokens(const at::Tensor& x, const ExpertRows& rows);

/// y_t = sum of weight_m v_m over the rows m of token t, in the order of slots.  values: [M, n] and
/// weights: [M], fp32 or fp64 both; returns [tokens, n]. Differentiable in both; saves both.
at::Tensor combine_rows(const at::Tensor& values, const at::Tensor& weights,
                        const ExpertRows& rows);

}  // namespace graft::ops
