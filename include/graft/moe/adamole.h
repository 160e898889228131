/// AdaMoLE: LoRA experts whose number adapts from token to token, by a threshold that is trained.
///
///   y = W x + b + sum_e g_e s B_e A_e drop(x),   u_e = max(p_e - tau, 0),  g = u / sum u,
///   p = softmax(G x),   tau = tau_max sigmoid(w x + c)
///
/// G [E, in], w [1, in], c [1], A_e and B_e are trained. tau_max <= 1 / E, so that some expert is
/// always at work; g is continuous where an expert leaves.
///   loss += balance_loss * sum over layers of E sum_e (c_e / T) mean of (p_e - tau)
///                                                                    (moe/balance_loss.h)
/// Source: Liu & Luo 2024, arXiv 2405.00361.
#pragma once

#include <graft/moe/linear_mixture.h>

namespace graft::moe {

/// Options of AdaMoLE; the defaults are those of the authors' configuration.
struct AdaMoleOptions {
  using Method = class AdaMoleImpl;

  int64_t rank = 4;              ///< of every expert, in [1, min(in, out)]
  double alpha = 16.0;           ///< numerator of the scale; not 0
  double dropout = 0.0;          ///< on the experts' input, in [0, 1)
  bool rslora = false;           ///< s = alpha / sqrt(r), else alpha / r
  std::string init = "kaiming";  ///< "kaiming", "gaussian", "orthogonal", "random"
  int64_t experts = 8;           ///< E, at least 1
  double max_threshold = 0.0;    ///< tau_max in (0, 1 / E], or 0: 1 / E
  double balance_loss = 1e-3;    ///< coefficient

  /// s.
  double scale() const;
  /// Throws unless every option is in its range.
  void validate() const;
  /// What the router does.
  RouterOptions router() const;
};

/// Experts and router of one layer.
class AdaMoleImpl : public RoutedMixture<AdaMoleImpl, AdaMoleOptions> {
 public:
  static constexpr const char* kName = "adamole";

  AdaMoleImpl(const nn::FrozenLayer& base, const AdaMoleOptions& options,
              const adapters::LayerContext& context);

  static at::Tensor balance(const std::vector<Routing>& layers, const AdaMoleOptions& options);
  /// Those of every mixture, and "active_experts": how many work on a token, on average.
  static adapters::Figures figures(const std::vector<AdaMoleImpl*>& layers);
  static void write_config(const AdaMoleOptions& options, nlohmann::json& config);
  static std::string describe(const AdaMoleOptions& options);
};
TORCH_MODULE(AdaMole);

/// The built-in list's entry.
adapters::MethodEntry adamole_entry();

}  // namespace graft::moe
