// The gated activation of Llama: y = silu(gate) up, silu(g) = g sigmoid(g), elementwise.
//
// Bound by memory: forward reads two matrices and writes one, backward reads three and writes two.
// gate and up may be the halves of one wide product, hence the distance of their rows.
#include "launch.h"

namespace graft::cuda {
namespace {

constexpr int kThreads = 256;

// One thread takes eight columns of a row; false beyond the last.
struct Position {
  int64_t row, column;
};
GPU_DEVICE bool position_of(Position& position, int64_t rows, int64_t columns) {
  const int64_t octets = (columns + 7) / 8, index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  position = {index / octets, index % octets * 8};
  return index < rows * octets;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    swiglu_forward_kernel(const T* gate, const T* up, T* y, int64_t rows, int64_t columns,
                          int64_t pitch, bool aligned) {
  Position at;
  if (!position_of(at, rows, columns)) return;
  const int64_t from = at.row * pitch + at.column, valid = columns - at.column;
  const Octet<T> gates = load_octet(gate + from, valid, aligned),
                 ups = load_octet(up + from, valid, aligned);
  T out[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float g = to_float(element(gates, i));
    out[i] = from_float<T>(g / (1.0f + expf(-g)) * to_float(element(ups, i)));
  }
  store_octet(y + at.row * columns + at.column, make_octet(out), valid, aligned);
}

// silu'(g) = s + g s (1 - s), s = sigmoid(g).
template <class T>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const T* gate, const T* up, const T* dy, T* d_gate, T* d_up,
                           int64_t rows, int64_t columns, int64_t pitch, bool aligned) {
  Position at;
  if (!position_of(at, rows, columns)) return;
  const int64_t from = at.row * pitch + at.column, valid = columns - at.column;
  const Octet<T> gates = load_octet(gate + from, valid, aligned),
                 ups = load_octet(up + from, valid, aligned);
  const Octet<T> gradients = load_octet(dy + at.row * columns + at.column, valid, aligned);
  T to_gate[8], to_up[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float g = to_float(element(gates, i)), gradient = to_float(element(gradients, i));
    const float sigmoid = 1.0f / (1.0f + expf(-g)), silu = g * sigmoid;
    to_gate[i] =
        from_float<T>(gradient * to_float(element(ups, i)) * (sigmoid + silu * (1.0f - sigmoid)));
    to_up[i] = from_float<T>(gradient * silu);
  }
  store_octet(d_gate + from, make_octet(to_gate), valid, aligned);
  store_octet(d_up + from, make_octet(to_up), valid, aligned);
}

bool is_valid(const Swiglu& args) {
  return are_sizes(args.rows, args.columns) && args.pitch >= args.columns;
}

bool has_aligned_inputs(const Swiglu& args) {
  return has_aligned_rows(args.gate, args.columns) && has_aligned_rows(args.up, args.pitch);
}

}  // namespace

cudaError_t launch_swiglu_forward(const Swiglu& args, void* y, cudaStream_t stream) {
  if (!is_valid(args)) return cudaErrorInvalidValue;
  if (args.rows == 0 || args.columns == 0) return cudaSuccess;
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    return gpu::launch(swiglu_forward_kernel<T>,
                       grid_of(divide_up(args.rows * divide_up(args.columns, 8), kThreads)),
                       dim3(kThreads), 0, stream, static_cast<const T*>(args.gate),
                       static_cast<const T*>(args.up), static_cast<T*>(y), args.rows, args.columns,
                       args.pitch, has_aligned_inputs(args) && is_aligned(y));
  });
}

cudaError_t launch_swiglu_backward(const Swiglu& args, const void* dy, void* d_gate, void* d_up,
                                   cudaStream_t stream) {
  if (!is_valid(args)) return cudaErrorInvalidValue;
  if (args.rows == 0 || args.columns == 0) return cudaSuccess;
  const bool aligned =
      has_aligned_inputs(args) && is_aligned(dy) && is_aligned(d_gate) && is_aligned(d_up);
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    return gpu::launch(swiglu_backward_kernel<T>,
                       grid_of(divide_up(args.rows * divide_up(args.columns, 8), kThreads)),
                       dim3(kThreads), 0, stream, static_cast<const T*>(args.gate),
                       static_cast<const T*>(args.up), static_cast<const T*>(dy),
                       static_cast<T*>(d_gate), static_cast<T*>(d_up), args.rows, args.columns,
                       args.pitch, aligned);
  });
}

}  // namespace graft::cuda
