#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/core/error.h>
#include <graft/moe/router.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "../ops/aten_rows.h"
#include "../ops/cuda_dispatch.h"
#include "../ops/top_k_softmax.h"
#include "expert_counts.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = "router";
constexpr std::array<std::pair<Selection, std::string_view>, 7> kNames = {
    {{Selection::softmax_top_k, "softmax_top_k"},
     {Selection::top_k_softmax, "top_k_softmax"},
     {Selection::dense, "dense"},
     {Selection::top_p, "top_p"},
     {Selection::switch_top_1, "switch_top_1"},
     {Selection::threshold, "threshold"},
     {Selection::biased, "biased"}}};

bool renormalises(const RouterOptions& options) {
  switch (options.selection) {
    case Selection::softmax_top_k:
    case Selection::biased:
      return options.renormalise.value_or(true);
    case Selection::top_p:
      return options.renormalise.value_or(false);
    case Selection::switch_top_1:
      return false;
    default:
      return true;
  }
}

// The order of experts by falling value, ties by rising index: [tokens, slots].
at::Tensor ranked(const at::Tensor& values, int64_t slots) {
  return std::get<1>(at::sort(values.detach(), /*stable=*/true, -1, /*descending=*/true))
      .narrow(-1, 0, slots)
      .contiguous();
}

// A softmax over the chosen logits alone. `kept`: bool [tokens, slots], or undefined: all.
at::Tensor chosen_softmax(const at::Tensor& logits, const at::Tensor& order,
                          const at::Tensor& kept) {
  at::Tensor selected = logits.gather(-1, order);
  if (kept.defined())
    selected = selected.masked_fill(kept.logical_not(), -std::numeric_limits<double>::infinity());
  return at::softmax(selected, -1);
}

// What one kind of selection decides.
struct Choice {
  at::Tensor order;    // int64 [tokens, slots]
  at::Tensor kept;     // bool [tokens, slots], or undefined: all
  at::Tensor weights;  // [tokens, slots]
};

Choice choose_top_p(const RouterOptions& options, const at::Tensor& logits, const at::Tensor& p) {
  Choice choice{ranked(p, options.experts), {}, {}};
  const at::Tensor sorted = p.detach().gather(-1, choice.order);
  choice.kept = (at::cumsum(sorted, -1) - sorted) <= options.top_p;
  choice.weights = renormalises(options) ? chosen_softmax(logits, choice.order, choice.kept)
                                         : p.gather(-1, choice.order) * choice.kept;
  return choice;
}

Choice choose_above(const RouterOptions& options, const at::Tensor& p, const at::Tensor& tau) {
  Choice choice{ranked(p, options.experts), {}, {}};
  const at::Tensor above = at::relu(p.gather(-1, choice.order) - tau);
  choice.kept = above.detach() > 0;
  const at::Tensor sum = above.sum(-1, /*keepdim=*/true);
  choice.weights = above / at::where(sum > 0, sum, 1.0);
  return choice;
}

Choice choose_biased(const RouterOptions& options, const at::Tensor& scores,
                     const at::Tensor& bias) {
  Choice choice{ranked(bias.defined() ? scores + bias : scores, options.top_k), {}, {}};
  choice.weights = scores.gather(-1, choice.order);
  if (renormalises(options))
    choice.weights = choice.weights / choice.weights.sum(-1, /*keepdim=*/true);
  choice.weights = choice.weights * options.scale;
  return choice;
}

// The experts after at most `capacity` tokens of a sequence went to each, in the tokens' order.
at::Tensor within_capacity(const at::Tensor& chosen, int64_t experts, int64_t sequences,
                           int64_t capacity) {
  const at::Tensor by_sequence = chosen.reshape({sequences, -1, 1});
  const at::Tensor taken =
      (by_sequence == at::arange(experts, chosen.options())).to(at::kLong).cumsum(1);
  const at::Tensor place = taken.gather(2, by_sequence.clamp_min(0));
  return chosen.masked_fill((place > capacity).reshape(chosen.sizes()), -1);
}

void check_inputs(const RouterOptions& options, const at::Tensor& logits,
                  const RouteInputs& inputs) {
  GRAFT_CHECK(logits.dim() >= 2 && logits.size(-1) == options.experts, kArea,
              "logits must be [..., tokens, ", options.experts, "]; got ", logits.sizes());
  GRAFT_CHECK(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble, kArea,
              "logits must be float32 or float64; got ", logits.toString());
  const auto leading = logits.sizes().slice(0, logits.dim() - 1);
  GRAFT_CHECK(!inputs.valid.defined() ||
                  (inputs.valid.scalar_type() == at::kBool && inputs.valid.sizes() == leading),
              kArea, "a mask must be bool with one value a token, ", leading, "; got ",
              inputs.valid.toString(), " of ", inputs.valid.sizes());
  const bool threshold = options.selection == Selection::threshold;
  GRAFT_CHECK(!threshold || (inputs.threshold_logits.defined() &&
                             inputs.threshold_logits.numel() == logits.numel() / options.experts),
              kArea, "threshold needs one threshold logit a token; got ",
              inputs.threshold_logits.defined() ? inputs.threshold_logits.numel() : 0, " for ",
              logits.numel() / options.experts, " tokens");
  GRAFT_CHECK(
      !inputs.bias.defined() || (inputs.bias.dim() == 1 && inputs.bias.size(0) == options.experts),
      kArea, "the selection's bias must be [", options.experts, "]; got ", inputs.bias.sizes());
}

at::Tensor probabilities_of(const RouterOptions& options, const at::Tensor& logits,
                            const at::Tensor& scores) {
  if (options.selection == Selection::biased) return scores / scores.sum(-1, /*keepdim=*/true);
  return at::softmax(logits, -1);
}

Choice choose(const RouterOptions& options, const at::Tensor& logits, const at::Tensor& p,
              const at::Tensor& scores, const at::Tensor& tau, const at::Tensor& bias) {
  const bool by_rank = options.selection != Selection::top_p &&
                       options.selection != Selection::threshold &&
                       options.selection != Selection::biased;
  if (ops::has_router_kernel(logits, options.slots(), by_rank && renormalises(options))) {
    const auto [order, weights] = ops::top_k_softmax(logits, options.slots());
    return {order, {}, weights};
  }
  switch (options.selection) {
    case Selection::top_p:
      return choose_top_p(options, logits, p);
    case Selection::threshold:
      return choose_above(options, p, tau);
    case Selection::biased:
      return choose_biased(options, scores, bias);
    default:
      break;
  }
  const at::Tensor order = ranked(logits, options.slots());
  return {
      order, {}, renormalises(options) ? chosen_softmax(logits, order, {}) : p.gather(-1, order)};
}

}  // namespace

std::string_view selection_name(Selection selection) {
  return kNames[static_cast<size_t>(selection)].second;
}

Selection parse_selection(std::string_view name_in) {
  std::string name(name_in), known;
  std::replace(name.begin(), name.end(), '-', '_');
  if (name == "top_k") return Selection::softmax_top_k;
  for (const auto& [selection, text] : kNames) {
    if (text == name) return selection;
    known += (known.empty() ? "" : ", ") + std::string(text);
  }
  fail(kArea, concat("selection must be one of ", known, "; got '", name_in, "'"));
}

int64_t RouterOptions::slots() const {
  switch (selection) {
    case Selection::switch_top_1:
      return 1;
    case Selection::dense:
    case Selection::top_p:
    case Selection::threshold:
      return experts;
    default:
      return top_k;
  }
}

bool RouterOptions::sums_to_one() const {
  return renormalises(*this) && (selection != Selection::biased || scale == 1.0);
}

void RouterOptions::validate() const {
  GRAFT_CHECK(experts >= 1, kArea, "experts must be at least 1; got ", experts);
  GRAFT_CHECK(top_k >= 1 && (slots() != top_k || top_k <= experts), kArea,
              "top_k must be in [1, experts]; got top_k=", top_k, " for experts=", experts);
  GRAFT_CHECK(top_p > 0 && top_p <= 1, kArea, "top_p must be in (0, 1]; got ", top_p);
  GRAFT_CHECK(capacity >= 1, kArea, "capacity must be at least 1; got ", capacity);
  GRAFT_CHECK(std::isfinite(temperature) && temperature > 0, kArea,
              "temperature must be positive; got ", temperature);
  GRAFT_CHECK(temperature == 1.0 || selection != Selection::biased, kArea,
              "biased has no temperature; got ", temperature);
  GRAFT_CHECK(tau_max >= 0 && tau_max * static_cast<double>(experts) <= 1, kArea,
              "tau_max must be in (0, 1 / experts], so that an expert is always left, or 0; got ",
              tau_max, " for experts=", experts);
  GRAFT_CHECK(std::isfinite(scale) && scale > 0, kArea, "scale must be positive; got ", scale);
  const bool free = selection == Selection::softmax_top_k || selection == Selection::top_p ||
                    selection == Selection::biased;
  GRAFT_CHECK(!renormalise || free || *renormalise == renormalises(*this), kArea,
              selection_name(selection), " leaves no choice of renormalise; got ",
              *renormalise ? "true" : "false");
  GRAFT_CHECK(!init_range || (std::isfinite(*init_range) && *init_range >= 0), kArea,
              "init_range must not be negative; got ", *init_range);
  GRAFT_CHECK(!init_range || !linear_start, kArea,
              "init_range and linear_start exclude each other; got both");
  GRAFT_CHECK(jitter >= 0 && jitter < 1, kArea, "jitter must be in [0, 1); got ", jitter);
  GRAFT_CHECK(std::isfinite(bias_rate) && bias_rate >= 0, kArea,
              "bias_rate must not be negative; got ", bias_rate);
}

Routing route(const RouterOptions& options, const at::Tensor& logits_in,
              const RouteInputs& inputs) {
  options.validate();
  check_inputs(options, logits_in, inputs);
  Routing routing;
  const int64_t length = logits_in.size(-2);
  routing.logits = logits_in.reshape({-1, options.experts});
  routing.sequences = length == 0 ? 1 : routing.logits.size(0) / length;
  routing.sums_to_one = options.sums_to_one();
  at::Tensor ignored;
  if (inputs.valid.defined()) {
    routing.valid = inputs.valid.reshape({-1}).to(logits_in.device());
    ignored = routing.valid.logical_not().unsqueeze(1);
    routing.logits = routing.logits.masked_fill(ignored, 0);
  }
  GRAFT_CHECK(ops::on_device(routing.logits) || at::isfinite(routing.logits).all().item<bool>(),
              kArea, "logits must be finite; got NaN or infinity");

  const at::Tensor tempered =
      options.temperature == 1.0 ? routing.logits : routing.logits / options.temperature;
  const at::Tensor scores =
      options.selection == Selection::biased ? at::sigmoid(routing.logits) : at::Tensor();
  if (options.selection == Selection::threshold) {
    const double tau_max =
        options.tau_max > 0 ? options.tau_max : 1.0 / static_cast<double>(options.experts);
    at::Tensor threshold_logits = inputs.threshold_logits.reshape({-1, 1});
    if (ignored.defined()) threshold_logits = threshold_logits.masked_fill(ignored, 0);
    routing.threshold = at::sigmoid(threshold_logits) * tau_max;
  }
  routing.probabilities = probabilities_of(options, tempered, scores);
  const Choice choice =
      choose(options, tempered, routing.probabilities, scores, routing.threshold, inputs.bias);
  at::Tensor unused = choice.kept.defined() ? choice.kept.logical_not() : at::Tensor();
  if (ignored.defined()) unused = unused.defined() ? unused | ignored : ignored;
  routing.chosen = unused.defined() ? choice.order.masked_fill(unused, -1) : choice.order;
  routing.experts =
      options.selection == Selection::switch_top_1
          ? within_capacity(routing.chosen, options.experts, routing.sequences, options.capacity)
          : routing.chosen;
  const bool some_unused = unused.defined() || options.selection == Selection::switch_top_1;
  routing.weights =
      some_unused ? choice.weights.masked_fill(routing.experts < 0, 0) : choice.weights;
  return routing;
}

at::Tensor gates_of(const Routing& routing) {
  // Unused slots have the weight 0, so that it does not matter to whom they add it.
  return at::zeros_like(routing.probabilities)
      .scatter_add(1, routing.experts.clamp_min(0), routing.weights);
}

at::Tensor expert_counts(const Routing& routing) {
  return count_experts(routing.experts, routing.expert_count());
}

void update_bias(at::Tensor& bias, const at::Tensor& counts, double rate) {
  GRAFT_CHECK(bias.dim() == 1 && bias.sizes() == counts.sizes(), kArea,
              "bias and counts must be [experts] both; got ", bias.sizes(), " and ",
              counts.sizes());
  const at::NoGradGuard no_grad;
  const at::Tensor load = counts.to(bias.device(), at::kDouble);
  bias.add_(at::sign(load.mean() - load).to(bias.scalar_type()), rate);
}

at::Tensor jittered(const at::Tensor& x, double amount, const random::MaskKey& key) {
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t columns = x.size(-1), rows = columns == 0 ? 0 : x.numel() / columns;
  const auto numbers = at::TensorOptions(at::kLong).device(x.device());
  const at::Tensor words =
      ops::aten::philox_words(at::arange(rows, numbers), (columns + 3) / 4, key);
  const at::Tensor uniform = (words.narrow(1, 0, columns).to(at::kDouble) + 0.5) * 0x1p-32;
  const at::Tensor factor = (uniform * 2 - 1) * amount + 1;
  return x.to(type) * factor.view(x.sizes()).to(type);
}

RouterImpl::RouterImpl(int64_t features, at::ScalarType type, const RouterOptions& options_in,
                       const adapters::LayerContext& context)
    : torch::nn::Module("Router"),
      options(options_in),
      seed_(context.seed),
      site_(static_cast<uint32_t>(random::hash_name(context.name))) {
  options.validate();
  GRAFT_CHECK(type == at::kFloat || type == at::kDouble, kArea,
              "a router is float32 or float64; got ", at::toString(type));
  const auto values = at::TensorOptions().dtype(type);
  at::Tensor G = at::zeros({options.experts, features}, values);
  const auto generator = at::detail::createCPUGenerator(context.layer_seed());
  const double range =
      options.init_range.value_or(options.selection == Selection::switch_top_1 ? 1.0 : 0.02);
  // torch::nn::Linear's start.
  const double bound = 1 / std::sqrt(static_cast<double>(features));
  const auto uniform = [&](at::IntArrayRef shape) {
    at::Tensor t = at::zeros(shape, values);
    return context.initialise ? t.uniform_(-bound, bound, generator) : t;
  };
  if (options.linear_start)
    G = uniform(G.sizes());
  else if (context.initialise)
    G.normal_(0.0, range, generator);
  weight = register_parameter("weight", G);
  if (options.offset) offset = register_parameter("offset", uniform({options.experts}));
  if (options.selection == Selection::threshold) {
    threshold_weight = register_parameter("threshold_weight", uniform({1, features}));
    threshold_bias = register_parameter("threshold_bias", uniform({1}));
  }
  if (options.selection == Selection::biased)
    bias = register_buffer("bias", at::zeros({options.experts}, values));
}

Routing RouterImpl::forward(const at::Tensor& x_in, const at::Tensor& valid) {
  GRAFT_CHECK(x_in.dim() >= 2 && x_in.size(-1) == weight.size(1), kArea,
              "tokens must be [..., tokens, ", weight.size(1), "]; got ", x_in.sizes());
  at::Tensor x = x_in.to(weight.scalar_type());
  // What padding holds, NaN included, must not reach the weight's gradient.
  if (valid.defined()) x = x.masked_fill(valid.to(x.device()).logical_not().unsqueeze(-1), 0);
  if (options.jitter > 0 && is_training())
    x = jittered(x, options.jitter, random::draw_key(seed_, site_, jitter_counter));
  RouteInputs inputs{valid, {}, bias};
  if (threshold_weight.defined())
    inputs.threshold_logits = at::linear(x, threshold_weight, threshold_bias);
  const at::Tensor logits = at::linear(x, weight);
  return route(options, offset.defined() ? logits + offset : logits, inputs);
}

}  // namespace graft::moe
