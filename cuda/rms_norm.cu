// Root mean square normalisation: y = cast(x r) w, r = 1 / sqrt(mean(x^2) + eps).
//
// Bound by memory. A block takes a row and goes over it twice; the second pass finds the row in the
// caches. Backward needs x and one number a row from the forward pass:
//   dx = r (w dy - x r^2 mean(w dy x)),   dw = sum_t dy cast(x r)
// dw, wanted only where the weight is trained, is a pass of its own.
#include "column_sums.h"
#include "launch.h"
#include "warp_sum.h"

namespace graft::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_forward_kernel(const T* x, const T* weight, T* y, float* reciprocal, int64_t columns,
                            float eps, bool aligned) {
  GPU_SHARED(float, scratch, [kThreads / 32]);
  const int64_t start = int64_t{blockIdx.x} * columns;
  float sum = 0;
  for (int64_t column = threadIdx.x * 8; column < columns; column += kThreads * 8) {
    const Octet<T> values = load_octet(x + start + column, columns - column, aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += to_float(element(values, i)) * to_float(element(values, i));
  }
  const float r = 1.0f / sqrtf(block_sum(sum, scratch) / static_cast<float>(columns) + eps);
  for (int64_t column = threadIdx.x * 8; column < columns; column += kThreads * 8) {
    const int64_t valid = columns - column;
    const Octet<T> values = load_octet(x + start + column, valid, aligned);
    const Octet<T> w = load_octet(weight + column, valid, aligned);
    T out[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const T normalised = from_float<T>(to_float(element(values, i)) * r);
      out[i] = from_float<T>(to_float(normalised) * to_float(element(w, i)));
    }
    store_octet(y + start + column, make_octet(out), valid, aligned);
  }
  if (threadIdx.x == 0) reciprocal[blockIdx.x] = r;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_backward_kernel(const T* x, const T* weight, const T* dy, const float* reciprocal,
                             T* dx, int64_t columns, bool aligned) {
  GPU_SHARED(float, scratch, [kThreads / 32]);
  const int64_t start = int64_t{blockIdx.x} * columns;
  const float r = reciprocal[blockIdx.x];
  float dot = 0;
  for (int64_t column = threadIdx.x * 8; column < columns; column += kThreads * 8) {
    const int64_t valid = columns - column;
    const Octet<T> values = load_octet(x + start + column, valid, aligned);
    const Octet<T> w = load_octet(weight + column, valid, aligned);
    const Octet<T> g = load_octet(dy + start + column, valid, aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      dot += to_float(element(g, i)) * to_float(element(w, i)) * to_float(element(values, i));
  }
  const float along_x = block_sum(dot, scratch) * r * r * r / static_cast<float>(columns);
  for (int64_t column = threadIdx.x * 8; column < columns; column += kThreads * 8) {
    const int64_t valid = columns - column;
    const Octet<T> values = load_octet(x + start + column, valid, aligned);
    const Octet<T> w = load_octet(weight + column, valid, aligned);
    const Octet<T> g = load_octet(dy + start + column, valid, aligned);
    T out[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out[i] = from_float<T>(to_float(element(g, i)) * to_float(element(w, i)) * r -
                             to_float(element(values, i)) * along_x);
    }
    store_octet(dx + start + column, make_octet(out), valid, aligned);
  }
}

template <class T>
__global__ void __launch_bounds__(kColumnSumThreads)
    rms_norm_weight_backward_kernel(const T* x, const T* dy, const float* reciprocal, float* parts,
                                    int64_t rows, int64_t columns, int64_t split_rows,
                                    bool aligned) {
  sum_columns(parts, rows, columns, split_rows,
              [&](float(&sums)[8], int64_t row, int64_t column, int64_t valid) {
                const Octet<T> values = load_octet(x + row * columns + column, valid, aligned);
                const Octet<T> g = load_octet(dy + row * columns + column, valid, aligned);
                const float r = reciprocal[row];
#pragma unroll
                for (int i = 0; i < 8; ++i)
                  sums[i] += to_float(element(g, i)) *
                             to_float(from_float<T>(to_float(element(values, i)) * r));
              });
}

}  // namespace

cudaError_t launch_rms_norm_forward(const RmsNorm& args, void* y, cudaStream_t stream) {
  if (!are_sizes(args.rows, args.columns)) return cudaErrorInvalidValue;
  if (args.rows == 0 || args.columns == 0) return cudaSuccess;
  const bool aligned =
      has_aligned_rows(args.x, args.columns) && is_aligned(args.weight) && is_aligned(y);
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    return gpu::launch(rms_norm_forward_kernel<T>, grid_of(args.rows), dim3(kThreads), 0, stream,
                       static_cast<const T*>(args.x), static_cast<const T*>(args.weight),
                       static_cast<T*>(y), args.reciprocal, args.columns, args.eps, aligned);
  });
}

cudaError_t launch_rms_norm_backward(const RmsNorm& args, const void* dy, void* dx,
                                     cudaStream_t stream) {
  if (!are_sizes(args.rows, args.columns)) return cudaErrorInvalidValue;
  if (args.rows == 0 || args.columns == 0) return cudaSuccess;
  const bool aligned = has_aligned_rows(args.x, args.columns) && is_aligned(args.weight) &&
                       is_aligned(dy) && is_aligned(dx);
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    return gpu::launch(rms_norm_backward_kernel<T>, grid_of(args.rows), dim3(kThreads), 0, stream,
                       static_cast<const T*>(args.x), static_cast<const T*>(args.weight),
                       static_cast<const T*>(dy), args.reciprocal, static_cast<T*>(dx),
                       args.columns, aligned);
  });
}

size_t rms_norm_workspace(int64_t rows, int64_t columns) {
  return static_cast<size_t>(column_sum_split(rows, columns).count * columns);
}

cudaError_t launch_rms_norm_weight_backward(const RmsNorm& args, const void* dy, float* d_weight,
                                            bool accumulate, float* workspace,
                                            cudaStream_t stream) {
  if (!are_sizes(args.rows, args.columns)) return cudaErrorInvalidValue;
  if (args.columns == 0) return cudaSuccess;
  const Split split = column_sum_split(args.rows, args.columns);
  const cudaError_t error = with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    return gpu::launch(rms_norm_weight_backward_kernel<T>, column_sum_grid(args.rows, args.columns),
                       dim3(kColumnSumThreads), 0, stream, static_cast<const T*>(args.x),
                       static_cast<const T*>(dy), args.reciprocal, workspace, args.rows,
                       args.columns, split.size,
                       has_aligned_rows(args.x, args.columns) && is_aligned(dy));
  });
  if (error != cudaSuccess) return error;
  return launch_split_sum({workspace, split.count, 1, args.columns, 1, false, accumulate}, d_weight,
                          stream);
}

}  // namespace graft::cuda
