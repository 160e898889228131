#include "examples/trainer/device.h"

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <dlfcn.h>
#include <graft/core/error.h>
#include <graft/ops/device_paths.h>

namespace graft::trainer {
namespace {

constexpr const char* kArea = "device";
constexpr int kLeastCapability = 80;

// Must come before LibTorch asks for CUDA for the first time: it remembers the answer.
void load_libtorch_cuda() {
  if (dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) != nullptr) return;
  const char* reason = dlerror();
  fail(kArea, concat("LibTorch's CUDA part must load; got '",
                     reason != nullptr ? reason : "no reason", "'"));
}

}  // namespace

at::Device open_device(const std::string& name) {
  if (name == "cpu") return at::kCPU;
  GRAFT_CHECK(
      ops::built_with_kernels(), kArea,
      "this build computes on the CPU only (the CMake preset cuda builds the kernels); got ",
      "--device ", name);
  load_libtorch_cuda();
  const auto devices = at::detail::getCUDAHooks().deviceCount();
  GRAFT_CHECK(devices > 0, kArea, "there must be a CUDA device; got none for --device ", name);
  const at::Device device(at::kCUDA, 0);
  const int capability = ops::device_capability(device);
  GRAFT_CHECK(capability >= kLeastCapability, kArea,
              "the device's compute capability must be at least 8.0; got ", capability / 10, ".",
              capability % 10);
  return device;
}

}  // namespace graft::trainer
