/// Sums over the threads of a warp and of a block, always in the same order.
#pragma once

#include "gpu.h"

namespace graft::cuda {

/// The sum over the warp, the same bits in every lane.
template <class V>
GPU_DEVICE V warp_sum(V value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

GPU_DEVICE float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

/// The sum over a block of whole warps. `scratch` is shared memory, one number a warp; it may be
/// used again after the next barrier.
template <class V>
GPU_DEVICE V block_sum(V value, V* scratch) {
  const int warps = blockDim.x / 32;
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  V total = scratch[0];
  for (int warp = 1; warp < warps; ++warp) total += scratch[warp];
  return total;
}

}  // namespace graft::cuda
