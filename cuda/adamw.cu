// The optimiser's step over all parameters at once: the gradients' global norm, and AdamW.
//
// An adapter has hundreds of small tensors, so a launch for each would cost more than its work: a
// table in device memory lists them, and a block takes 16384 elements of one. Bound by memory: the
// norm reads each gradient once; AdamW reads p, g, m, v and writes p, m, v (and p's 16-bit copy).
// The norm is summed in fp64 over the same blocks as the CPU's; its factor for clipping stays on
// the device.
#include "launch.h"
#include "warp_sum.h"

namespace graft::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlockElements = 16384;

// The tensor of a block: the last one that begins at or before it.
GPU_DEVICE const OptimizerTensor& tensor_of(const OptimizerTensor* tensors, int count,
                                            int64_t block) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (tensors[middle].first_block <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return tensors[low];
}

__global__ void __launch_bounds__(kThreads)
    grad_norm_kernel(const OptimizerTensor* tensors, int count, double* parts) {
  GPU_SHARED(double, scratch, [kThreads / 32]);
  const OptimizerTensor& tensor = tensor_of(tensors, count, blockIdx.x);
  const int64_t begin = (blockIdx.x - tensor.first_block) * kBlockElements;
  const int64_t end = begin + kBlockElements < tensor.size ? begin + kBlockElements : tensor.size;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const double g = tensor.gradient[i];
    sum += g * g;
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// One block: the norm, and min(1, max_norm / (norm + 1e-6)), NaN where the norm is not finite.
__global__ void __launch_bounds__(kThreads)
    clip_scale_kernel(const double* parts, int64_t blocks, double max_norm, double* norm,
                      float* scale) {
  GPU_SHARED(double, scratch, [kThreads / 32]);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += parts[i];
  const double total = sqrt(block_sum(sum, scratch));
  if (threadIdx.x != 0) return;
  *norm = total;
  const double factor = max_norm / (total + 1e-6);
  *scale = static_cast<float>(total - total == 0 ? (factor < 1 ? factor : 1.0) : total - total);
}

template <class Copy>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const OptimizerTensor* tensors, int count,
                                                         AdamwStep step, const float* grad_scale) {
  const OptimizerTensor& tensor = tensor_of(tensors, count, blockIdx.x);
  const float scale = grad_scale == nullptr ? 1.0f : *grad_scale;
  if (scale - scale != 0.0f) return;  // not finite
  const int64_t begin = (blockIdx.x - tensor.first_block) * kBlockElements;
  const int64_t end = begin + kBlockElements < tensor.size ? begin + kBlockElements : tensor.size;
  float *parameter = tensor.parameter, *means = tensor.mean, *squares = tensor.square;
  const float* gradient = tensor.gradient;
  const float keep = tensor.keep, step_size = tensor.step_size;
  auto* copy = static_cast<Copy*>(tensor.copy);
#pragma unroll 1  // unrolled, it spills
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const float g = gradient[i] * scale;
    const float mean = means[i] * step.beta1 + step.one_minus_beta1 * g;
    const float square = squares[i] * step.beta2 + step.one_minus_beta2 * g * g;
    means[i] = mean;
    squares[i] = square;
    const float p =
        parameter[i] * keep - step_size * (mean / (sqrtf(square) / step.root_bias2 + step.eps));
    parameter[i] = p;
    if (copy != nullptr) copy[i] = from_float<Copy>(p);
  }
}

}  // namespace

int64_t number_blocks(OptimizerTensor* tensors, int count) {
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    tensors[i].first_block = blocks;
    blocks += divide_up(tensors[i].size, kBlockElements);
  }
  return blocks;
}

cudaError_t launch_grad_norm(const OptimizerTensor* tensors, int count, int64_t blocks,
                             double max_norm, double* norm, float* grad_scale, double* workspace,
                             cudaStream_t stream) {
  if (count < 0 || blocks < 0 || !(max_norm > 0)) return cudaErrorInvalidValue;
  if (blocks > 0) {
    const cudaError_t error = gpu::launch(grad_norm_kernel, grid_of(blocks), dim3(kThreads), 0,
                                          stream, tensors, count, workspace);
    if (error != cudaSuccess) return error;
  }
  return gpu::launch(clip_scale_kernel, dim3(1), dim3(kThreads), 0, stream, workspace, blocks,
                     max_norm, norm, grad_scale);
}

cudaError_t launch_adamw(const OptimizerTensor* tensors, int count, int64_t blocks,
                         ElementType copy_type, const AdamwStep& step, const float* grad_scale,
                         cudaStream_t stream) {
  if (count < 0 || blocks < 0) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  return with_element(copy_type, [&](auto zero) {
    return gpu::launch(adamw_kernel<decltype(zero)>, grid_of(blocks), dim3(kThreads), 0, stream,
                       tensors, count, step, grad_scale);
  });
}

}  // namespace graft::cuda
