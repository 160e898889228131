// Dropout on its own, for what is no low-rank product. The mask is drawn, not stored: backward
// calls the same launcher with the same key. One thread takes the eight columns of one counter; the
// kernel reads and writes each element once.
#include "dropout_mask.h"
#include "launch.h"

namespace graft::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(const T* x, T* y, int64_t rows, int64_t columns, DropoutMask mask, float scale,
                   bool aligned) {
  const int64_t octets = (columns + 7) / 8;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= rows * octets) return;
  const int64_t row = index / octets, octet = index % octets;
  const int64_t at = row * columns + octet * 8, valid = columns - octet * 8;
  Octet<T> values = load_octet(x + at, valid, aligned);
  drop(values, mask_now(mask), row, rows, octet);
  T scaled[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) scaled[i] = from_float<T>(scale * to_float(element(values, i)));
  store_octet(y + at, make_octet(scaled), valid, aligned);
}

}  // namespace

cudaError_t launch_dropout(ElementType type, const void* x, void* y, int64_t rows, int64_t columns,
                           const DropoutMask& mask, cudaStream_t stream) {
  if (!are_sizes(rows, columns) || mask.threshold >= 65536) return cudaErrorInvalidValue;
  if (rows == 0 || columns == 0) return cudaSuccess;
  const int64_t blocks = divide_up(rows * divide_up(columns, 8), kThreads);
  const bool aligned = has_aligned_rows(x, columns) && is_aligned(y);
  return with_element(type, [&](auto zero) {
    using T = decltype(zero);
    return gpu::launch(dropout_kernel<T>, grid_of(blocks), dim3(kThreads), 0, stream,
                       static_cast<const T*>(x), static_cast<T*>(y), rows, columns, mask,
                       mask.scale(), aligned);
  });
}

}  // namespace graft::cuda
