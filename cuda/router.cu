// Mixtures of experts: top-k softmax router, the order of tokens by expert, and what goes there and
// back.
//
// A slot is one of a token's top_k choices; slot numbers are token * top_k + choice. Sorting slots
// by expert is a counting sort whose places follow from votes of warps and from prefix sums, in the
// slots' order: no atomic additions, so that the order of rows, and with it every sum over them, is
// always the same. The kernels that move rows are bound by memory and read and write each row once.
#include "launch.h"
#include "warp_sum.h"

namespace graft::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostExperts = 256, kMostChoices = 8;
constexpr unsigned kAll = 0xffffffffu;

// Whether (a, i) goes before (b, j): larger, or equal and of a smaller index; -1 is no index.
GPU_DEVICE bool goes_before(float a, int i, float b, int j) {
  if (i < 0 || j < 0) return i >= 0;
  return a > b || (!(b > a) && i < j);
}

// A warp a token; lane l holds the logits of experts l, l + 32, ...
__global__ void __launch_bounds__(kThreads)
    router_forward_kernel(const float* logits, int64_t tokens, int experts, int top_k, int* ids,
                          float* weights) {
  constexpr int kHeld = kMostExperts / 32;
  const int64_t token = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (token >= tokens) return;
  const int lane = threadIdx.x % 32;
  float held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    held[i] = lane + 32 * i < experts ? logits[token * experts + lane + 32 * i] : 0.0f;
  unsigned taken = 0;
  float chosen[kMostChoices], largest = 0, sum = 0;
  int chosen_ids[kMostChoices];
#pragma unroll
  for (int k = 0; k < kMostChoices; ++k) {
    if (k >= top_k) break;
    float best = 0;
    int best_id = -1;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const bool free = lane + 32 * i < experts && (taken >> i & 1) == 0;
      if (free && goes_before(held[i], lane + 32 * i, best, best_id)) {
        best = held[i];
        best_id = lane + 32 * i;
      }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(kAll, best, distance);
      const int other_id = __shfl_xor_sync(kAll, best_id, distance);
      if (goes_before(other, other_id, best, best_id)) {
        best = other;
        best_id = other_id;
      }
    }
    if (best_id % 32 == lane) taken |= 1u << (best_id / 32);
    chosen_ids[k] = best_id;
    if (k == 0) largest = best;
    chosen[k] = expf(best - largest);
    sum += chosen[k];
  }
  if (lane != 0) return;
#pragma unroll
  for (int k = 0; k < kMostChoices; ++k) {
    if (k >= top_k) break;
    ids[token * top_k + k] = chosen_ids[k];
    weights[token * top_k + k] = chosen[k] / sum;
  }
}

// dl_j = w_j (dw_j - sum_i w_i dw_i) for the chosen experts, 0 for the others.
__global__ void __launch_bounds__(kThreads)
    router_backward_kernel(const int* ids, const float* weights, const float* d_weights,
                           float* d_logits, int64_t tokens, int experts, int top_k) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= tokens * experts) return;
  const int64_t token = index / experts;
  const int expert = static_cast<int>(index % experts);
  float mean = 0, gradient = 0;
  for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot)
    mean += weights[slot] * d_weights[slot];
  for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
    if (ids[slot] == expert) gradient = weights[slot] * (d_weights[slot] - mean);
  }
  d_logits[index] = gradient;
}

// Counts the block's slots of each expert by warps: counts[warp][expert]. Returns how many slots of
// the caller's warp before its own go to the same expert.
GPU_DEVICE int count_slots(int (&counts)[kWarps][kMostExperts], int id, int experts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int before = 0;
  for (int expert = 0; expert < experts; ++expert) {
    const unsigned votes = __ballot_sync(kAll, id == expert);
    if (lane == 0) counts[warp][expert] = __popc(votes);
    if (id == expert) before = __popc(votes & ((1u << lane) - 1u));
  }
  __syncthreads();
  return before;
}

__global__ void __launch_bounds__(kThreads)
    router_count_kernel(const int* ids, int64_t slots, int experts, int* block_counts) {
  GPU_SHARED(int, counts, [kWarps][kMostExperts]);
  const int64_t slot = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  count_slots(counts, slot < slots ? ids[slot] : -1, experts);
  for (int expert = threadIdx.x; expert < experts; expert += kThreads) {
    int count = 0;
    for (int warp = 0; warp < kWarps; ++warp) count += counts[warp][expert];
    block_counts[int64_t{blockIdx.x} * experts + expert] = count;
  }
}

// One block: offsets of experts, and in place of each block's count the place of its first slot.
__global__ void __launch_bounds__(kMostExperts)
    router_scan_kernel(int* block_counts, int blocks, int experts, int* offsets) {
  GPU_SHARED(int, totals, [kMostExperts]);
  const int expert = threadIdx.x;
  if (expert < experts) {
    int total = 0;
    for (int block = 0; block < blocks; ++block)
      total += block_counts[int64_t{block} * experts + expert];
    totals[expert] = total;
  }
  __syncthreads();
  if (expert >= experts) return;
  int place = 0;
  for (int before = 0; before < expert; ++before) place += totals[before];
  offsets[expert] = place;
  if (expert == experts - 1) offsets[experts] = place + totals[expert];
  for (int block = 0; block < blocks; ++block) {
    int& count = block_counts[int64_t{block} * experts + expert];
    const int size = count;
    count = place;
    place += size;
  }
}

__global__ void __launch_bounds__(kThreads)
    router_place_kernel(const int* ids, int64_t slots, int experts, const int* block_places,
                        int* positions, int* sources) {
  GPU_SHARED(int, counts, [kWarps][kMostExperts]);
  const int64_t slot = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int id = slot < slots ? ids[slot] : -1;
  const int before = count_slots(counts, id, experts);
  if (slot >= slots) return;
  if (id < 0 || id >= experts) {
    positions[slot] = -1;
    return;
  }
  int place = block_places[int64_t{blockIdx.x} * experts + id] + before;
  for (int warp = 0; warp < static_cast<int>(threadIdx.x) / 32; ++warp) place += counts[warp][id];
  positions[slot] = place;
  sources[place] = static_cast<int>(slot);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dispatch_forward_kernel(const T* x, const int* sources, T* rows, int64_t count, int64_t columns,
                            int top_k, bool aligned) {
  const int64_t octets = (columns + 7) / 8, index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= count * octets) return;
  const int64_t row = index / octets, column = index % octets * 8, valid = columns - column;
  const Octet<T> values =
      load_octet(x + int64_t{sources[row] / top_k} * columns + column, valid, aligned);
  store_octet(rows + row * columns + column, values, valid, aligned);
}

// out[t] = sum_k w[t, k] rows[position of (t, k)], in the order of choices; weights null: all 1.
template <class T>
__global__ void __launch_bounds__(kThreads)
    combine_forward_kernel(const T* rows, const int* positions, const float* weights, T* out,
                           int64_t tokens, int64_t columns, int top_k, bool aligned) {
  const int64_t octets = (columns + 7) / 8, index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= tokens * octets) return;
  const int64_t token = index / octets, column = index % octets * 8, valid = columns - column;
  float sums[8] = {};
  for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
    const int64_t row = positions[slot];
    if (row < 0) continue;
    const Octet<T> values = load_octet(rows + row * columns + column, valid, aligned);
    const float weight = weights == nullptr ? 1.0f : weights[slot];
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += weight * to_float(element(values, i));
  }
  T stored[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) stored[i] = from_float<T>(sums[i]);
  store_octet(out + token * columns + column, make_octet(stored), valid, aligned);
}

// A block a slot: d_rows[position] = w d_out[t], dw = <rows[position], d_out[t]>.
template <class T>
__global__ void __launch_bounds__(kThreads)
    combine_backward_kernel(const T* rows, const int* positions, const float* weights,
                            const T* d_out, T* d_rows, float* d_weights, int64_t columns, int top_k,
                            bool aligned) {
  GPU_SHARED(float, scratch, [kWarps]);
  const int64_t slot = blockIdx.x, token = slot / top_k, row = positions[slot];
  float dot = 0;
  for (int64_t column = threadIdx.x * 8; row >= 0 && column < columns; column += kThreads * 8) {
    const int64_t valid = columns - column;
    const Octet<T> values = load_octet(rows + row * columns + column, valid, aligned);
    const Octet<T> gradient = load_octet(d_out + token * columns + column, valid, aligned);
    T scaled[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float g = to_float(element(gradient, i));
      dot += g * to_float(element(values, i));
      scaled[i] = from_float<T>(weights[slot] * g);
    }
    store_octet(d_rows + row * columns + column, make_octet(scaled), valid, aligned);
  }
  dot = block_sum(dot, scratch);
  if (threadIdx.x == 0) d_weights[slot] = dot;
}

bool is_valid(const Routing& args) {
  return are_sizes(args.tokens, args.experts) && args.experts >= 1 &&
         args.experts <= kMostExperts && args.top_k >= 1 && args.top_k <= kMostChoices &&
         args.top_k <= args.experts && args.tokens * args.top_k < int64_t{1} << 31;
}

bool is_valid(const ExpertRows& args) {
  return are_sizes(args.tokens, args.columns) && args.top_k >= 1 &&
         args.tokens * args.top_k < int64_t{1} << 31;
}

}  // namespace

cudaError_t launch_router_forward(const Routing& args, const float* logits, cudaStream_t stream) {
  if (!is_valid(args)) return cudaErrorInvalidValue;
  if (args.tokens == 0) return cudaSuccess;
  return gpu::launch(router_forward_kernel, grid_of(divide_up(args.tokens, kWarps)), dim3(kThreads),
                     0, stream, logits, args.tokens, args.experts, args.top_k, args.ids,
                     args.weights);
}

cudaError_t launch_router_backward(const Routing& args, const float* d_weights, float* d_logits,
                                   cudaStream_t stream) {
  if (!is_valid(args)) return cudaErrorInvalidValue;
  if (args.tokens == 0) return cudaSuccess;
  return gpu::launch(router_backward_kernel,
                     grid_of(divide_up(args.tokens * args.experts, kThreads)), dim3(kThreads), 0,
                     stream, args.ids, args.weights, d_weights, d_logits, args.tokens, args.experts,
                     args.top_k);
}

size_t router_order_workspace(const Routing& args) {
  return static_cast<size_t>(divide_up(args.tokens * args.top_k, kThreads) * args.experts);
}

cudaError_t launch_router_order(const Routing& args, int* positions, int* sources, int* offsets,
                                int* workspace, cudaStream_t stream) {
  if (!is_valid(args)) return cudaErrorInvalidValue;
  const int64_t slots = args.tokens * args.top_k, blocks = divide_up(slots, kThreads);
  if (blocks > 0) {
    const cudaError_t error = gpu::launch(router_count_kernel, grid_of(blocks), dim3(kThreads), 0,
                                          stream, args.ids, slots, args.experts, workspace);
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error = gpu::launch(router_scan_kernel, dim3(1), dim3(kMostExperts), 0, stream,
                                        workspace, static_cast<int>(blocks), args.experts, offsets);
  if (error != cudaSuccess || blocks == 0) return error;
  return gpu::launch(router_place_kernel, grid_of(blocks), dim3(kThreads), 0, stream, args.ids,
                     slots, args.experts, workspace, positions, sources);
}

cudaError_t launch_dispatch_forward(const ExpertRows& args, const void* x, const int* sources,
                                    void* rows, int64_t count, cudaStream_t stream) {
  if (!is_valid(args) || count < 0) return cudaErrorInvalidValue;
  if (count == 0 || args.columns == 0) return cudaSuccess;
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    return gpu::launch(dispatch_forward_kernel<T>,
                       grid_of(divide_up(count * divide_up(args.columns, 8), kThreads)),
                       dim3(kThreads), 0, stream, static_cast<const T*>(x), sources,
                       static_cast<T*>(rows), count, args.columns, args.top_k,
                       has_aligned_rows(x, args.columns) && is_aligned(rows));
  });
}

cudaError_t launch_combine_forward(const ExpertRows& args, const void* rows, const float* weights,
                                   void* out, cudaStream_t stream) {
  if (!is_valid(args)) return cudaErrorInvalidValue;
  if (args.tokens == 0 || args.columns == 0) return cudaSuccess;
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    return gpu::launch(combine_forward_kernel<T>,
                       grid_of(divide_up(args.tokens * divide_up(args.columns, 8), kThreads)),
                       dim3(kThreads), 0, stream, static_cast<const T*>(rows), args.positions,
                       weights, static_cast<T*>(out), args.tokens, args.columns, args.top_k,
                       has_aligned_rows(rows, args.columns) && is_aligned(out));
  });
}

cudaError_t launch_combine_backward(const ExpertRows& args, const void* rows, const float* weights,
                                    const void* d_out, void* d_rows, float* d_weights,
                                    cudaStream_t stream) {
  if (!is_valid(args)) return cudaErrorInvalidValue;
  if (args.tokens == 0) return cudaSuccess;
  return with_element(args.type, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned =
        has_aligned_rows(rows, args.columns) && is_aligned(d_out) && is_aligned(d_rows);
    return gpu::launch(combine_backward_kernel<T>, grid_of(args.tokens * args.top_k),
                       dim3(kThreads), 0, stream, static_cast<const T*>(rows), args.positions,
                       weights, static_cast<const T*>(d_out), static_cast<T*>(d_rows), d_weights,
                       args.columns, args.top_k, aligned);
  });
}

}  // namespace graft::cuda
