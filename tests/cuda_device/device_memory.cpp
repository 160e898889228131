// The emulator's memory interface on a GPU. Orders of execution are the hardware's: running a
// kernel once for each still shows whether its bits depend on chance.
#include <cuda_runtime_api.h>

#include <stdexcept>

#include "memory.h"
#include "scheduler.h"

namespace emulation {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace

void set_order(int) {}

void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes == 0 ? 16 : bytes));
  check(cudaMemset(memory, 0xff, bytes == 0 ? 16 : bytes));  // NaN, as in the emulator
  return memory;
}

void release(void* memory) {
  cudaFree(memory);
}

void upload(void* device, const void* host, size_t bytes) {
  check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
}

// Waits for the kernels before it, and reports what went wrong in them.
void download(void* host, const void* device, size_t bytes) {
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
}

}  // namespace emulation
