/// The few things that kernels need besides plain CUDA C++, each a thin name over one instruction.
///
/// Kernels hold no conditional code: under nvcc the names below are PTX, under any other compiler
/// they are the emulator of tests/cuda_emulation, which runs the same text on the CPU. Shared
/// memory is declared through GPU_SHARED (or cut from the launch's by gpu::Carver), so that the
/// emulator can put guard bands around it.
#pragma once

#if !defined(__CUDACC__)
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define GPU_DEVICE __device__ __forceinline__
/// GPU_SHARED(float, sums, [4][64]);
#define GPU_SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__

namespace gpu {

/// d += a b for fragments of a 16 x 16, a 16 x 8 and a 16 x 8 tile. The last argument names the
/// type.
GPU_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
GPU_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// 16 bytes from device to shared memory in the background: the first `valid_bytes`, zeros after.
GPU_DEVICE void cp_async16(void* shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid_bytes)
               : "memory");
}
GPU_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
GPU_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/// Bytes 0-3 are low's, 4-7 high's; each hexadecimal digit of the selector picks one.
GPU_DEVICE uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}
GPU_DEVICE float float_of_bits(uint32_t bits) {
  return __uint_as_float(bits);
}
GPU_DEVICE uint32_t bits_of_float(float value) {
  return __float_as_uint(value);
}

/// Cuts up the dynamic shared memory of a launch, each piece aligned to 16 bytes.
class Carver {
 public:
  template <class T>
  GPU_DEVICE T* take(int count) {
    extern __shared__ __align__(128) unsigned char memory[];
    T* piece = reinterpret_cast<T*>(memory + used_);
    used_ += (static_cast<unsigned>(sizeof(T)) * count + 15u) / 16u * 16u;
    return piece;
  }

 private:
  unsigned used_ = 0;
};

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, A&&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

}  // namespace gpu

#endif
