/// Where the tests of the library's way to the kernels run: on CPU tensors with emulated kernels
/// (emulated_device.cpp), or on a GPU (../cuda_device).
#pragma once

#include <ATen/core/Tensor.h>

#include "src/ops/device_kernels.h"

namespace graft::testing {

at::Device test_device();

/// While it lives, operations on tensors of the test's device go through kernels, or (off) through
/// LibTorch's operators.
class OnDevice {
 public:
  explicit OnDevice(bool kernels = true);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  const ops::DeviceKernels* before_;
};

}  // namespace graft::testing
