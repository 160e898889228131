// A block with a mixture whose factors are all random, and a formula to hold it to.
#pragma once

#include <graft/moe/mix_lora.h>
#include <graft/ops/dropout.h>

#include "tests/support/gradcheck.h"

namespace graft::testing {

constexpr int64_t kHidden = 6, kIntermediate = 10;

inline adapters::LayerContext block_context() {
  return {.name = "", .seed = 5};
}

inline void fill_random(const std::vector<at::Tensor>& tensors, double deviation = 0.5) {
  const at::NoGradGuard no_grad;
  for (at::Tensor tensor : tensors) tensor.normal_(0.0, deviation);
}

/// A block whose weights, biases and experts are random.
struct MixtureBlock {
  MixtureBlock(moe::MixLoraOptions options, bool bias, at::ScalarType type = at::kDouble,
               uint64_t seed = 2)
      : block(kHidden, kIntermediate, bias) {
    at::manual_seed(seed);
    fill_random(block->parameters());
    block->to(type);
    mixture = moe::add_mixture(*block, options, block_context());
    fill_random(mixture->parameters());
    if (options.experts.dora) {
      const at::NoGradGuard no_grad;
      for (auto& layer : {mixture->gate_proj, mixture->up_proj, mixture->down_proj})
        layer->lora_magnitude_vector.abs_().add_(0.5);
    }
  }

  NamedTensors leaves() const {
    NamedTensors list;
    for (const auto& item : mixture->named_parameters())
      list.emplace_back(item.key(), item.value());
    return list;
  }

  nn::GatedMlp block;
  moe::MixLora mixture{nullptr};
};

/// One layer's output for one row and expert (-1: none), as the formula says.
inline at::Tensor plain_layer(const nn::FrozenLinear& base, const moe::ExpertProjectionImpl& terms,
                              double scale, int64_t expert, const at::Tensor& x,
                              const at::Tensor& dropped) {
  at::Tensor y = base.weight.mv(x);
  if (expert >= 0) {
    const at::Tensor A = terms.lora_A[expert], B = terms.lora_B[expert];
    y = y + scale * B.mv(A.mv(dropped));
    if (terms.lora_magnitude_vector.defined()) {
      const at::Tensor norm = (base.weight + scale * B.mm(A)).detach().norm(2, 1);
      y = y * (terms.lora_magnitude_vector[expert] / norm);
    }
  }
  return base.bias.defined() ? y + base.bias : y;
}

/// The whole mixture, token by token and expert by expert. `keys`: of the three layers' masks.
inline at::Tensor plain_mixture(const MixtureBlock& m, const at::Tensor& x,
                                const moe::Routing& routing,
                                const std::vector<random::MaskKey>& keys) {
  const nn::FrozenGatedMlp base = m.block->frozen();
  const moe::MixLoraImpl& mixture = *m.mixture;
  const double scale = mixture.options.experts.scale();
  const int64_t slots = routing.experts.size(1);
  // Row `pair` of a layer's mask, applied to a vector.
  const auto drop = [&](int layer, int64_t pair, const at::Tensor& v) {
    if (keys.empty()) return v;
    const at::Tensor ones = at::ones({x.size(0) * slots, v.size(0)}, v.options());
    return v * ops::apply_dropout(ones, {mixture.options.experts.dropout, keys[layer]})[pair];
  };
  const auto expert_output = [&](int64_t t, int64_t pair, int64_t expert) {
    const at::Tensor h1 = plain_layer(base.gate, *mixture.gate_proj, scale, expert, x[t],
                                      drop(0, pair, x[t])),
                     h3 = plain_layer(base.up, *mixture.up_proj, scale, expert, x[t],
                                      drop(1, pair, x[t]));
    const at::Tensor z = at::silu(h1) * h3;
    return plain_layer(base.down, *mixture.down_proj, scale, expert, z, drop(2, pair, z));
  };
  std::vector<at::Tensor> outputs;
  for (int64_t t = 0; t < x.size(0); ++t) {
    at::Tensor y;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t expert = routing.experts[t][slot].item<int64_t>();
      if (expert < 0) continue;
      const at::Tensor o = routing.weights[t][slot] * expert_output(t, t * slots + slot, expert);
      y = y.defined() ? y + o : o;
    }
    outputs.push_back(y.defined() ? y : expert_output(t, t * slots, -1));
  }
  return outputs.empty() ? x.clone() : at::stack(outputs);
}

}  // namespace graft::testing
