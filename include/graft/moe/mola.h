/// MoLA: a mixture of LoRA experts on each linear layer, with more experts in some blocks of the
/// model than in others.
///
///   y = W x + b + sum_{e in S} g_e s B_e A_e drop(x),   g = softmax(G x) over the top_k largest
///
/// G [E_l, in], A_e and B_e are trained, E_l is the number of experts of the layer's block:
/// `experts` has one number for all blocks, one for each, or one for each group of neighbouring
/// blocks (block i of n has experts[floor(i L / n)] of L numbers). top_k falls to E_l where that is
/// less; a block with one expert is plain LoRA.
///   loss += balance_loss * sum over layers of E_l sum_e (c_e / sum c) P_e    (moe/balance_loss.h)
/// Source: Gao et al. 2024, arXiv 2402.08562.
#pragma once

#include <graft/moe/linear_mixture.h>

#include <map>
#include <memory>

namespace graft::moe {

/// Options of MoLA.
struct MolaOptions {
  using Method = class MolaImpl;

  int64_t rank = 8;              ///< of every expert, in [1, min(in, out)]
  double alpha = 16.0;           ///< numerator of the scale; not 0
  double dropout = 0.0;          ///< on the experts' input, in [0, 1)
  bool rslora = false;           ///< s = alpha / sqrt(r), else alpha / r
  std::string init = "kaiming";  ///< "kaiming", "gaussian", "orthogonal", "random"
  /// 1 or more each; not more numbers than the model has numbered blocks, unless it is one.
  std::vector<int64_t> experts = {2, 4, 6, 8};
  int64_t top_k = 2;          ///< experts a token, at least 1
  double balance_loss = 0.0;  ///< coefficient; the authors' code has 1e-3, switched off

  /// s.
  double scale() const;
  /// Throws unless every option is in its range.
  void validate() const;
};

/// Experts and router of one layer.
class MolaImpl : public RoutedMixture<MolaImpl, MolaOptions> {
 public:
  static constexpr const char* kName = "mola";

  /// Throws for a layer without a block's number where `experts` has several numbers.
  MolaImpl(const nn::FrozenLayer& base, const MolaOptions& options,
           const adapters::LayerContext& context);

  /// How many experts each layer has, by name. The number of a block is the first one between dots
  /// of a layer's name.
  using ExpertCounts = std::map<std::string, int64_t>;
  static std::shared_ptr<ExpertCounts> make_shared_part(
      const MolaOptions& options,
      const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers,
      const adapters::LayerContext& context);

  static at::Tensor balance(const std::vector<Routing>& layers, const MolaOptions& options);
  static void write_config(const MolaOptions& options, nlohmann::json& config);
  static std::string describe(const MolaOptions& options);
};
TORCH_MODULE(Mola);

/// The built-in list's entry.
adapters::MethodEntry mola_entry();

}  // namespace graft::moe
