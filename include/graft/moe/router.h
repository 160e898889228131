/// Routers: which experts work on a token, and with which weights.
///
/// With logits l [tokens, experts], p = softmax(l / temperature) and the chosen set S of a token:
///   softmax_top_k  S = the top_k largest p;    g_e = p_e / sum_S p        (MixLoRA, Mixtral, MoLA)
///   top_k_softmax  S = the top_k largest l;    g = softmax(l_S / temperature)  (MeteoRA, Arrow)
///   dense          S = all;                    g = p                      (LoRAMoE)
///   top_p          S = the largest p until their sum exceeds top_p, the one that crosses included;
///                  g_e = p_e                                              (MixLoRA-dynamic)
///   switch_top_1   S = the largest p;          g_e = p_e, at most `capacity` tokens of a sequence
///                  an expert                                              (Switch, MixLoRA-switch)
///   threshold      u_e = max(p_e - tau, 0), tau = tau_max sigmoid(threshold logit), S = {u > 0};
///                  g = u / sum u                                          (AdaMoLE)
///   biased         S = the top_k largest s + b, s = sigmoid(l);  g_e = scale s_e / sum_S s,
///   without
///                  b: balance comes from b (`update_bias`), not from a loss   (DeepSeek-V3)
/// The first two are one function. It is computed as a softmax over S, so that the gradient
/// dl_j = g_j (dg_j - sum_S g dg) / temperature is exactly 0 outside S. With one expert chosen and
/// weights that sum to 1, g is 1 and the router learns nothing from the task.
///
/// Ties go to the lower index. Sources: Li et al. 2024, arXiv 2404.15159 (MixLoRA); Fedus et al.
/// 2021, arXiv 2101.03961 (Switch); Liu & Luo 2024, arXiv 2405.00361 (AdaMoLE); DeepSeek-AI 2024,
/// arXiv 2412.19437 (biased).
#pragma once

#include <graft/adapters/adapter_module.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace graft::moe {

enum class Selection {
  softmax_top_k,
  top_k_softmax,
  dense,
  top_p,
  switch_top_1,
  threshold,
  biased
};

/// "softmax_top_k" and so on; `parse_selection` also takes hyphens and "top-k" for the first, and
/// throws for an unknown name, listing the known ones.
std::string_view selection_name(Selection selection);
Selection parse_selection(std::string_view name);

/// What a router does; fields that a selection does not name above are ignored by it.
struct RouterOptions {
  Selection selection = Selection::softmax_top_k;
  int64_t experts = 8;       ///< E, at least 1
  int64_t top_k = 2;         ///< in [1, experts]
  double top_p = 0.8;        ///< in (0, 1]
  int64_t capacity = 32;     ///< tokens of one sequence that one expert takes, at least 1
  double temperature = 1.0;  ///< > 0; 1 for `biased`
  double tau_max = 0.0;      ///< in (0, 1 / experts], or 0: 1 / experts
  double scale = 1.0;        ///< of the weights of `biased`
  /// Whether the weights of a token are divided by their sum; unset: as written above. No choice
  /// for top_k_softmax, dense, switch_top_1 and threshold.
  std::optional<bool> renormalise = {};
  /// Standard deviation of the router's weight at the start; unset: 0.02, and 1 for switch_top_1.
  std::optional<double> init_range = {};
  /// In training the router (not the experts) reads x * U(1 - jitter, 1 + jitter); in [0, 1).
  double jitter = 0.0;
  double bias_rate = 1e-3;  ///< gamma of `update_bias`
  /// G starts as torch::nn::Linear's weight, U(-1/sqrt(features), 1/sqrt(features)); excludes
  /// init_range.
  bool linear_start = false;
  bool offset = false;  ///< l = x G^T + c, c trained and started as torch::nn::Linear's bias

  /// How many slots a token has: top_k, 1 or experts.
  int64_t slots() const;
  /// Whether the weights of a token that has experts sum to 1.
  bool sums_to_one() const;
  /// Throws unless every option is in its range.
  void validate() const;
};

/// Where each token goes. Slots are in falling order of preference.
struct Routing {
  at::Tensor logits;          ///< [tokens, experts]; masked tokens: 0
  at::Tensor probabilities;   ///< [tokens, experts]: p, or s / sum s; differentiable
  at::Tensor chosen;          ///< int64 [tokens, slots]: S before the capacity; -1: unused slot
  at::Tensor experts;         ///< int64 [tokens, slots]: who works on the token; -1: nobody
  at::Tensor weights;         ///< g [tokens, slots], 0 where `experts` is -1; differentiable
  at::Tensor threshold = {};  ///< tau [tokens, 1] of `threshold`; differentiable
  at::Tensor valid = {};      ///< bool [tokens], or undefined: all
  int64_t sequences = 1;      ///< the tokens are that many sequences of one length
  bool sums_to_one = false;   ///< RouterOptions::sums_to_one

  int64_t tokens() const { return logits.size(0); }
  int64_t expert_count() const { return logits.size(1); }
};

/// What `route` may need besides logits.
struct RouteInputs {
  at::Tensor valid = {};             ///< bool [...]: padding is false and goes to no expert
  at::Tensor threshold_logits = {};  ///< [..., 1], for `threshold`
  at::Tensor bias = {};              ///< b [experts], for `biased`; undefined: 0
};

/// Routes tokens.  logits: [..., tokens of a sequence, experts] or [tokens, experts], fp32 or fp64.
/// Throws for logits that are not finite where `valid` is; on a device, which would have to be
/// waited for, they make weights NaN.
Routing route(const RouterOptions& options, const at::Tensor& logits,
              const RouteInputs& inputs = {});

/// g as a matrix [tokens, experts], 0 for experts that are not at work on a token; differentiable.
at::Tensor gates_of(const Routing& routing);

/// How many tokens each expert works on.  int64 [experts].
at::Tensor expert_counts(const Routing& routing);

/// b_e += rate * sign(mean load - load_e), in place; call it after an optimiser step with the
/// step's counts.  bias, counts: [experts].
void update_bias(at::Tensor& bias, const at::Tensor& counts, double rate);

/// x * U(1 - amount, 1 + amount), a new tensor, fp32 at least; the factor of element (row, column)
/// is a function of the key and the position.
at::Tensor jittered(const at::Tensor& x, double amount, const random::MaskKey& key);

/// A linear router with its weights, in fp32 whatever the base's type (fp64 for fp64).
class RouterImpl : public torch::nn::Module {
 public:
  /// features: the size of a token. `type`: fp32 or fp64.
  RouterImpl(int64_t features, at::ScalarType type, const RouterOptions& options,
             const adapters::LayerContext& context);

  /// x: [..., tokens of a sequence, features]; valid: bool [..., tokens] or undefined.
  Routing forward(const at::Tensor& x, const at::Tensor& valid = {});

  const RouterOptions options;
  at::Tensor weight;            ///< G [experts, features], l = x G^T
  at::Tensor offset;            ///< c [experts], or undefined
  at::Tensor threshold_weight;  ///< [1, features], of `threshold`
  at::Tensor threshold_bias;    ///< [1]
  at::Tensor bias;              ///< b [experts] of `biased`: a buffer, no gradient reaches it
  uint32_t jitter_counter = 0;  ///< how many jitters were drawn; a resumed run puts it back

 private:
  uint64_t seed_;
  uint32_t site_;
};
TORCH_MODULE(Router);

}  // namespace graft::moe
