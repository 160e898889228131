// The softmax half of chunked linear cross entropy: losses of a chunk's rows, and the logits'
// gradient over the logits themselves; the products with the head's weight before and after are the
// library's.
//
// Bound by memory: a block reads its row twice and writes it once. One pass finds the maximum and
// the sum of exponentials together, each thread with a maximum of its own; they meet at the end.
#include "launch.h"
#include "warp_sum.h"

namespace graft::cuda {
namespace {

constexpr int kThreads = 256;

struct Args {
  const int64_t* targets;
  int64_t ignore_index, vocabulary, pitch;
  float scale;
  bool with_gradient, aligned;
  float* losses;
};

GPU_DEVICE float block_max(float value, float* scratch) {
  value = warp_max(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float largest = scratch[0];
  for (int warp = 1; warp < kThreads / 32; ++warp)
    largest = scratch[warp] > largest ? scratch[warp] : largest;
  return largest;
}

template <class T>
GPU_DEVICE void fill_row(T* row, const Args& args, float value) {
  for (int64_t i = threadIdx.x; args.with_gradient && i < args.vocabulary; i += kThreads)
    row[i] = from_float<T>(value);
}

template <class T>
__global__ void __launch_bounds__(kThreads) softmax_loss_kernel(T* logits, Args args) {
  GPU_SHARED(float, maxima, [kThreads / 32]);
  GPU_SHARED(double, sums, [kThreads / 32]);
  T* row = logits + blockIdx.x * args.pitch;
  const int64_t target = args.targets[blockIdx.x];
  const bool ignored = target == args.ignore_index,
             exists = target >= 0 && target < args.vocabulary;
  if (ignored || !exists) {
    if (threadIdx.x == 0) args.losses[blockIdx.x] = ignored ? 0.0f : nanf("");
    fill_row(row, args, ignored ? 0.0f : nanf(""));
    return;
  }
  const float at_target = to_float(row[target]);
  float own_max = -INFINITY, own_sum = 0;
  for (int64_t column = threadIdx.x * 8; column < args.vocabulary; column += kThreads * 8) {
    const int64_t valid = args.vocabulary - column;
    const Octet<T> values = load_octet(row + column, valid, args.aligned);
    float largest = own_max;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float v = to_float(element(values, i));
      largest = i < valid && v > largest ? v : largest;
    }
    if (largest > own_max) own_sum *= expf(own_max - largest);
    own_max = largest;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      own_sum += i < valid ? expf(to_float(element(values, i)) - own_max) : 0.0f;
  }
  const float largest = block_max(own_max, maxima);
  const double own = own_sum == 0.0f ? 0.0 : double{own_sum} * double{expf(own_max - largest)};
  const double sum =
      block_sum(own, sums);  // its barrier also lets all have read the target's logit
  if (threadIdx.x == 0)
    args.losses[blockIdx.x] = static_cast<float>(log(sum) + double{largest} - double{at_target});
  if (!args.with_gradient) return;
  const auto factor = static_cast<float>(args.scale / sum);
  for (int64_t column = threadIdx.x * 8; column < args.vocabulary; column += kThreads * 8) {
    const int64_t valid = args.vocabulary - column;
    const Octet<T> values = load_octet(row + column, valid, args.aligned);
    T gradient[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float probability = factor * expf(to_float(element(values, i)) - largest);
      gradient[i] = from_float<T>(probability - (column + i == target ? args.scale : 0.0f));
    }
    store_octet(row + column, make_octet(gradient), valid, args.aligned);
  }
}

__global__ void __launch_bounds__(kThreads)
    loss_sum_kernel(const float* losses, int64_t rows, double scale, float* loss) {
  GPU_SHARED(double, scratch, [kThreads / 32]);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) sum += losses[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *loss = static_cast<float>(scale * sum);
}

}  // namespace

cudaError_t launch_softmax_loss(const SoftmaxLoss& args, cudaStream_t stream) {
  if (!are_sizes(args.rows, args.vocabulary) || args.vocabulary == 0 ||
      args.pitch < args.vocabulary)
    return cudaErrorInvalidValue;
  if (args.rows == 0) return cudaSuccess;
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    const Args kernel_args = {args.targets,
                              args.ignore_index,
                              args.vocabulary,
                              args.pitch,
                              args.scale,
                              args.with_gradient,
                              has_aligned_rows(args.logits, args.pitch),
                              args.losses};
    return gpu::launch(softmax_loss_kernel<T>, grid_of(args.rows), dim3(kThreads), 0, stream,
                       static_cast<T*>(args.logits), kernel_args);
  });
}

cudaError_t launch_loss_sum(const float* losses, int64_t rows, double scale, float* loss,
                            cudaStream_t stream) {
  if (rows < 0) return cudaErrorInvalidValue;
  return gpu::launch(loss_sum_kernel, dim3(1), dim3(kThreads), 0, stream, losses, rows, scale,
                     loss);
}

}  // namespace graft::cuda
