// Kernel or LibTorch: the table of cases for tensors on a device, in plain C++.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

#include "device_kernels.h"

namespace graft::ops {

enum class DeviceOp {
  lora_linear,
  dora_linear,
  dora_norm,
  dropout,
  rms_norm,
  swiglu,
  rope,
  cross_entropy,
  adamw,
  grad_norm,
  experts,  // rows grouped by expert
  router,
  sparse,
  lora_group,  // linear layers of one input
};
constexpr int kDeviceOps = 14;
std::string_view device_op_name(DeviceOp op);

// One call of an operation.
struct DeviceCase {
  DeviceOp op;
  at::ScalarType type;  // of the numbers that the kernel reads most of
  int64_t rows = 0, columns = 0;
  int64_t rank = 0;      // low-rank operations alone
  bool one_type = true;  // the other operands have that type too, or are converted cheaply
  bool plain = true;     // none of the operation's options that kernels do not have
};

// What there is to run kernels: compute capability 8.6 is 86; 0 without kernels.
struct DeviceAbility {
  bool built = false;
  int capability = 0;
};

// Empty: a kernel takes the case. Else why it does not, in words for a reader of --verbose.
std::string_view fallback_reason(const DeviceCase& call, const DeviceAbility& ability);

// Whether x goes to kernels or LibTorch's operators instead of the CPU's loops.
bool on_device(const at::Tensor& x);

// The kernels that take the case for tensors of this device, or null where LibTorch computes it.
// Counts the answer.
const DeviceKernels* kernels_for(const DeviceCase& call, const at::Device& device);

// Refuses tensors that are not all on one device; undefined ones are passed over.
void check_one_device(const char* area, std::initializer_list<at::Tensor> tensors);

}  // namespace graft::ops
