/// LoRA-Mixer: LoRA experts on attention's projections, routed by labels first, then softly, and by
/// the best few when training is over.
///
///   y = W x + b + sum_e g_e s B_e A_e drop(x),   l = G x
///   training    g = (1 - a) onehot(label) + a softmax(l),   a = min(step / hard_steps, 1)
///   evaluation  g = softmax over the top_k largest l
///
/// A TokenScope's `kinds` tells each token's label; without one a is 1. G [E, in], A_e and B_e are
/// trained. Written from the paper, whose code is not out: that a rises linearly is graft's choice,
/// and the paper's routing loss is left out, since no source settles the sign of its entropy term.
/// Source: "LoRA-Mixer", 2025, arXiv 2507.00029.
#pragma once

#include <graft/moe/linear_mixture.h>

namespace graft::moe {

/// Options of LoRA-Mixer.
struct LoraMixerOptions {
  using Method = class LoraMixerImpl;

  int64_t rank = 8;              ///< of every expert, in [1, min(in, out)]
  double alpha = 16.0;           ///< numerator of the scale; not 0
  double dropout = 0.0;          ///< on the experts' input, in [0, 1)
  bool rslora = false;           ///< s = alpha / sqrt(r), else alpha / r
  std::string init = "kaiming";  ///< "kaiming", "gaussian", "orthogonal", "random"
  int64_t experts = 8;           ///< E, at least 1
  int64_t top_k = 3;             ///< in evaluation, at least 1; falls to E
  int64_t hard_steps = 0;        ///< steps over which labels give way to the router; 0: none
  double balance_loss = 0.0;     ///< coefficient of Switch's balance loss, the layers' mean

  /// s.
  double scale() const;
  /// Throws unless every option is in its range.
  void validate() const;
};

/// Experts and router of one layer.
class LoraMixerImpl : public RoutedMixture<LoraMixerImpl, LoraMixerOptions> {
 public:
  static constexpr const char* kName = "lora-mixer";

  LoraMixerImpl(const nn::FrozenLayer& base, const LoraMixerOptions& options,
                const adapters::LayerContext& context);

  /// Throws for labels that are not one a token, or none of the experts.
  at::Tensor gates(const at::Tensor& x);

  static void begin_step(const std::vector<LoraMixerImpl*>& layers, const adapters::StepInfo& info);
  static at::Tensor balance(const std::vector<Routing>& layers, const LoraMixerOptions& options);
  static void write_config(const LoraMixerOptions& options, nlohmann::json& config);
  static std::string describe(const LoraMixerOptions& options);

 private:
  double soft_share_ = 1.0;  // a of the current step
};
TORCH_MODULE(LoraMixer);

/// The built-in list's entry.
adapters::MethodEntry lora_mixer_entry();

}  // namespace graft::moe
