#include "device.h"

#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "arguments.h"

namespace graft::ops {

c10::DeviceType kernel_device_type() {
  return c10::DeviceType::CUDA;
}

int compute_capability(const c10::Device& device) {
  int major = 0, minor = 0;
  check_launch(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()),
               "compute capability");
  check_launch(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()),
               "compute capability");
  return 10 * major + minor;
}

cudaStream_t current_stream(const c10::Device& device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

const char* error_text(cudaError_t error) {
  return cudaGetErrorString(error);
}

}  // namespace graft::ops
