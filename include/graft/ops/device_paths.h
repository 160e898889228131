/// Which way operations on a CUDA device went: through graft's kernels or through LibTorch's own.
///
/// For tensors on a CUDA device every operation either launches a kernel of `cuda/` or computes the
/// same formula with LibTorch's operators. The choice follows from types and sizes alone
/// (src/ops/cuda_dispatch.h holds the table) and is counted, so that a program can tell what it
/// ran.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>
#include <vector>

namespace graft::ops {

/// How often an operation went one way.
struct DevicePath {
  std::string operation;
  std::string reason;  ///< why LibTorch computed it; empty: a kernel of graft's did
  int64_t count = 0;
};

/// Whether this build has the kernels.
bool built_with_kernels();

/// The device's compute capability, 90 for 9.0; 0 where this build has no kernels for it.
int device_capability(const c10::Device& device);

/// Every way taken since the start or the last reset, by operation; kernels first.
std::vector<DevicePath> device_paths();
void reset_device_paths();

/// One line a way: "rms_norm: 61 by graft's kernel". Empty where nothing ran on a device.
std::string describe_device_paths();

}  // namespace graft::ops
