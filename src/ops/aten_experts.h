// The rows of experts by LibTorch's own operators, for tensors on a device where no kernel takes
// the case. Nothing waits for the device: whose factor a row meets is decided there, by products
// with all experts' factors side by side, of which a row keeps its own expert's block. (A NaN in a
// row therefore reaches the gradients of all experts; on the CPU and in kernels, of its own alone.)
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/ops/dropout.h>
#include <graft/ops/expert_rows.h>

#include <utility>

#include "device_kernels.h"

namespace graft::ops::aten {

// The expert of each row; E: none.  int64 [M].
at::Tensor expert_of_rows(const ExpertRows& rows);

// As the functions of DeviceKernels of these names, all operands of one type, fp32 or fp64.
at::Tensor expert_shrink(const at::Tensor& x, const ExpertFactor& factor, double scale,
                         const Dropout& dropout, const ExpertRows& rows);
at::Tensor expert_expand(const at::Tensor& hidden, const ExpertFactor& factor, double scale,
                         const Dropout& dropout, const at::Tensor& base, const ExpertRows& rows);
at::Tensor expert_outer(const at::Tensor& hidden, const at::Tensor& x, bool tall, double scale,
                        const Dropout& dropout, const ExpertRows& rows);
at::Tensor combine_rows(const at::Tensor& values, const at::Tensor& weights,
                        const ExpertRows& rows);
std::pair<at::Tensor, at::Tensor> combine_rows_backward(const at::Tensor& values,
                                                        const at::Tensor& weights,
                                                        const at::Tensor& gradient,
                                                        const ExpertRows& rows);
SlotOrder slot_order(const at::Tensor& groups, int64_t count);

}  // namespace graft::ops::aten
