// Passes that a device repeats: the captured work, and the number that its dropout masks follow.
#include <atomic>

#include "arguments.h"
#include "cuda_kernels.h"

namespace graft::ops {
namespace {

// Of the process, not of a thread: backward passes run on threads of LibTorch's.
std::atomic<const uint32_t*> later_of_capture = nullptr;

class LaterScope {
 public:
  explicit LaterScope(const at::Tensor& later) {
    const uint32_t* none = nullptr;
    GRAFT_CHECK(later_of_capture.compare_exchange_strong(
                    none, reinterpret_cast<const uint32_t*>(later.const_data_ptr<int32_t>())),
                kCudaArea, "only one graph can be captured at a time");
  }
  ~LaterScope() { later_of_capture = nullptr; }
  LaterScope(const LaterScope&) = delete;
  LaterScope& operator=(const LaterScope&) = delete;
};

class CudaGraph final : public DeviceGraph {
 public:
  CudaGraph(const at::Device& device, const std::function<void()>& work)
      : later_(at::zeros({1}, at::TensorOptions(device).dtype(at::kInt))),
        work_(capture_work(device, [later = later_, work] {
          const LaterScope scope(later);
          work();
        })) {}

  void replay(uint32_t later) override {
    later_.fill_(static_cast<int32_t>(later));
    work_->replay();
  }

 private:
  at::Tensor later_;
  std::unique_ptr<CapturedWork> work_;
};

}  // namespace

const uint32_t* later_steps() {
  return later_of_capture;
}

std::unique_ptr<DeviceGraph> CudaKernels::capture(const at::Device& device,
                                                  const std::function<void()>& work) const {
  return std::make_unique<CudaGraph>(device, work);
}

}  // namespace graft::ops
