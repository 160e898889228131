// The low-rank terms of experts on rows that are grouped by expert: what the operations of
// ops/expert_linear.h and ops/expert_mlp.h share. Products run expert by expert over its rows
// alone; on a device by expert_device.h.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <graft/ops/expert_linear.h>

#include <algorithm>

#include "dropout_rows.h"
#include "tensor_rows.h"

namespace graft::ops {

// Adjacent columns of all rows, which one thread works on.
struct Tile {
  int64_t index, first, columns;
};
inline int64_t tile_count(int64_t columns, int64_t width) {
  return (columns + width - 1) / width;
}

// Calls f(tile) for all tiles of `columns`, in parallel.
template <class F>
void for_tiles(int64_t columns, int64_t width, int64_t rows, const F& f) {
  at::parallel_for(0, tile_count(columns, width), rows_grain(rows * width),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i)
                       f(Tile{i, i * width, std::min(width, columns - i * width)});
                   });
}

// The mask of row m from column `first` on: that of its pair, wherever the row lies.
inline RowMask mask_of(const ExpertRows& rows, int64_t m, const Dropout& dropout,
                       int64_t first = 0) {
  return {dropout.key, static_cast<uint32_t>(rows.pair.const_data_ptr<int64_t>()[m]),
          dropout.threshold(), dropout.scale(), first};
}

// Calls f(expert, first row, rows) for each expert that has rows.
template <class F>
void for_experts(const ExpertRows& rows, const F& f) {
  const int64_t* offsets = rows.offsets.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < rows.experts(); ++e)
    if (offsets[e + 1] > offsets[e]) f(e, offsets[e], offsets[e + 1] - offsets[e]);
}

// S = drop(x) A_e^T row by row, [M, r]; 0 for rows without expert. x: [tokens, in], or by row.
at::Tensor hidden_rows(const at::Tensor& x, bool by_token, const at::Tensor& A,
                       const ExpertRows& rows, const Dropout& dropout);

// dA_e = U_e^T drop(x_e), [E, r, in].
at::Tensor input_factor_gradient(const at::Tensor& U, const at::Tensor& x, bool by_token,
                                 const at::Tensor& A, const ExpertRows& rows,
                                 const Dropout& dropout);

// mask(U A_e) row by row, added to the rows' own rows of `target` [M, in] or to those of their
// tokens, [tokens, in], in the order of slots. target: contiguous; on the CPU of A's type. `type`:
// x's, in which a device's kernels work.
void add_through_terms(const at::Tensor& target, bool by_token, const at::Tensor& U,
                       const at::Tensor& A, at::ScalarType type, const ExpertRows& rows,
                       const Dropout& dropout);

// y + scale S B_e^T row by row, perhaps in y's memory: [M, out], in the type of B, or of y where a
// device's kernels work.
at::Tensor add_output_terms(const at::Tensor& y, const at::Tensor& S, const at::Tensor& B,
                            double scale, const ExpertRows& rows);

// U = scale dY B_e row by row, [M, r], and where it is wanted dB_e = scale dY_e^T S_e, [E, out, r].
struct OutputGradients {
  at::Tensor hidden, B;
};
OutputGradients output_gradients(const at::Tensor& dy, const at::Tensor& S, const at::Tensor& B,
                                 double scale, const ExpertRows& rows, bool wants_B);

// Throws unless the term fits a frozen weight [out, in] and the plan's experts.
void check_term(const at::Tensor& weight, const at::Tensor& bias, const ExpertTerm& term,
                const ExpertRows& rows);

}  // namespace graft::ops
