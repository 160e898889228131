/// Where the programs compute.
#pragma once

#include <c10/core/Device.h>

#include <string>

namespace graft::trainer {

/// The device of that name, "cpu" or "cuda", ready for use. LibTorch's CUDA part is loaded here and
/// not before, so that one program serves machines with and without a GPU. Throws, in one line,
/// for a build without kernels, a machine without a device, and a device older than compute
/// capability 8.0.
at::Device open_device(const std::string& name);

}  // namespace graft::trainer
