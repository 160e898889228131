// The two passes of lora_linear and dora_linear on a device's kernels.
//
// Everything wide has x's type; A and B are rounded to it, and every sum runs in fp32. The term is
// written first and the frozen product accumulates onto it (one write and no second rounding of the
// product), so only DoRA, which rescales the product, reads it back. Base products are LibTorch's
// (at::mm and addmm_, hence cuBLAS with its choice of algorithm): frozen_product.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/ops/dropout.h>

#include <vector>

#include "device_kernels.h"

namespace graft::ops {

// The operands of one layer; what is not defined is not there.
struct LowRankLayer {
  at::Tensor weight, bias, A, B;
  at::Tensor lora_bias = {}, gate = {}, factor = {};  // LoRA
  at::Tensor magnitude = {}, norm = {};               // DoRA
  double scale = 1;
  Dropout dropout = {};
  std::vector<int64_t> ranks =
      {};  // LoraTerm::ranks: of the groups that share a number of the gate
};

// A and B as the kernels take them.
inline LowRankFactor wide(const at::Tensor& A, at::ScalarType type) {
  return {A.detach().to(type), false};
}
inline LowRankFactor tall(const at::Tensor& B, at::ScalarType type) {
  return {B.detach().to(type), true};
}

// The kernels for the layer and rows [t, in], or null: LibTorch computes it, or the CPU's loops do.
const DeviceKernels* lora_kernels(const at::Tensor& rows, const LowRankLayer& layer);
const DeviceKernels* dora_kernels(const at::Tensor& rows, const LowRankLayer& layer,
                                  bool dropout_on_base);

struct LayerOutput {
  at::Tensor y;       // [t, out]
  at::Tensor hidden;  // H [t, padded rank], for backward
  at::Tensor z;       // DoRA: the output before c and b, where it is asked for
};
LayerOutput lora_forward(const DeviceKernels& kernels, const at::Tensor& rows,
                         const LowRankLayer& layer);
LayerOutput dora_forward(const DeviceKernels& kernels, const at::Tensor& rows,
                         const LowRankLayer& layer, bool keep_z);

struct LayerWanted {
  bool x = false, A = false, B = false, gate = false, factor = false, magnitude = false;
};
struct LayerGradients {
  at::Tensor x, A, B, factor, magnitude;
  at::Tensor gate;  // of each token and unit, [t, r]: U * H
  at::Tensor dz;    // the gradient of x W^T + ...: dY, or DoRA's c dY
};
// rows: needed for dA alone.
LayerGradients lora_backward(const DeviceKernels& kernels, const at::Tensor& dy,
                             const at::Tensor& rows, const at::Tensor& hidden,
                             const LowRankLayer& layer, const LayerWanted& wanted);
LayerGradients dora_backward(const DeviceKernels& kernels, const at::Tensor& dy,
                             const at::Tensor& rows, const at::Tensor& hidden, const at::Tensor& z,
                             const LowRankLayer& layer, const LayerWanted& wanted);

}  // namespace graft::ops
