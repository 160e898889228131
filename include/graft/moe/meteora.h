/// MeteoRA: adapters that were trained before, behind a gate that is trained.
///
///   y = W x + b + sum_{e in S} g_e s_e B_e A_e x,   l = G x,   S = the top_k largest l,
///   g = softmax(l_S / temperature)
///
/// G [E, in] is trained, the adapters are frozen.
///   loss += label_loss * mean over tokens and layers of -log softmax(l)_label
/// where a TokenScope's `kinds` tells which adapter belongs to a token; other values than those of
/// adapters (-100) count as unlabelled. Source: Xu et al. 2024, arXiv 2405.13053.
#pragma once

#include <graft/moe/expert_library.h>

namespace graft::moe {

/// Options of MeteoRA.
struct MeteoraOptions {
  using Method = class MeteoraImpl;

  std::shared_ptr<const ExpertLibrary> experts = nullptr;
  int64_t top_k = 2;         ///< in [1, number of experts]
  double temperature = 1.0;  ///< positive; the authors infer with 15 to 30
  double label_loss = 0.0;   ///< coefficient; 50 in the authors' code

  /// Throws unless every option is in its range.
  void validate() const;
  /// What the router does.
  RouterOptions router() const;
};

/// Frozen experts and the router of one layer.
class MeteoraImpl : public LinearMixture<MeteoraImpl, MeteoraOptions> {
 public:
  static constexpr const char* kName = "meteora";

  MeteoraImpl(const nn::FrozenLayer& base, const MeteoraOptions& options,
              const adapters::LayerContext& context);

  at::Tensor gates(const at::Tensor& x);
  /// Where the last forward pass sent its tokens; undefined before the first.
  const Routing& routing() const { return routing_; }

  std::vector<FileTensor> file_tensors() const override;

  /// The loss of the labels of the current TokenScope; throws where there are none.
  static at::Tensor penalty(const std::vector<MeteoraImpl*>& layers);
  static void end_step(const std::vector<MeteoraImpl*>& layers, const adapters::StepInfo& info);
  /// "balance_loss" as Mixtral computes it, not part of the loss, and the shares of experts.
  static adapters::Figures figures(const std::vector<MeteoraImpl*>& layers);

  static void write_config(const MeteoraOptions& options, nlohmann::json& config);
  static std::string describe(const MeteoraOptions& options);

  Router router{nullptr};

 private:
  Routing routing_;
};
TORCH_MODULE(Meteora);

/// The built-in list's entry.
adapters::MethodEntry meteora_entry();

}  // namespace graft::moe
