// The rows of experts on a device: graft's kernels where they take the case, else LibTorch's
// operators (aten_experts.h). DeviceKernels has the formulas. On kernels wide matrices keep the
// type of the activations; LibTorch computes in the factors' type. Hidden matrices have at least
// fp32 on both ways.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/ops/dropout.h>
#include <graft/ops/expert_rows.h>

#include <utility>

#include "device_kernels.h"

namespace graft::ops::device {

at::Tensor expert_shrink(const at::Tensor& x, const ExpertFactor& factor, double scale,
                         const Dropout& dropout, const ExpertRows& rows);
// base: what the product is added to, or undefined; its type, or `type`, is that of the kernel's
// matrices.
at::Tensor expert_expand(const at::Tensor& hidden, const ExpertFactor& factor, double scale,
                         const Dropout& dropout, const at::Tensor& base, at::ScalarType type,
                         const ExpertRows& rows);
// In the type of the masters.
at::Tensor expert_outer(const at::Tensor& hidden, const at::Tensor& x, bool tall, double scale,
                        const Dropout& dropout, at::ScalarType master, const ExpertRows& rows);

at::Tensor gather_rows(const at::Tensor& tokens, const ExpertRows& rows);
// weights: undefined for ones.
at::Tensor combine_rows(const at::Tensor& values, const at::Tensor& weights,
                        const ExpertRows& rows);
std::pair<at::Tensor, at::Tensor> combine_rows_backward(const at::Tensor& values,
                                                        const at::Tensor& weights,
                                                        const at::Tensor& gradient,
                                                        const ExpertRows& rows);
// The slots by their group.  groups: int64 [slots], in [0, count]; `count` is no group.
SlotOrder slot_order(const at::Tensor& groups, int64_t count);

}  // namespace graft::ops::device
