/// Linear layers of one input, each with a low-rank term, as one differentiable operation: q, k and
/// v of an attention, gate and up of a feed-forward block.
///
///   y_i = x W_i^T + b_i + s_i (drop_i(x) A_i^T) B_i^T
///   dx = sum_i (dY_i W_i + mask_i(dS_i A_i)),   dS_i = s_i dY_i B_i,   dA_i = dS_i^T drop_i(x)
///
/// Apart, each layer reads x for its product with A_i and again for dA_i, and writes a dx that
/// autograd then adds to the others'. On a device with kernels (docs/kernels.md) dx is summed where
/// it lies, and without dropout the A_i stand side by side in one product, which reads x once.
/// Masks are a layer's own, so with dropout those products stay apart.
#pragma once

#include <graft/ops/lora_linear.h>

#include <vector>

namespace graft::ops {

/// A frozen linear layer and its term.
struct LoraLayer {
  at::Tensor weight;  ///< [out, in]
  at::Tensor bias;    ///< [out], or undefined
  LoraTerm term;
};

/// x: [..., in]; returns each layer's [..., out]. What `lora_linear` returns for each of them,
/// which also computes every case that kernels do not take: on the CPU, terms with a bias, a gate
/// or a factor, a trained weight or bias.
std::vector<at::Tensor> lora_linear_group(const at::Tensor& x,
                                          const std::vector<LoraLayer>& layers);

}  // namespace graft::ops
