// Rotary position embedding, half-split convention, with the transposition to attention's layout:
//   y_i = x_i cos_i - x_{i+d/2} sin_i     y_{i+d/2} = x_{i+d/2} cos_i + x_i sin_i
//
// Bound by memory: reads x once, writes y once. Backward turns the gradient back by the same angles
// and returns it in x's layout, so both directions are one kernel with the layouts exchanged.
#include "launch.h"

namespace graft::cuda {
namespace {

constexpr int kThreads = 256;

// Where head `head` of a token begins, as sums of these steps.
struct Layout {
  int64_t batch, token, head;
};

template <class T>
struct Args {
  const T* from;
  T* to;
  const float *cos, *sin;  // [tokens, half], or one such table for each element of the batch
  Layout from_layout, to_layout;
  int64_t batch, tokens, heads, half, table_batch_step;
  float direction;  // 1 forward, -1 backward
  bool aligned;
};

template <class T>
__global__ void __launch_bounds__(kThreads) rope_kernel(Args<T> args) {
  const int64_t octets = (args.half + 7) / 8;
  int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.batch * args.tokens * args.heads * octets) return;
  const int64_t octet = index % octets;
  index /= octets;
  const int64_t head = index % args.heads, token = index / args.heads % args.tokens,
                batch = index / args.heads / args.tokens;
  const int64_t first = 8 * octet, valid = args.half - first;
  const auto start = [&](const Layout& layout) {
    return batch * layout.batch + token * layout.token + head * layout.head + first;
  };
  const T* from = args.from + start(args.from_layout);
  const Octet<T> low = load_octet(from, valid, args.aligned),
                 high = load_octet(from + args.half, valid, args.aligned);
  const int64_t angles = batch * args.table_batch_step + token * args.half + first;
  const Octet<float> cos = load_octet(args.cos + angles, valid, args.aligned);
  const Octet<float> sin = load_octet(args.sin + angles, valid, args.aligned);
  T turned_low[8], turned_high[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float a = to_float(element(low, i)), b = to_float(element(high, i)),
                s = args.direction * sin.v[i];
    turned_low[i] = from_float<T>(a * cos.v[i] - b * s);
    turned_high[i] = from_float<T>(b * cos.v[i] + a * s);
  }
  T* to = args.to + start(args.to_layout);
  store_octet(to, make_octet(turned_low), valid, args.aligned);
  store_octet(to + args.half, make_octet(turned_high), valid, args.aligned);
}

cudaError_t launch(const Rope& args, const void* from, void* to, Layout from_layout,
                   Layout to_layout, float direction, cudaStream_t stream) {
  const int64_t half = args.head_size / 2;
  if (args.batch < 0 || args.tokens < 0 || args.heads < 0 || args.head_size < 0 ||
      args.head_size % 2 != 0)
    return cudaErrorInvalidValue;
  const int64_t threads = args.batch * args.tokens * args.heads * divide_up(half, 8);
  if (threads == 0) return cudaSuccess;
  const bool aligned = half % 8 == 0 && is_aligned(from) && is_aligned(to) &&
                       is_aligned(args.cos) && is_aligned(args.sin) && from_layout.token % 8 == 0 &&
                       from_layout.batch % 8 == 0;
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    const Args<T> kernel_args = {static_cast<const T*>(from),
                                 static_cast<T*>(to),
                                 args.cos,
                                 args.sin,
                                 from_layout,
                                 to_layout,
                                 args.batch,
                                 args.tokens,
                                 args.heads,
                                 half,
                                 args.angles_by_batch ? args.tokens * half : 0,
                                 direction,
                                 aligned};
    return gpu::launch(rope_kernel<T>, grid_of(divide_up(threads, kThreads)), dim3(kThreads), 0,
                       stream, kernel_args);
  });
}

// [batch, heads, tokens, head_size] without gaps.
Layout attention_layout(const Rope& args) {
  return {args.heads * args.tokens * args.head_size, args.head_size, args.tokens * args.head_size};
}

}  // namespace

cudaError_t launch_rope_forward(const Rope& args, const void* x, int64_t batch_step,
                                int64_t token_step, void* y, cudaStream_t stream) {
  return launch(args, x, y, {batch_step, token_step, args.head_size}, attention_layout(args), 1.0f,
                stream);
}

cudaError_t launch_rope_backward(const Rope& args, const void* dy, void* dx, cudaStream_t stream) {
  const int64_t token = args.heads * args.head_size;
  return launch(args, dy, dx, attention_layout(args), {args.tokens * token, token, args.head_size},
                -1.0f, stream);
}

}  // namespace graft::cuda
