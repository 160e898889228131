/// Runs CUDA kernels on the CPU: what cuda/gpu.h becomes under a plain C++ compiler.
///
/// A block's threads are fibers on one thread of the system (scheduler.h), shared and device memory
/// come from an arena with guard bands (memory.h), and warp instructions are carried out lane by
/// lane as the PTX manual defines them (instructions.cpp). A broken rule throws `emulation::Fault`
/// out of the launch. The text of a kernel is the one that nvcc compiles.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>
// After the standard headers: CUDA's define names, such as __noinline__, that those use otherwise.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>

#include "scheduler.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __shared__ static_assert(false, "shared memory is declared with GPU_SHARED");

#define GPU_DEVICE inline
#define GPU_SHARED(T, name, ...)                                                            \
  static char emulation_key_##name;                                                         \
  auto& name = *static_cast<std::type_identity_t<T __VA_ARGS__>*>(emulation::static_shared( \
      &emulation_key_##name, sizeof(std::type_identity_t<T __VA_ARGS__>)))

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using Place = std::source_location;

inline void __syncthreads(Place place = Place::current()) {
  emulation::barrier(place);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, Place place = Place::current()) {
  emulation::sync_warp(mask, place);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, Place place = Place::current()) {
  static_assert(std::is_trivially_copyable_v<T>);
  T result;
  emulation::shuffle(mask, &value, &result, sizeof(T), emulation::Shuffle::index, source, width,
                     place);
  return result;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  Place place = Place::current()) {
  T result;
  emulation::shuffle(mask, &value, &result, sizeof(T), emulation::Shuffle::exclusive_or, bits,
                     width, place);
  return result;
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32,
                 Place place = Place::current()) {
  T result;
  emulation::shuffle(mask, &value, &result, sizeof(T), emulation::Shuffle::up, delta, width, place);
  return result;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32,
                   Place place = Place::current()) {
  T result;
  emulation::shuffle(mask, &value, &result, sizeof(T), emulation::Shuffle::down, delta, width,
                     place);
  return result;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, Place place = Place::current()) {
  return emulation::ballot(mask, predicate != 0, place);
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

namespace gpu {

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         __nv_bfloat16, Place place = Place::current()) {
  emulation::mma_m16n8k16(d, a, b, emulation::Half::bf16, place);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half,
                         Place place = Place::current()) {
  emulation::mma_m16n8k16(d, a, b, emulation::Half::fp16, place);
}
inline void ldmatrix_x4(uint32_t (&d)[4], const void* row, Place place = Place::current()) {
  emulation::ldmatrix_x4(d, row, false, place);
}
inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row, Place place = Place::current()) {
  emulation::ldmatrix_x4(d, row, true, place);
}
inline void cp_async16(void* shared, const void* global, int valid_bytes,
                       Place place = Place::current()) {
  emulation::copy_async16(shared, global, valid_bytes, place);
}
inline void cp_async_commit() {
  emulation::commit_copies();
}
template <int Pending>
void cp_async_wait() {
  emulation::wait_copies(Pending);
}

inline uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = selector >> (4 * i) & 7;
    result |= static_cast<uint32_t>(bytes >> (8 * from) & 0xff) << (8 * i);
  }
  return result;
}
inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

/// Cuts up the dynamic shared memory of a launch, each piece aligned to 16 bytes.
class Carver {
 public:
  template <class T>
  T* take(int count) {
    return static_cast<T*>(
        emulation::dynamic_shared(next_++, sizeof(T) * static_cast<size_t>(count)));
  }

 private:
  int next_ = 0;
};

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   A&&... arguments) {
  const std::tuple<P...> values(static_cast<P>(arguments)...);
  const auto thread = [&](const emulation::Index& index) {
    threadIdx = {index.thread[0], index.thread[1], index.thread[2]};
    blockIdx = {index.block[0], index.block[1], index.block[2]};
  };
  const auto body = [&] { std::apply(kernel, values); };
  blockDim = block;
  gridDim = grid;
  emulation::run({{grid.x, grid.y, grid.z},
                  {block.x, block.y, block.z},
                  shared_bytes,
                  [](const void* f, const emulation::Index& index) {
                    (*static_cast<const decltype(thread)*>(f))(index);
                  },
                  &thread,
                  [](const void* f) { (*static_cast<const decltype(body)*>(f))(); },
                  &body});
  return cudaSuccess;
}

}  // namespace gpu
