#include <ATen/ATen.h>

#include "examples/trainer/device.h"
#include "tests/cuda_glue/device_under_test.h"

namespace graft::testing {

at::Device test_device() {
  static const at::Device device = trainer::open_device("cuda");
  return device;
}

OnDevice::OnDevice(bool kernels) : before_(ops::device_kernels()) {
  test_device();
  if (!kernels) ops::set_device_kernels(nullptr);
}
OnDevice::~OnDevice() {
  ops::set_device_kernels(before_);
}

}  // namespace graft::testing
