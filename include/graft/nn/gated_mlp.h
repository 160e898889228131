/// The gated feed-forward block of Llama's family, with a place for adapters of the whole block.
#pragma once

#include <graft/nn/frozen_layer.h>
#include <graft/nn/linear.h>
#include <torch/nn/modules/common.h>

#include <memory>

namespace graft::nn {

class AdapterSlot;

/// y = down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), with the state-dict keys of
/// Llama's MLP: gate_proj.weight, up_proj.weight, down_proj.weight (and biases).
class GatedMlpImpl : public torch::nn::Module {
 public:
  GatedMlpImpl(int64_t hidden, int64_t intermediate, bool bias = false);
  /// Of layers that are there already.
  GatedMlpImpl(Linear gate, Linear up, Linear down);

  /// x: [..., hidden]; returns its shape. `valid`: bool [..., tokens], false for padding; it is
  /// heard by adapters of the block (mixtures) alone. Throws when those and adapters on one of the
  /// three layers are both at work.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& valid = {});

  /// The three layers' weights.
  FrozenGatedMlp frozen() const;

  Linear gate_proj{nullptr}, up_proj{nullptr}, down_proj{nullptr};
  /// Adapters of the whole block (moe/mix_lora.h); null: none.
  std::shared_ptr<AdapterSlot> slot;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(at::Tensor())})
};
TORCH_MODULE(GatedMlp);

}  // namespace graft::nn
