/// fp64 definitions of the low-rank products, straight from include/graft/ops/lora_linear.h.
#pragma once

#include <graft/core/philox.h>

#include "device_array.h"

namespace graft::cuda::testing {

using Doubles = std::vector<double>;

inline DropoutMask mask_of(double p, uint64_t seed = 0x123456789abcdefULL) {
  return {seed, 77, 3, static_cast<uint32_t>(std::lround(65536.0 * p))};
}

/// mask / (1 - p) of one element, as include/graft/ops/dropout.h states it.
inline double mask_factor(const DropoutMask& mask, int64_t row, int64_t column) {
  const Philox4 random = philox4x32(
      {static_cast<uint32_t>(column / 8), static_cast<uint32_t>(row), mask.site, mask.step},
      mask.seed);
  const uint32_t words[4] = {random.x, random.y, random.z, random.w};
  const uint32_t bits = words[column % 8 / 2] >> (16 * (column % 2)) & 0xffff;
  return bits >= mask.threshold ? 65536.0 / (65536.0 - mask.threshold) : 0.0;
}

/// [rows, columns] of numbers in double.
struct Dense {
  Dense(int64_t rows_in, int64_t columns_in)
      : rows(rows_in), columns(columns_in), v(static_cast<size_t>(rows * columns)) {}
  template <class T>
  Dense(const Matrix<T>& m) : rows(m.rows), columns(m.columns), v(m.exact) {}
  double& operator()(int64_t i, int64_t j) { return v[static_cast<size_t>(i * columns + j)]; }
  double operator()(int64_t i, int64_t j) const { return v[static_cast<size_t>(i * columns + j)]; }

  int64_t rows, columns;
  Doubles v;
};

inline Dense transpose(const Dense& a) {
  Dense t(a.columns, a.rows);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < a.columns; ++j) t(j, i) = a(i, j);
  return t;
}

/// scale * a b
inline Dense product(const Dense& a, const Dense& b, double scale = 1) {
  REQUIRE(a.columns == b.rows);
  Dense c(a.rows, b.columns);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t k = 0; k < a.columns; ++k) {
      for (int64_t j = 0; j < b.columns; ++j) c(i, j) += scale * a(i, k) * b(k, j);
    }
  }
  return c;
}

inline Dense dropped(const Dense& x, const DropoutMask& mask) {
  Dense y = x;
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t j = 0; j < x.columns; ++j) y(i, j) *= mask_factor(mask, i, j);
  return y;
}

/// With zero columns up to padded_rank, as kernels store hidden matrices.
template <class T>
std::vector<T> padded(const Matrix<T>& hidden, int rank) {
  const auto width = static_cast<size_t>(padded_rank(rank));
  std::vector<T> all(static_cast<size_t>(hidden.rows) * width, from_double<T>(0));
  for (int64_t i = 0; i < hidden.rows; ++i) {
    for (int j = 0; j < rank; ++j)
      all[static_cast<size_t>(i) * width + static_cast<size_t>(j)] =
          hidden.stored[static_cast<size_t>(i * hidden.columns + j)];
  }
  return all;
}

inline Dense padded(const Dense& hidden, int rank) {
  Dense all(hidden.rows, padded_rank(rank));
  for (int64_t i = 0; i < hidden.rows; ++i)
    for (int64_t j = 0; j < hidden.columns; ++j) all(i, j) = hidden(i, j);
  return all;
}

}  // namespace graft::cuda::testing
