/// Losses that keep a router's experts evenly used, under the names and normalisations of their
/// sources, before any coefficient.
///
/// Over the tokens that count, T of them, with c_e pairs (token, slot) chosen for expert e (before
/// the capacity, padding left out), P_e = mean of p_e, E experts and K slots a token:
///   first_choice  E sum_e f_e P_e, f_e = share of tokens whose first choice is e   (Switch, GShard
///                 as coded in mesh-TensorFlow)
///   per_token     E sum_e (c_e / T) P_e             (Mixtral, MixLoRA, MixLoRA-dynamic)
///   per_slot      E sum_e (c_e / (K T)) P_e         (Megatron, DeepSeek-V3)
///   per_choice    E sum_e (c_e / sum c) P_e         (MoLA)
///   unscaled      sum_e (c_e / T) P_e, no E         (LLaVA-MoLE)
///   above_threshold  E sum_e (c_e / T) mean of (p_e - tau)   (AdaMoLE)
/// per_token is K times per_slot, and per_choice where every slot is used: a coefficient belongs to
/// its normalisation. At even logits they are 1, K, 1, 1, K / E; with all first choices on one
/// expert that has p = 1: E, E, E / K, E / K, 1.
/// None of them is smallest at even use: 1 (or K) is the value whenever f or P is even. Look at
/// `expert_counts` too.
///
/// c and f are constants, so dL/dl_te = (coefficient of P_e, F_e): p_te (F_e - sum_j p_tj F_j) / T.
#pragma once

#include <graft/moe/router.h>

#include <string_view>
#include <vector>

namespace graft::moe {

enum class Normalisation {
  first_choice,
  per_token,
  per_slot,
  per_choice,
  unscaled,
  above_threshold
};

/// How layers become one number. `pooled`: all layers' tokens are taken as one layer's. That is not
/// the sum of the layers' losses: two layers that collapse onto different experts look even.
enum class Reduction { mean, sum, pooled };

/// What a mean goes over: all tokens of the batch, or the tokens of each sequence, and then the
/// mean over sequences.
enum class Scope { batch, sequence };

struct BalanceOptions {
  Normalisation normalisation = Normalisation::per_token;
  Reduction reduction = Reduction::mean;
  Scope scope = Scope::batch;
};

/// As a source computes it: "switch", "mixtral", "mixlora", "megatron", "mola", "llava_mole",
/// "adamole", "deepseek"; throws for another name.
BalanceOptions balance_of(std::string_view source);

/// The loss over the routings of all layers, a differentiable scalar; 0 where no token counts.
at::Tensor balance_loss(const std::vector<Routing>& layers, const BalanceOptions& options = {});

/// mean over tokens of logsumexp(l)^2 (Zoph et al. 2022, arXiv 2202.08906), (ln E)^2 at even
/// logits; it holds the logits near 0, which no balance loss does.
at::Tensor z_loss(const std::vector<Routing>& layers, Reduction reduction = Reduction::mean);

/// How even a set of importances Z is, 0 when all are equal (LoRAMoE: Dou et al. 2023, arXiv
/// 2312.09979). `paper`: var(Z) / mean(Z). `code`: var(Z) / (mean(Z)^2 + 1e-10), which does not
/// change with the scale of Z. The variance is the unbiased one.
enum class Dispersion { paper, code };
at::Tensor dispersion_loss(const at::Tensor& importances, Dispersion form = Dispersion::code);

/// LoRAMoE's importances: Z_es = (1 + delta where the types of expert e and sequence s agree, else
/// 1 - delta) * sum of the sequence's weights of e. Types are 0 and 1; the first half of the
/// experts has type 1.  sequence_types: int64 [sequences]; returns [experts, sequences].
at::Tensor typed_importances(const Routing& routing, const at::Tensor& sequence_types,
                             double delta);

}  // namespace graft::moe
