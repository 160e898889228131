// Compiled like the library's kernels, so that the race checker sees every access.
#include "faulty_kernels.h"

#include "cuda/gpu.h"

namespace faulty {
namespace {

constexpr int kThreads = 64;

// Every thread passes its neighbour's number on; `Barrier` is what keeps that right.
template <bool Barrier>
__global__ void rotate_kernel(int* data) {
  GPU_SHARED(int, slots, [kThreads]);
  slots[threadIdx.x] = data[threadIdx.x];
  if (Barrier) __syncthreads();
  data[threadIdx.x] = slots[(threadIdx.x + 33) % kThreads];
}

__global__ void rotate_twice_kernel(int* data) {
  GPU_SHARED(int, slots, [kThreads]);
  slots[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  const int first = slots[(threadIdx.x + 33) % kThreads];
  slots[threadIdx.x] = first;  // a barrier is missing before this
  __syncthreads();
  data[threadIdx.x] = slots[(threadIdx.x + 33) % kThreads];
}

__global__ void same_value_kernel(int* data) {
  GPU_SHARED(int, flag, [1]);
  flag[0] = 7;  // all threads write, the same
  __syncthreads();
  data[threadIdx.x] = flag[0];
}

__global__ void warp_rotate_kernel(int* data) {
  GPU_SHARED(int, slots, [kThreads]);
  slots[threadIdx.x] = data[threadIdx.x];
  const int lane = threadIdx.x % 32;
  data[threadIdx.x] = slots[threadIdx.x - lane + (lane + 1) % 32];  // __syncwarp is missing
}

__global__ void shuffle_as_fence_kernel(int* data) {
  GPU_SHARED(int, slots, [kThreads]);
  slots[threadIdx.x] = data[threadIdx.x];
  const int lane = threadIdx.x % 32, other = __shfl_sync(0xffffffffu, lane, (lane + 1) % 32);
  data[threadIdx.x] = slots[threadIdx.x - lane + other];
}

__global__ void early_exit_kernel(int* data) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  data[threadIdx.x] = 1;
}

__global__ void two_barriers_kernel(int* data) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  data[threadIdx.x] = 1;
}

__global__ void half_warp_kernel(int* data) {
  if (threadIdx.x % 32 < 16) data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, data[threadIdx.x], 1);
}

__global__ void shared_overrun_kernel(int* data) {
  GPU_SHARED(int, slots, [kThreads]);
  slots[threadIdx.x] = 1;
  __syncthreads();
  data[threadIdx.x] = (&slots[0])[threadIdx.x + 1];
}

__global__ void read_overrun_kernel(int* data) {
  const int beyond = data[256 + threadIdx.x % 8];
  data[threadIdx.x] = beyond == 12345 ? 1 : 2;
}

__global__ void write_overrun_kernel(int* data) {
  data[200 + threadIdx.x] = 1;
}

__global__ void uninitialised_kernel(int* data) {
  GPU_SHARED(int, slots, [kThreads]);
  if (threadIdx.x != 5) slots[threadIdx.x] = 0;
  __syncthreads();
  data[threadIdx.x] = slots[threadIdx.x];
}

__global__ void blocks_race_kernel(int* data) {
  data[64 * blockIdx.x + threadIdx.x] = data[threadIdx.x] + 1;
}

template <bool Wait>
__global__ void copy_kernel(int* data) {
  GPU_SHARED(int, slots, [kThreads * 4]);
  gpu::cp_async16(&slots[4 * threadIdx.x], data + 4 * threadIdx.x, 16);
  gpu::cp_async_commit();
  if (Wait) gpu::cp_async_wait<0>();
  data[4 * threadIdx.x] = slots[4 * threadIdx.x + 1];
}

__global__ void greedy_kernel(int* data) {
  gpu::Carver shared;
  int* first = shared.take<int>(32);
  int* second = shared.take<int>(64);
  first[threadIdx.x % 32] = second[0] = data[0];
}

template <class Kernel>
cudaError_t run(Kernel* kernel, int* data, unsigned blocks = 1, size_t shared = 0) {
  return gpu::launch(kernel, dim3(blocks), dim3(kThreads), shared, nullptr, data);
}

// One warp, one tile: fragments as a kernel would load them, without the freedom of order.
template <class T>
__global__ void tile_product_kernel(const T* a, const T* b, float* d) {
  GPU_SHARED(T, a_tile, [16][24]);
  GPU_SHARED(T, b_tile, [16][8]);
  for (int i = threadIdx.x; i < 256; i += 32) a_tile[i / 16][i % 16] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) b_tile[i / 8][i % 8] = b[i];
  __syncwarp();
  const int lane = threadIdx.x, m = lane / 8, row = lane % 8;
  uint32_t a_words[4], b_words[4];
  gpu::ldmatrix_x4(a_words, &a_tile[row + 8 * (m % 2)][8 * (m / 2)]);
  gpu::ldmatrix_x4_trans(b_words, &b_tile[row + 8 * (m % 2)][0]);
  const uint32_t b_fragment[2] = {b_words[0], b_words[1]};
  float sums[4] = {};
  gpu::mma_m16n8k16(sums, a_words, b_fragment, T{});
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sums[i];
}

__global__ void shuffle_kernel(int* out) {
  const int lane = threadIdx.x;
  constexpr unsigned kAll = 0xffffffffu;
  out[lane] = __shfl_sync(kAll, lane, 3, 8);
  out[32 + lane] = __shfl_xor_sync(kAll, lane, 5);
  out[64 + lane] = __shfl_up_sync(kAll, lane, 2);
  out[96 + lane] = __shfl_down_sync(kAll, lane, 2, 16);
  out[128 + lane] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
}

}  // namespace

const Case kCases[] = {
    {"no barrier after a first write", [](int* d) { return run(rotate_kernel<false>, d); }, false,
     false, "uninitialised", true},
    {"no barrier before an overwrite", [](int* d) { return run(rotate_twice_kernel, d); }, false,
     false, "race", true},
    {"race of equal values", [](int* d) { return run(same_value_kernel, d); }, false, false,
     "race"},
    {"no __syncwarp", [](int* d) { return run(warp_rotate_kernel, d); }, false, false,
     "uninitialised", true},
    {"a shuffle in place of __syncwarp", [](int* d) { return run(shuffle_as_fence_kernel, d); },
     false, false, "race"},
    {"threads end before a barrier", [](int* d) { return run(early_exit_kernel, d); }, true, true,
     "cannot go on"},
    {"two different barriers", [](int* d) { return run(two_barriers_kernel, d); }, true, true,
     "cannot go on"},
    {"half a warp shuffles", [](int* d) { return run(half_warp_kernel, d); }, true, true, "ended"},
    {"read beyond shared memory", [](int* d) { return run(shared_overrun_kernel, d); }, false, true,
     "out of bounds", true},
    {"read beyond device memory", [](int* d) { return run(read_overrun_kernel, d); }, false, true,
     "out of bounds"},
    {"write beyond device memory", [](int* d) { return run(write_overrun_kernel, d); }, true, true,
     "out"},
    {"uninitialised shared memory", [](int* d) { return run(uninitialised_kernel, d); }, false,
     false, "uninitialised", true},
    {"blocks share data", [](int* d) { return run(blocks_race_kernel, d, 4); }, false, false,
     "race between blocks", true},
    {"a copy is not waited for", [](int* d) { return run(copy_kernel<false>, d); }, false, false,
     "uninitialised", true},
    {"more shared memory is cut than launched",
     [](int* d) { return run(greedy_kernel, d, 1, 256); }, true, true, "dynamic shared memory"},
};
const int kCaseCount = sizeof kCases / sizeof kCases[0];

cudaError_t run_correct(int* data) {
  run(rotate_kernel<true>, data);
  return run(copy_kernel<true>, data);
}

cudaError_t run_tile_product(const void* a, const void* b, float* d, bool fp16) {
  if (fp16)
    return gpu::launch(tile_product_kernel<__half>, dim3(1), dim3(32), 0, nullptr,
                       static_cast<const __half*>(a), static_cast<const __half*>(b), d);
  return gpu::launch(tile_product_kernel<__nv_bfloat16>, dim3(1), dim3(32), 0, nullptr,
                     static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), d);
}

cudaError_t run_shuffles(int* out) {
  return gpu::launch(shuffle_kernel, dim3(1), dim3(32), 0, nullptr, out);
}

}  // namespace faulty
