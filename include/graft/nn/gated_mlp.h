/// The gated feed-forward block of Llama's family, with a place for a mixture of experts.
#pragma once

#include <graft/nn/frozen_layer.h>
#include <graft/nn/linear.h>
#include <torch/nn/modules/common.h>

#include <memory>

namespace graft::nn {

/// A block as a mixture sees it: its three layers' weights.
struct FrozenGatedMlp {
  FrozenLinear gate, up, down;
};

/// What can stand in for a block's forward: moe/mix_lora.h.
class MlpMixture : public torch::nn::Module {
 public:
  using torch::nn::Module::Module;

  /// The whole adapted output.  x: [..., tokens, hidden]; valid: bool [..., tokens], false for
  /// padding, or undefined.
  virtual at::Tensor apply(const FrozenGatedMlp& base, const at::Tensor& x,
                           const at::Tensor& valid) = 0;
};

/// y = down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), with the state-dict keys of
/// Llama's MLP: gate_proj.weight, up_proj.weight, down_proj.weight (and biases).
class GatedMlpImpl : public torch::nn::Module {
 public:
  GatedMlpImpl(int64_t hidden, int64_t intermediate, bool bias = false);

  /// x: [..., hidden]; returns its shape. `valid` (bool, one value a token) is heard by a mixture
  /// alone. Throws when a mixture and adapters on one of the three layers are both at work.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& valid = {});

  /// Puts a mixture in, as the child `mixture`; throws when there is one.
  void set_mixture(std::shared_ptr<MlpMixture> mixture);
  /// Takes it out again; nothing happens when there is none.
  void remove_mixture();
  /// The mixture, or null.
  const std::shared_ptr<MlpMixture>& mixture() const { return mixture_; }
  /// The three layers' weights.
  FrozenGatedMlp frozen() const;

  Linear gate_proj{nullptr}, up_proj{nullptr}, down_proj{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(at::Tensor())})

 private:
  std::shared_ptr<MlpMixture> mixture_;
};
TORCH_MODULE(GatedMlp);

}  // namespace graft::nn
