// DoRA: y = b + c * (x W^T + s S B^T), c = m / n, n_i = ||W_i + s (B A)_i||.
//
// The forward pass is lora_expand's, with c and b as its last step, and keeps z = x W^T + s S B^T.
// Here is the rest. The norm goes without forming B A: from ||W_i||^2 (once, W is frozen) and the
// small products P = W A^T and A A^T (lora_shrink, once a step) in fp64, n rows of r numbers. The
// backward pass starts with one pass over dY and z that leaves dz = c * dY and sum_t dY z; with dz,
// all the rest is LoRA's.
#include "column_sums.h"
#include "launch.h"
#include "warp_sum.h"

namespace graft::cuda {
namespace {

constexpr int kThreads = 128, kRows = kThreads / 32;  // a warp a row
// A squared norm this much smaller than its terms has lost its digits to cancellation.
constexpr double kCancelled = 1e-3;

template <class T>
__global__ void __launch_bounds__(kThreads)
    row_squares_kernel(const T* weight, double* squares, int64_t rows, int64_t columns,
                       bool aligned) {
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / 32;
  if (row >= rows) return;
  double sum = 0;
  for (int64_t column = threadIdx.x % 32 * 8; column < columns; column += 32 * 8) {
    const Octet<T> w = load_octet(weight + row * columns + column, columns - column, aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const double v = to_float(element(w, i));
      sum += v * v;
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) squares[row] = sum;
}

template <class T>
struct NormArgs {
  const T *weight, *A, *B;
  const double* squares;
  const float *product, *gram, *magnitude;
  int64_t rows, columns;
  int rank, pitch;  // of product and gram
  double scale;
  float *norm, *column_scale;
};

template <class T>
GPU_DEVICE double direct_square(const NormArgs<T>& args, int64_t row) {
  double sum = 0;
  for (int64_t column = threadIdx.x % 32; column < args.columns; column += 32) {
    double v = 0;
    for (int j = 0; j < args.rank; ++j)
      v += double{to_float(args.B[row * args.rank + j])} *
           double{to_float(args.A[j * args.columns + column])};
    v = to_float(args.weight[row * args.columns + column]) + args.scale * v;
    sum += v * v;
  }
  return warp_sum(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) dora_norm_kernel(NormArgs<T> args) {
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / 32;
  if (row >= args.rows) return;
  const T* b = args.B + row * args.rank;
  double cross = 0, square = 0;  // <B_i, P_i> and B_i (A A^T) B_i^T
  for (int j = threadIdx.x % 32; j < args.rank; j += 32) {
    double along = 0;
    for (int l = 0; l < args.rank; ++l)
      along += double{args.gram[j * args.pitch + l]} * double{to_float(b[l])};
    cross += double{to_float(b[j])} * double{args.product[row * args.pitch + j]};
    square += double{to_float(b[j])} * along;
  }
  cross = warp_sum(cross);
  square = warp_sum(square);
  const double plain = args.squares[row] + args.scale * args.scale * (square > 0 ? square : 0.0);
  double total = plain + 2 * args.scale * cross;
  if (total < plain * kCancelled) total = direct_square(args, row);
  if (threadIdx.x % 32 != 0) return;
  const auto norm = static_cast<float>(sqrt(total > 0 ? total : 0.0));
  args.norm[row] = norm;
  args.column_scale[row] = norm > 0 ? args.magnitude[row] / norm : 1.0f;
}

template <class T>
__global__ void __launch_bounds__(kColumnSumThreads)
    dora_backward_kernel(const T* dy, const T* z, const float* column_scale, T* dz, float* parts,
                         int64_t rows, int64_t columns, int64_t split_rows, bool aligned) {
  sum_columns(parts, rows, columns, split_rows,
              [&](float(&sums)[8], int64_t row, int64_t column, int64_t valid) {
                const int64_t at = row * columns + column;
                const Octet<T> gradient = load_octet(dy + at, valid, aligned),
                               value = load_octet(z + at, valid, aligned);
                T scaled[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                  const float g = to_float(element(gradient, i));
                  sums[i] += g * to_float(element(value, i));
                  scaled[i] = from_float<T>(i < valid ? column_scale[column + i] * g : 0.0f);
                }
                store_octet(dz + at, make_octet(scaled), valid, aligned);
              });
}

__global__ void __launch_bounds__(kThreads)
    dora_magnitude_kernel(const float* parts, int splits, const float* norm, float* d_magnitude,
                          int64_t columns, bool accumulate) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= columns) return;
  float sum = parts[column];
  for (int split = 1; split < splits; ++split) sum += parts[split * columns + column];
  const float gradient = norm[column] > 0 ? sum / norm[column] : 0.0f;
  d_magnitude[column] = accumulate ? d_magnitude[column] + gradient : gradient;
}

}  // namespace

cudaError_t launch_row_squares(ElementType type, const void* weight, double* squares, int64_t rows,
                               int64_t columns, cudaStream_t stream) {
  if (!are_sizes(rows, columns)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return with_element(type, [&](auto zero) {
    using T = decltype(zero);
    return gpu::launch(row_squares_kernel<T>, grid_of(divide_up(rows, kRows)), dim3(kThreads), 0,
                       stream, static_cast<const T*>(weight), squares, rows, columns,
                       has_aligned_rows(weight, columns));
  });
}

cudaError_t launch_dora_norm(const DoraNorm& args, cudaStream_t stream) {
  if (!are_sizes(args.rows, args.columns) || padded_rank(args.rank) == 0)
    return cudaErrorInvalidValue;
  if (args.rows == 0) return cudaSuccess;
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    const NormArgs<T> kernel_args = {static_cast<const T*>(args.weight),
                                     static_cast<const T*>(args.A),
                                     static_cast<const T*>(args.B),
                                     args.squares,
                                     args.product,
                                     args.gram,
                                     args.magnitude,
                                     args.rows,
                                     args.columns,
                                     args.rank,
                                     padded_rank(args.rank),
                                     args.scale,
                                     args.norm,
                                     args.column_scale};
    return gpu::launch(dora_norm_kernel<T>, grid_of(divide_up(args.rows, kRows)), dim3(kThreads), 0,
                       stream, kernel_args);
  });
}

size_t dora_backward_workspace(int64_t rows, int64_t columns) {
  return static_cast<size_t>(column_sum_split(rows, columns).count * columns);
}

cudaError_t launch_dora_backward(const DoraBackward& args, cudaStream_t stream) {
  if (!are_sizes(args.rows, args.columns)) return cudaErrorInvalidValue;
  if (args.columns == 0) return cudaSuccess;
  const Split split = column_sum_split(args.rows, args.columns);
  const cudaError_t error = with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned =
        has_aligned_rows(args.dy, args.columns) && is_aligned(args.z) && is_aligned(args.dz);
    return gpu::launch(dora_backward_kernel<T>, column_sum_grid(args.rows, args.columns),
                       dim3(kColumnSumThreads), 0, stream, static_cast<const T*>(args.dy),
                       static_cast<const T*>(args.z), args.column_scale, static_cast<T*>(args.dz),
                       args.workspace, args.rows, args.columns, split.size, aligned);
  });
  if (error != cudaSuccess) return error;
  return gpu::launch(dora_magnitude_kernel, grid_of(divide_up(args.columns, kThreads)),
                     dim3(kThreads), 0, stream, args.workspace, split.count, args.norm,
                     args.d_magnitude, args.columns, args.accumulate);
}

}  // namespace graft::cuda
