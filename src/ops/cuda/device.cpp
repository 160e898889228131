#include "device.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <exception>

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

namespace {

// No number that LibTorch gives its own pools.
c10::MempoolId_t new_pool() {
  static std::atomic<c10::CaptureId_t> next = c10::CaptureId_t{1} << 62;
  return {0, next++};
}

// The steps of LibTorch's own at::cuda::CUDAGraph, which would need libtorch_cuda at start-up.
class Captured final : public CapturedWork {
 public:
  Captured(const c10::Device& device, const std::function<void()>& work)
      : device_(device.index()), pool_(new_pool()) {
    const c10::cuda::CUDAGuard on_device(device_);
    check_launch(cudaDeviceSynchronize(), "capture");  // the stream below waits for no other
    const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool(false, device_);
    const c10::cuda::CUDAStreamGuard on_stream(stream);
    auto* allocator = c10::cuda::CUDACachingAllocator::get();
    allocator->beginAllocateToPool(
        device_, pool_, [own = stream.stream()](cudaStream_t any) { return any == own; });
    cudaError_t error = cudaStreamBeginCapture(stream.stream(), cudaStreamCaptureModeGlobal);
    std::exception_ptr failure;
    if (error == cudaSuccess) {
      try {
        work();
      } catch (...) {
        failure = std::current_exception();
      }
      error = cudaStreamEndCapture(stream.stream(), &graph_);
    }
    allocator->endAllocateToPool(device_, pool_);
    if (!failure && error == cudaSuccess)
      error = cudaGraphInstantiateWithFlags(&program_, graph_, 0);
    if (!failure && error == cudaSuccess) return;
    release();
    if (failure) std::rethrow_exception(failure);
    check_launch(error, "capture");
  }
  ~Captured() override {
    const c10::cuda::CUDAGuard on_device(device_);
    (void)cudaDeviceSynchronize();  // a replay may be under way
    release();
  }
  Captured(const Captured&) = delete;
  Captured& operator=(const Captured&) = delete;

  void replay() override {
    const c10::cuda::CUDAGuard on_device(device_);
    check_launch(cudaGraphLaunch(program_, c10::cuda::getCurrentCUDAStream(device_).stream()),
                 "graph");
  }

 private:
  void release() {
    if (program_ != nullptr) (void)cudaGraphExecDestroy(program_);
    if (graph_ != nullptr) (void)cudaGraphDestroy(graph_);
    c10::cuda::CUDACachingAllocator::get()->releasePool(device_, pool_);
  }

  c10::DeviceIndex device_;
  c10::MempoolId_t pool_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t program_ = nullptr;
};

}  // namespace

std::unique_ptr<CapturedWork> capture_work(const c10::Device& device,
                                           const std::function<void()>& work) {
  return std::make_unique<Captured>(device, work);
}

}  // namespace graft::ops
