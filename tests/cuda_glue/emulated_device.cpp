#include "src/ops/cuda/cuda_kernels.h"
#include "src/ops/cuda/device.h"
#include "tests/cuda_glue/device_under_test.h"

namespace graft::testing {
namespace {

int capability = 90;

}  // namespace

at::Device test_device() {
  return at::kCPU;
}

// A device too old for kernels is still a device.
OnDevice::OnDevice(bool kernels) : before_(ops::set_device_kernels(ops::cuda_kernels())) {
  capability = kernels ? 90 : 70;
}
OnDevice::~OnDevice() {
  ops::set_device_kernels(before_);
}

}  // namespace graft::testing

namespace graft::ops {

c10::DeviceType kernel_device_type() {
  return c10::DeviceType::CPU;
}
int compute_capability(const c10::Device&) {
  return testing::capability;
}
cudaStream_t current_stream(const c10::Device&) {
  return nullptr;
}
namespace {
// What is captured runs when it is replayed, as on a device; the calls that queue it, which a
// device has behind it then, are made again.
class Captured final : public CapturedWork {
 public:
  explicit Captured(std::function<void()> work) : work_(std::move(work)) {}
  void replay() override { work_(); }

 private:
  std::function<void()> work_;
};
}  // namespace

std::unique_ptr<CapturedWork> capture_work(const c10::Device&, const std::function<void()>& work) {
  return std::make_unique<Captured>(work);
}
const char* error_text(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "another error";
}

}  // namespace graft::ops
