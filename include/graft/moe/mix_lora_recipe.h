/// MixLoRA on a whole model: mixtures in its gated feed-forward blocks, LoRA on the other layers
/// that the targets choose (attention's).
///
///   auto adapter = graft::attach(*model, graft::moe::MixLoraAdapterOptions{});
///   at::Tensor loss = model->loss(tokens);
///   (loss + adapter.penalty()).backward();         // coefficient * balance loss of that pass
///
/// Targets gate_proj, up_proj and down_proj mean their block's mixture; a block needs all three.
/// Attention is left alone when the targets leave it out.
///
/// Files are those of MoE-PEFT and the mixlora package (peft_type MIXLORA): adapter_config.json and
/// tensors "mixlora.layers.0.mlp.moe_gate.weight", as safetensors, or as the pickled
/// adapter_model.bin that those read. What they leave out (training's options, magnitudes of DoRA
/// experts) goes into keys that they ignore.
#pragma once

#include <graft/adapters/recipe.h>
#include <graft/moe/balance_loss.h>
#include <graft/moe/mix_lora.h>

#include <optional>
#include <string>

namespace graft::moe {

/// Rank, alpha and dropout of attention's LoRA where they are not the experts'.
struct AttentionOptions {
  int64_t rank = 16;     ///< r, in [1, min(in, out)]
  double alpha = 32.0;   ///< numerator of the scale; not 0
  double dropout = 0.0;  ///< in [0, 1)
};

/// What is added to the loss: coefficient * balance loss + z_coefficient * z loss.
struct BalancePenalty {
  double coefficient = 0.01;   ///< at least 0 [router_aux_loss_coef]
  std::string of = "mixlora";  ///< whose normalisation: a name of `balance_of` [router_aux_loss]
  /// How layers become one number: mean, sum, pooled [router_aux_loss_reduction]
  Reduction reduction = Reduction::mean;
  double z_coefficient = 0.0;  ///< at least 0 [router_z_loss_coef]

  /// The loss that is meant.
  BalanceOptions resolved() const;
};

/// Options of MixLoRA.
struct MixLoraAdapterOptions {
  using Method = MixLoraImpl;

  /// Router, experts and path of the blocks. Attention has its rslora, dora and init too.
  MixLoraOptions mixture = {};
  std::optional<AttentionOptions> attention = {};  ///< unset: the experts' rank, alpha, dropout
  BalancePenalty balance = {};

  /// Attention's rank, alpha and dropout in force.
  AttentionOptions resolved_attention() const;
  /// Throws unless every option is in its range.
  void validate() const;
};

/// The built-in list's entry.
adapters::MethodEntry mixlora_entry();

}  // namespace graft::moe

namespace graft::adapters {

/// MixLoRA makes adapters of two kinds, so it has a recipe of its own.
template <>
class RecipeOf<moe::MixLoraImpl> final : public Recipe {
 public:
  explicit RecipeOf(moe::MixLoraAdapterOptions options) : options_(std::move(options)) {}

  std::string_view method() const override { return moe::MixLoraImpl::kName; }
  void validate() const override { options_.validate(); }
  std::string describe() const override;
  void write_config(nlohmann::json& config) const override;
  bool adapts_blocks() const override { return true; }

  /// A mixture on a block, LoRA (or DoRA) on a Linear layer; refuses the others.
  std::shared_ptr<nn::Adapter> make(const nn::FrozenLayer& layer, const LayerContext& context,
                                    const LayerOverride& override_) const override;
  /// What the layers share: the balance losses since the step began.
  std::shared_ptr<void> make_shared_part(
      const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers,
      const LayerContext& context) const override;
  void begin_step(const AdapterList& adapters, const StepInfo& info) const override;
  /// Over the last forward pass; call it once for each. Throws where that pass kept no graph, as
  /// under gradient checkpointing. Undefined when both coefficients are 0.
  at::Tensor penalty(const AdapterList& adapters) const override;
  void before_update(const AdapterList&, const StepInfo&) const override {}
  /// Moves the bias of routers that are balanced by it.
  void end_step(const AdapterList& adapters, const StepInfo& info) const override;
  /// balance_loss: mean over the step's passes, without coefficient. largest_expert_share,
  /// smallest_expert_share: of any layer's tokens in the step.
  Figures figures(const AdapterList& adapters) const override;
  ExpertUse expert_use(const AdapterList& adapters, bool training) const override;
  ParameterRule rule(std::string_view) const override { return {}; }
  StartPlan start_plan() const override;

  const moe::MixLoraAdapterOptions& options() const { return options_; }

 private:
  moe::MixLoraAdapterOptions options_;
};

}  // namespace graft::adapters
