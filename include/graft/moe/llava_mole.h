/// LLaVA-MoLE: one LoRA expert a token, chosen once for all linear layers of a feed-forward block.
///
///   y = W x + b + sum_e g_e s B_e A_e drop(x),   l = G u + c,   p = softmax(l)
///   one               g_e = 1 for the e with the largest l_e, else 0
///   prob              g_e = p_e for it, else 0
///   straight_through  the value of `one`, the gradient of g = p
///   dense             g = p
///
/// u is the block's input. Layers with the same parent ("model.layers.3.mlp") are one block and
/// share one router, G [E, in of the block's first layer] and c [E]. A layer whose input has that
/// size routes by its own input, once where several read the same one (gate_proj and up_proj); the
/// others follow the block's last routing (down_proj).
///   loss += balance_loss * mean over sequences of sum_e (c_e / T) P_e, all blocks' tokens together
/// With `one` the router learns from this loss alone. Source: Chen et al. 2024, arXiv 2401.16160.
#pragma once

#include <graft/moe/linear_mixture.h>

#include <memory>
#include <string_view>

namespace graft::moe {

enum class Combine { one, prob, straight_through, dense };

/// "one" and so on; `parse_combine` throws for an unknown name, listing the known ones.
std::string_view combine_name(Combine combine);
Combine parse_combine(std::string_view name);

/// Options of LLaVA-MoLE.
struct LlavaMoleOptions {
  using Method = class LlavaMoleImpl;

  int64_t rank = 32;               ///< of every expert, in [1, min(in, out)]
  double alpha = 64.0;             ///< numerator of the scale; not 0
  double dropout = 0.0;            ///< on the experts' input, in [0, 1)
  bool rslora = false;             ///< s = alpha / sqrt(r), else alpha / r
  std::string init = "kaiming";    ///< "kaiming", "gaussian", "orthogonal", "random"
  int64_t experts = 3;             ///< E, at least 1
  Combine combine = Combine::one;  ///< the authors' paper; their released weights are `dense`
  double balance_loss = 1e-2;      ///< coefficient

  /// s.
  double scale() const;
  /// Throws unless every option is in its range.
  void validate() const;
  /// What the router does.
  RouterOptions router() const;
};

/// The experts of one layer, and a share in its block's router.
class LlavaMoleImpl : public LinearMixture<LlavaMoleImpl, LlavaMoleOptions> {
 public:
  static constexpr const char* kName = "llava-mole";

  /// A block's router and its last routing.
  struct Block;
  /// The blocks, by the name of each of their layers.
  struct Blocks;

  LlavaMoleImpl(const nn::FrozenLayer& base, const LlavaMoleOptions& options,
                const adapters::LayerContext& context);

  /// Throws for a layer that follows a routing of other tokens.
  at::Tensor gates(const at::Tensor& x);
  /// The block's router; all layers of a block have the same one, the first of them owns it.
  const RouterImpl& router() const;
  /// Where the block's last pass sent its tokens; undefined before the first.
  const Routing& routing() const;

  /// The router's tensors are stored with the block's first layer.
  std::vector<FileTensor> file_tensors() const override;

  static std::shared_ptr<Blocks> make_shared_part(
      const LlavaMoleOptions& options,
      const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers,
      const adapters::LayerContext& context);
  /// Throws where the last forward pass left no graph.
  static at::Tensor penalty(const std::vector<LlavaMoleImpl*>& layers);
  static void end_step(const std::vector<LlavaMoleImpl*>& layers, const adapters::StepInfo& info);
  static adapters::Figures figures(const std::vector<LlavaMoleImpl*>& layers);

  static void write_config(const LlavaMoleOptions& options, nlohmann::json& config);
  static std::string describe(const LlavaMoleOptions& options);

 private:
  std::shared_ptr<Block> block_;
  bool owns_router_ = false;
};
TORCH_MODULE(LlavaMole);

/// The built-in list's entry.
adapters::MethodEntry llava_mole_entry();

}  // namespace graft::moe
