/// MixLoRA: a frozen feed-forward block as a sparse mixture of experts that share its weights and
/// differ by low-rank terms.
///
/// For each token x and the experts S with weights g that a router chooses:
///   h1_e = W1 x + s B1_e A1_e drop(x),   h3_e = W3 x + s B3_e A3_e drop(x),   z_e = silu(h1_e)
///   h3_e y = sum_S g_e (W2 z_e + b2 + s B2_e A2_e drop(z_e))
/// (W1 gate_proj, W3 up_proj, W2 down_proj). A token without expert (padding, beyond the capacity)
/// has the block's own output. Source: Li et al. 2024, arXiv 2404.15159.
///
/// Three ways to compute it, equal but for rounding; in products with W1, W3, W2 a token, K
/// experts:
///   literal   K (W1 + W3 + W2): every expert runs the whole block
///   shared    W1 + W3 once, K W2: the paper's
///   combined  W1 + W3 + W2 once: y = W2 (sum_S g_e z_e) + b2 sum_S g_e + s sum_S g_e B2_e A2_e
///             drop(z_e), since W2 is linear and shared. Not for DoRA experts, which scale W2's
///             rows each in its own way.
/// With DoRA experts (`dora`) each term W x + b + s B_e A_e x becomes b + c_e * (W x + s B_e A_e
/// x), c_e = m_e / ||W + s B_e A_e||, as in adapters/dora.h.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/dora.h>
#include <graft/moe/dispatch.h>
#include <graft/moe/router.h>
#include <graft/nn/gated_mlp.h>
#include <graft/ops/expert_mlp.h>

#include <memory>
#include <string>

namespace graft::moe {

/// The experts' low-rank terms.
struct ExpertOptions {
  int64_t rank = 16;             ///< r, in [1, min(hidden, intermediate)]
  double alpha = 32.0;           ///< numerator of the scale; not 0
  double dropout = 0.0;          ///< in [0, 1), each (token, slot) with its own mask
  bool rslora = false;           ///< s = alpha / sqrt(r), else alpha / r
  bool dora = false;             ///< DoRA experts
  std::string init = "kaiming";  ///< "kaiming", "gaussian", "orthogonal", "random"

  /// s.
  double scale() const;
  /// Throws unless every option is in its range, whatever the layer.
  void validate() const;
};

/// `automatic`: combined, or shared for DoRA experts.
enum class ForwardPath { automatic, literal, shared, combined };

struct MixLoraOptions {
  RouterOptions router = {};
  ExpertOptions experts = {};
  ForwardPath path = ForwardPath::automatic;

  /// The path in force.
  ForwardPath resolved_path() const;
  /// How many numbers a block with these sizes trains: router and experts.
  int64_t parameter_count(int64_t hidden, int64_t intermediate) const;
  /// Throws unless every option is in its range; combined with dora is refused.
  void validate() const;
};

/// All experts' terms on one of the block's layers.
class ExpertProjectionImpl : public torch::nn::Module {
 public:
  /// fp32 on the base's device (fp64 for an fp64 base).
  ExpertProjectionImpl(const nn::FrozenLinear& base, int64_t experts, const ExpertOptions& options,
                       const adapters::LayerContext& context);

  /// The layer's output for each row of the plan, [M, out].  x: [tokens, in], or with `by_row`
  /// [M, in].
  at::Tensor rows(const nn::FrozenLinear& base, const at::Tensor& x, const DispatchPlan& plan,
                  bool by_row);
  /// The layer with the terms of one call: with dropout, a new mask.
  ops::ExpertLayer layer(const nn::FrozenLinear& base);

  at::Tensor lora_A;                 ///< [E, r, in]
  at::Tensor lora_B;                 ///< [E, out, r]
  at::Tensor lora_magnitude_vector;  ///< m [E, out] of DoRA experts, or undefined
  uint32_t mask_counter = 0;         ///< how many masks were drawn; a resumed run puts it back

 private:
  ops::ExpertTerm term();
  // ||W + s B_e A_e||, [E, out].
  at::Tensor norms(const nn::FrozenLinear& base) const;
  at::Tensor scaled(const at::Tensor& product, const nn::FrozenLinear& base,
                    const DispatchPlan& plan) const;

  const ExpertOptions options_;
  const uint64_t seed_;
  const uint32_t site_;
  adapters::TensorMemo squares_, norms_;
};
TORCH_MODULE(ExpertProjection);

/// Router and experts of one block.
class MixLoraImpl : public adapters::AdapterModule<MixLoraImpl, MixLoraOptions> {
 public:
  static constexpr const char* kName = "mixlora";

  /// Throws for a rank that the block cannot carry. `context`: the block's name and the run's seed.
  MixLoraImpl(const nn::FrozenGatedMlp& base, const MixLoraOptions& options,
              const adapters::LayerContext& context);

  /// x: [..., tokens, hidden]; returns its shape.
  at::Tensor forward(const nn::FrozenGatedMlp& base, const at::Tensor& x);
  /// Throws: which experts work depends on the input, so no weight holds them.
  Merged merge(const nn::FrozenLayer& base) const override;

  /// By expert, as MoE-PEFT names them: "moe_gate.weight", "up_proj.experts.3.lora_A.weight".
  std::vector<FileTensor> file_tensors() const override;
  /// Masks of the three layers, jitters, and the tokens of each expert in training.
  std::vector<int64_t> counters() const override;
  void set_counters(const std::vector<int64_t>& values) override;

  /// Where the last forward pass sent its tokens, for balance_loss and expert_counts; with the
  /// graph of that pass, until the next one or `forget_routing`.
  const Routing& routing() const;
  void forget_routing() { routing_ = {}; }
  /// Whether a pass has run since then.
  bool has_routing() const { return routing_.logits.defined(); }

  Router router{nullptr};
  ExpertProjection gate_proj{nullptr}, up_proj{nullptr}, down_proj{nullptr};
  /// Tokens that each expert worked on, int64 [E]: in training passes, in those of them since the
  /// step began, in passes in eval mode. Passes that run again in backward do not count.
  at::Tensor trained_tokens, step_tokens, evaluated_tokens;

 private:
  void count(const Routing& routing);

  Routing routing_;
};
TORCH_MODULE(MixLora);

/// Puts a mixture into the one block, freezes the block's own weights, and returns the mixture: its
/// parameters() are what is trained. `context.name`: the block's name in the model, which picks the
/// start values and dropout masks together with the seed. A whole model: moe/mix_lora_recipe.h.
MixLora add_mixture(nn::GatedMlpImpl& block, const MixLoraOptions& options,
                    const adapters::LayerContext& context);

}  // namespace graft::moe
