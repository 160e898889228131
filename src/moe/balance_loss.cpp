#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/moe/balance_loss.h>

#include <array>
#include <utility>

#include "expert_counts.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = "balance_loss";

// One layer's tokens, or those of one of its sequences, or several layers' as if they were one's.
struct Tokens {
  at::Tensor counts;       // c or first choices [E]
  at::Tensor importances;  // sum of p (or p - tau) [E], differentiable
  double tokens = 0;       // T
};

int64_t valid_count(const at::Tensor& valid, int64_t tokens) {
  return valid.defined() ? valid.sum().item<int64_t>() : tokens;
}

// The figures of tokens [first, first + count) of a layer.
Tokens gather(const Routing& routing, Normalisation normalisation, int64_t first, int64_t count) {
  at::Tensor p = routing.probabilities.narrow(0, first, count);
  if (normalisation == Normalisation::above_threshold)
    p = p - routing.threshold.narrow(0, first, count);
  at::Tensor chosen = routing.chosen.narrow(0, first, count);
  if (normalisation == Normalisation::first_choice) chosen = chosen.narrow(1, 0, 1);
  at::Tensor valid;
  if (routing.valid.defined()) {
    valid = routing.valid.narrow(0, first, count);
    p = p.masked_fill(valid.logical_not().unsqueeze(1), 0);
  }
  return {count_experts(chosen, routing.expert_count()).to(p.scalar_type()), p.sum(0),
          static_cast<double>(valid_count(valid, count))};
}

// What the choices of an expert are divided by, times what the sum over experts is multiplied by.
double factor_of(Normalisation normalisation, const Tokens& tokens, int64_t experts,
                 int64_t slots) {
  const double E = static_cast<double>(experts);
  switch (normalisation) {
    case Normalisation::per_slot:
      return E / (static_cast<double>(slots) * tokens.tokens);
    case Normalisation::per_choice:
      return E / tokens.counts.sum().item<double>();
    case Normalisation::unscaled:
      return 1 / tokens.tokens;
    default:
      return E / tokens.tokens;
  }
}

at::Tensor loss_of(const Tokens& tokens, Normalisation normalisation, int64_t slots) {
  const at::Tensor product = (tokens.counts * tokens.importances).sum();
  // Only one factor divides by the number of choices; without any the product is 0 as it is.
  if (tokens.tokens == 0 ||
      (normalisation == Normalisation::per_choice && tokens.counts.sum().item<double>() == 0))
    return product * 0;
  const int64_t experts = tokens.counts.size(0);
  return product * (factor_of(normalisation, tokens, experts, slots) / tokens.tokens);
}

void check_layers(const std::vector<Routing>& layers, Reduction reduction, bool same_sequences) {
  GRAFT_CHECK(!layers.empty(), kArea, "a loss needs at least one layer; got none");
  if (reduction != Reduction::pooled) return;
  for (const Routing& layer : layers) {
    GRAFT_CHECK(layer.expert_count() == layers[0].expert_count() &&
                    layer.chosen.size(1) == layers[0].chosen.size(1),
                kArea, "pooled layers must have the same experts and slots; got ",
                layer.expert_count(), " and ", layers[0].expert_count());
    GRAFT_CHECK(!same_sequences || layer.sequences == layers[0].sequences, kArea,
                "pooled layers must have the same sequences; got ", layer.sequences, " and ",
                layers[0].sequences);
  }
}

// The loss of some layers' tokens taken together: in whole, or as the mean over sequences.
at::Tensor pooled_loss(const std::vector<const Routing*>& layers, const BalanceOptions& options) {
  const int64_t parts = options.scope == Scope::sequence ? layers[0]->sequences : 1;
  at::Tensor total;
  int64_t counted = 0;
  for (int64_t part = 0; part < parts; ++part) {
    Tokens pooled;
    for (const Routing* layer : layers) {
      const int64_t count = layer->tokens() / parts;
      const Tokens tokens = gather(*layer, options.normalisation, part * count, count);
      pooled.counts = pooled.counts.defined() ? pooled.counts + tokens.counts : tokens.counts;
      pooled.importances = pooled.importances.defined() ? pooled.importances + tokens.importances
                                                        : tokens.importances;
      pooled.tokens += tokens.tokens;
    }
    if (pooled.tokens > 0) ++counted;
    const at::Tensor loss = loss_of(pooled, options.normalisation, layers[0]->chosen.size(1));
    total = total.defined() ? total + loss : loss;
  }
  return counted > 1 ? total / counted : total;
}

at::Tensor reduced(const std::vector<at::Tensor>& losses, Reduction reduction) {
  at::Tensor total = losses[0];
  for (size_t i = 1; i < losses.size(); ++i) total = total + losses[i];
  return reduction == Reduction::mean ? total / static_cast<double>(losses.size()) : total;
}

}  // namespace

BalanceOptions balance_of(std::string_view source) {
  using N = Normalisation;
  using R = Reduction;
  static constexpr std::array<std::pair<std::string_view, BalanceOptions>, 8> kSources = {
      {{"switch", {N::first_choice, R::sum, Scope::batch}},
       {"mixtral", {N::per_token, R::pooled, Scope::batch}},
       {"mixlora", {N::per_token, R::pooled, Scope::batch}},
       {"megatron", {N::per_slot, R::sum, Scope::batch}},
       {"mola", {N::per_choice, R::sum, Scope::batch}},
       {"llava_mole", {N::unscaled, R::pooled, Scope::sequence}},
       {"adamole", {N::above_threshold, R::sum, Scope::batch}},
       {"deepseek", {N::per_slot, R::sum, Scope::sequence}}}};
  std::string known;
  for (const auto& [name, options] : kSources) {
    if (name == source) return options;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  fail(kArea, concat("a source must be one of ", known, "; got '", source, "'"));
}

at::Tensor balance_loss(const std::vector<Routing>& layers, const BalanceOptions& options) {
  check_layers(layers, options.reduction, options.scope == Scope::sequence);
  std::vector<const Routing*> pointers;
  for (const Routing& layer : layers) {
    GRAFT_CHECK(
        options.normalisation != Normalisation::above_threshold || layer.threshold.defined(), kArea,
        "above_threshold needs a router that selects by threshold; got another");
    pointers.push_back(&layer);
  }
  if (options.reduction == Reduction::pooled) return pooled_loss(pointers, options);
  std::vector<at::Tensor> losses;
  for (const Routing* layer : pointers) losses.push_back(pooled_loss({layer}, options));
  return reduced(losses, options.reduction);
}

at::Tensor z_loss(const std::vector<Routing>& layers, Reduction reduction) {
  check_layers(layers, reduction, false);
  std::vector<at::Tensor> sums;
  std::vector<double> counts;
  for (const Routing& layer : layers) {
    at::Tensor squares = at::logsumexp(layer.logits, -1).square();
    if (layer.valid.defined()) squares = squares.masked_fill(layer.valid.logical_not(), 0);
    sums.push_back(squares.sum());
    counts.push_back(static_cast<double>(valid_count(layer.valid, layer.tokens())));
  }
  if (reduction == Reduction::pooled) {
    double tokens = 0;
    for (const double count : counts) tokens += count;
    return reduced(sums, Reduction::sum) / std::max(tokens, 1.0);
  }
  for (size_t i = 0; i < sums.size(); ++i) sums[i] = sums[i] / std::max(counts[i], 1.0);
  return reduced(sums, reduction);
}

at::Tensor dispersion_loss(const at::Tensor& importances, Dispersion form) {
  GRAFT_CHECK(importances.numel() >= 2, kArea, "a variance needs two importances; got ",
              importances.numel());
  const at::Tensor mean = importances.mean(), variance = at::var(importances, /*unbiased=*/true);
  return form == Dispersion::paper ? variance / mean : variance / (mean.square() + 1e-10);
}

at::Tensor typed_importances(const Routing& routing, const at::Tensor& sequence_types,
                             double delta) {
  GRAFT_CHECK(sequence_types.dim() == 1 && sequence_types.size(0) == routing.sequences, kArea,
              "there must be one type a sequence, [", routing.sequences, "]; got ",
              sequence_types.sizes());
  const int64_t experts = routing.expert_count(), sequences = routing.sequences;
  const at::Tensor sums = gates_of(routing).view({sequences, -1, experts}).sum(1).t();
  const at::Tensor types = sequence_types.to(sums.device());
  const at::Tensor expert_types =
      (at::arange(experts, types.options()) < experts / 2).to(at::kLong);
  const at::Tensor agree = expert_types.unsqueeze(1) == types.unsqueeze(0);
  return sums * ((agree.to(sums.scalar_type()) * 2 - 1) * delta + 1);
}

}  // namespace graft::moe
