// What the glue needs of CUDA's run-time library: all of it, so that the tests can put an emulator
// in its place.
#pragma once

#include <c10/core/Device.h>
#include <driver_types.h>

#include <functional>
#include <memory>

namespace graft::ops {

c10::DeviceType kernel_device_type();
// Compute capability 9.0 is 90.
int compute_capability(const c10::Device& device);
// The stream that LibTorch's own operators use at this moment, also while a graph is captured.
cudaStream_t current_stream(const c10::Device& device);
const char* error_text(cudaError_t error);

// What a call queued, to be queued again. Its memory is its own until it goes.
class CapturedWork {
 public:
  virtual ~CapturedWork() = default;
  virtual void replay() = 0;  // on the current stream
};
// Calls `work` once; what it queues for the device is written down and not run.
std::unique_ptr<CapturedWork> capture_work(const c10::Device& device,
                                           const std::function<void()>& work);

}  // namespace graft::ops
