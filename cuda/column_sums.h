/// Sums down the columns of a [rows, columns] matrix of terms, for gradients of vectors that scale
/// or shift columns. A block takes 256 columns and a range of rows; its 8 rows of threads meet in
/// shared memory, the ranges of several blocks in a workspace (split_sum.h).
#pragma once

#include "split_sum.h"

namespace graft::cuda {

inline constexpr int kColumnSumThreads = 256, kColumnSumColumns = 256;

inline Split column_sum_split(int64_t rows, int64_t columns) {
  return split_of(rows, 64, divide_up(columns, kColumnSumColumns), 512, 64);
}

inline dim3 column_sum_grid(int64_t rows, int64_t columns) {
  return grid_of(divide_up(columns, kColumnSumColumns), column_sum_split(rows, columns).count);
}

/// The block's part: parts[blockIdx.y * columns + column]. term(sums, row, column, valid) adds the
/// terms of up to eight columns. Called by every thread of the block.
template <class Term>
GPU_DEVICE void sum_columns(float* parts, int64_t rows, int64_t columns, int64_t split_rows,
                            const Term& term) {
  constexpr int kLanes = kColumnSumColumns / 8, kThreadRows = kColumnSumThreads / kLanes;
  GPU_SHARED(float, meeting, [kThreadRows][kColumnSumColumns]);
  const int octet = threadIdx.x % kLanes, thread_row = threadIdx.x / kLanes;
  const int64_t first_column = int64_t{blockIdx.x} * kColumnSumColumns,
                column = first_column + 8 * octet;
  const int64_t first = blockIdx.y * split_rows,
                last = first + split_rows < rows ? first + split_rows : rows;
  float sums[8] = {};
  if (column < columns) {
    for (int64_t row = first + thread_row; row < last; row += kThreadRows)
      term(sums, row, column, columns - column);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) meeting[thread_row][8 * octet + i] = sums[i];
  __syncthreads();
  const int64_t mine = first_column + threadIdx.x;
  if (mine >= columns) return;
  float sum = meeting[0][threadIdx.x];
  for (int row = 1; row < kThreadRows; ++row) sum += meeting[row][threadIdx.x];
  parts[blockIdx.y * columns + mine] = sum;
}

}  // namespace graft::cuda
