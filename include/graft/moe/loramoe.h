/// LoRAMoE: every LoRA expert works on every token, weighted by a softmax; a loss can keep half of
/// the experts for one type of examples.
///
///   y = W x + b + sum_e g_e s B_e A_e drop(x),   g = softmax(G x)
///
/// G [E, in], A_e and B_e are trained.
///   loss += balance_loss * sum over layers of var(Z) / (mean(Z)^2 + 1e-10),
///   Z_es = (1 + delta where the types of expert e and sequence s agree, else 1 - delta)
///          * sum of g_e over the tokens of s
/// Types are 0 and 1, the first half of the experts has type 1; a TokenScope tells those of the
/// sequences, and without it delta counts as 0. With `paper_dispersion` the loss is
/// var(Z) / mean(Z), as the paper writes it. Source: Dou et al. 2023, arXiv 2312.09979.
#pragma once

#include <graft/moe/linear_mixture.h>

namespace graft::moe {

/// Options of LoRAMoE; the first defaults are those of the authors' script.
struct LoraMoeOptions {
  using Method = class LoraMoeImpl;

  int64_t rank = 4;               ///< of every expert, in [1, min(in, out)]
  double alpha = 32.0;            ///< numerator of the scale; not 0
  double dropout = 0.0;           ///< on the experts' input, in [0, 1)
  bool rslora = false;            ///< s = alpha / sqrt(r), else alpha / r
  std::string init = "kaiming";   ///< "kaiming", "gaussian", "orthogonal", "random"
  int64_t experts = 8;            ///< E, at least 1; at least 2 for the loss
  double balance_loss = 0.0;      ///< coefficient, 0 in the authors' script
  double delta = 0.1;             ///< in [0, 1)
  bool paper_dispersion = false;  ///< var / mean instead of var / mean^2

  /// s.
  double scale() const;
  /// Throws unless every option is in its range.
  void validate() const;
};

/// Experts and router of one layer.
class LoraMoeImpl : public RoutedMixture<LoraMoeImpl, LoraMoeOptions> {
 public:
  static constexpr const char* kName = "loramoe";

  LoraMoeImpl(const nn::FrozenLayer& base, const LoraMoeOptions& options,
              const adapters::LayerContext& context);

  static at::Tensor balance(const std::vector<Routing>& layers, const LoraMoeOptions& options);
  static void write_config(const LoraMoeOptions& options, nlohmann::json& config);
  static std::string describe(const LoraMoeOptions& options);
};
TORCH_MODULE(LoraMoe);

/// The built-in list's entry.
adapters::MethodEntry loramoe_entry();

}  // namespace graft::moe
