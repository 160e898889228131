// The row-wise operations by LibTorch's own operators, for tensors on a device where no kernel
// takes the case. Formulas, types of the sums and roundings are those of the CPU's loops.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/ops/dropout.h>

#include <utility>

#include "device_kernels.h"

namespace graft::ops::aten {

// Word j of row r of a key's random numbers (graft/core/philox.h: counter (j / 4, r, site, step)),
// int64 in [0, 2^32): [rows, 4 blocks].  rows: int64 [rows].
at::Tensor philox_words(const at::Tensor& rows, int64_t blocks, const random::MaskKey& key);

at::Tensor dropout(const at::Tensor& x, const Dropout& dropout);
// The same for x [rows, columns] with the mask's rows given, int64 [rows].
at::Tensor dropout_rows(const at::Tensor& x, const at::Tensor& mask_rows, const Dropout& dropout);

// y and the rows' reciprocal norms.
std::pair<at::Tensor, at::Tensor> rms_norm(const at::Tensor& rows, const at::Tensor& weight,
                                           double eps);
at::Tensor rms_norm_backward(const at::Tensor& rows, const at::Tensor& weight,
                             const at::Tensor& reciprocal, const at::Tensor& dy);
at::Tensor rms_norm_weight_backward(const at::Tensor& rows, const at::Tensor& reciprocal,
                                    const at::Tensor& dy);

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);
std::pair<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& gate, const at::Tensor& up,
                                                  const at::Tensor& dy);

// x [batch, tokens, heads, d] turned by the angles, or back, in the same shape.
at::Tensor turn(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int sign);

// The rows' losses (fp64); with a gradient, logits becomes scale (softmax - onehot).
at::Tensor softmax_loss(const at::Tensor& logits, const at::Tensor& targets, bool with_gradient,
                        double scale);

// AdamW's update of one stretch (train/adamw.h).
void adamw(const AdamwStretch& stretch, const AdamwConstants& constants);

}  // namespace graft::ops::aten
