#include "lora_device.h"

#include <ATen/ATen.h>
#include <graft/ops/dora_linear.h>
#include <graft/ops/frozen_product.h>

#include "cuda_dispatch.h"

namespace graft::ops {
namespace {

const DeviceKernels* kernels_of(DeviceOp op, const at::Tensor& rows, const LowRankLayer& layer,
                                bool plain) {
  if (!on_device(rows)) return nullptr;
  return kernels_for({.op = op,
                      .type = rows.scalar_type(),
                      .rows = rows.size(0),
                      .columns = std::max(layer.weight.size(0), layer.weight.size(1)),
                      .rank = layer.A.size(0),
                      .one_type = layer.A.scalar_type() != at::kDouble,
                      .plain = plain},
                     rows.device());
}

// The gate for the columns of hidden matrices, which are zero behind the rank.
at::Tensor times_gate(const at::Tensor& hidden, const LowRankLayer& layer) {
  if (!layer.gate.defined()) return hidden;
  at::Tensor gate = layer.gate;
  if (!layer.ranks.empty()) {
    std::vector<at::Tensor> units;
    std::vector<int64_t> shape = gate.sizes().vec();
    for (size_t e = 0; e < layer.ranks.size(); ++e) {
      shape.back() = layer.ranks[e];
      units.push_back(gate.narrow(-1, static_cast<int64_t>(e), 1).expand(shape));
    }
    gate = at::cat(units, -1);
  }
  const at::Tensor padded = at::constant_pad_nd(gate, {0, hidden.size(1) - gate.size(-1)}, 0);
  return (hidden * padded).to(hidden.scalar_type());
}

// p * B, one factor an output row.
at::Tensor output_factor(const LowRankLayer& layer) {
  return layer.factor.defined() ? layer.B * layer.factor.unsqueeze(1) : layer.B;
}

at::Tensor total_bias(const LowRankLayer& layer) {
  if (!layer.lora_bias.defined()) return layer.bias;
  const at::Tensor term = layer.lora_bias * layer.scale;
  return layer.bias.defined() ? layer.bias + term : term;
}

// dx = mask(dS A) + dz W
at::Tensor input_gradient(const DeviceKernels& kernels, const at::Tensor& dz, const at::Tensor& dS,
                          const LowRankLayer& layer) {
  const at::Tensor dx =
      kernels.lora_expand(dS, wide(layer.A, dz.scalar_type()), 1.0, layer.dropout, {});
  add_frozen_product_backward(dx, dz, layer.weight);
  return dx;
}

}  // namespace

const DeviceKernels* lora_kernels(const at::Tensor& rows, const LowRankLayer& layer) {
  return kernels_of(DeviceOp::lora_linear, rows, layer, /*plain=*/true);
}

const DeviceKernels* dora_kernels(const at::Tensor& rows, const LowRankLayer& layer,
                                  bool dropout_on_base) {
  return kernels_of(DeviceOp::dora_linear, rows, layer, !dropout_on_base);
}

LayerOutput lora_forward(const DeviceKernels& kernels, const at::Tensor& rows,
                         const LowRankLayer& layer) {
  const auto type = rows.scalar_type();
  const at::Tensor H = kernels.lora_shrink(rows, wide(layer.A, type), 1.0, layer.dropout);
  const at::Tensor y = kernels.lora_expand(times_gate(H, layer), tall(output_factor(layer), type),
                                           layer.scale, {}, {.bias = total_bias(layer)});
  add_frozen_product(y, rows, layer.weight);
  return {y, H, {}};
}

LayerOutput dora_forward(const DeviceKernels& kernels, const at::Tensor& rows,
                         const LowRankLayer& layer, bool keep_z) {
  const auto type = rows.scalar_type();
  const at::Tensor H = kernels.lora_shrink(rows, wide(layer.A, type), 1.0, layer.dropout);
  const at::Tensor base = frozen_product(rows, layer.weight);  // becomes z in place
  const at::Tensor y = kernels.lora_expand(H, tall(layer.B, type), layer.scale, {},
                                           {.base = base,
                                            .column_scale = dora_scale(layer.magnitude, layer.norm),
                                            .bias = layer.bias,
                                            .unscaled = keep_z ? base : at::Tensor()});
  return {y, H, keep_z ? base : at::Tensor()};
}

LayerGradients lora_backward(const DeviceKernels& kernels, const at::Tensor& dy,
                             const at::Tensor& rows, const at::Tensor& H, const LowRankLayer& layer,
                             const LayerWanted& wanted) {
  const auto type = dy.scalar_type(), master = layer.A.scalar_type();
  const at::Tensor B = output_factor(layer).detach().to(type);
  LayerGradients result;
  result.dz = dy;
  at::Tensor U;  // s dY (p * B)
  if (wanted.B || wanted.factor) {
    at::Tensor dB;
    std::tie(U, dB) = kernels.lora_backward(dy, times_gate(H, layer), B, layer.scale);
    dB = dB.to(master);
    if (wanted.factor) result.factor = (dB * layer.B).sum(1);
    if (wanted.B) result.B = layer.factor.defined() ? dB * layer.factor.unsqueeze(1) : dB;
  } else if (wanted.A || wanted.gate || wanted.x) {
    U = kernels.lora_shrink(dy, {B, true}, layer.scale, {});
  }
  if (wanted.gate) result.gate = (U.to(master) * H.to(master)).narrow(1, 0, layer.A.size(0));
  if (!wanted.A && !wanted.x) return result;
  const at::Tensor dS = times_gate(U, layer);
  if (wanted.A)
    result.A = kernels.lora_outer(dS, rows, layer.A.size(0), /*tall=*/false, 1.0, layer.dropout)
                   .to(master);
  if (wanted.x) result.x = input_gradient(kernels, dy, dS, layer);
  return result;
}

LayerGradients dora_backward(const DeviceKernels& kernels, const at::Tensor& dy,
                             const at::Tensor& rows, const at::Tensor& H, const at::Tensor& z,
                             const LowRankLayer& layer, const LayerWanted& wanted) {
  const at::Tensor c = dora_scale(layer.magnitude, layer.norm);
  at::Tensor dz, dm;
  if (wanted.magnitude)
    std::tie(dz, dm) = kernels.dora_backward(dy, z, c, layer.norm);
  else
    dz = (dy * c).to(dy.scalar_type());
  LayerGradients result = lora_backward(kernels, dz, rows, H, layer, wanted);
  if (wanted.magnitude) result.magnitude = dm.to(layer.magnitude.scalar_type());
  return result;
}

}  // namespace graft::ops
