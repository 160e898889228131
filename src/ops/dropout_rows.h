// One row under its dropout mask: the inner loops of ops/dropout.h.
#pragma once

#include <graft/core/random.h>

#include <cstdint>

namespace graft::ops {

// Which mask, and what becomes of an element that stays: element j of row `row` stays when the
// 16-bit word j of the row's Philox stream is >= threshold, and is multiplied by `scale`. What the
// functions below take may be a part of the row: element `first` and on.
struct RowMask {
  random::MaskKey key;
  uint32_t row;
  uint32_t threshold;
  double scale;
  int64_t first = 0;  // a multiple of 8
};

// target[j] = stays(j) ? scale * x[j] : 0. The two may be the same.
void mask_row(float* target, const float* x, int64_t columns, const RowMask& mask);
void mask_row(double* target, const double* x, int64_t columns, const RowMask& mask);

// target[j] += stays(j) ? scale * x[j] : 0
void add_masked_row(float* target, const float* x, int64_t columns, const RowMask& mask);
void add_masked_row(double* target, const double* x, int64_t columns, const RowMask& mask);

}  // namespace graft::ops
