// What the glue needs of CUDA's run-time library: all of it, so that the tests can put an emulator
// in its place.
#pragma once

#include <c10/core/Device.h>
#include <driver_types.h>

namespace graft::ops {

c10::DeviceType kernel_device_type();
// Compute capability 9.0 is 90.
int compute_capability(const c10::Device& device);
// The stream that LibTorch's own operators use at this moment, also while a graph is captured.
cudaStream_t current_stream(const c10::Device& device);
const char* error_text(cudaError_t error);

}  // namespace graft::ops
