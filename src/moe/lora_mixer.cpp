#include <ATen/ATen.h>
#include <graft/moe/lora_mixer.h>
#include <graft/moe/token_scope.h>

#include <algorithm>
#include <cmath>

#include "expert_fields.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = LoraMixerImpl::kName;

std::shared_ptr<const adapters::Recipe> read_config(nlohmann::json& config) {
  LoraMixerOptions options;
  read_routed_fields(kArea, config, options);
  adapters::ConfigFields fields(config, kArea);
  options.top_k = fields.integer(kTopK, options.top_k);
  options.hard_steps = fields.integer("hard_steps", options.hard_steps);
  return adapters::make_recipe(options);
}

}  // namespace

double LoraMixerOptions::scale() const {
  return adapters::lora_scale(alpha, rank, rslora);
}

void LoraMixerOptions::validate() const {
  check_routed_options(kArea, *this);
  GRAFT_CHECK(experts >= 1, kArea, "experts must be at least 1; got ", experts);
  GRAFT_CHECK(top_k >= 1, kArea, "top_k must be at least 1; got ", top_k);
  GRAFT_CHECK(hard_steps >= 0, kArea, "hard_steps must not be negative; got ", hard_steps);
}

LoraMixerImpl::LoraMixerImpl(const nn::FrozenLayer& base, const LoraMixerOptions& options_in,
                             const adapters::LayerContext& context_in)
    : RoutedMixture(
          base, options_in, context_in,
          {.selection = Selection::dense, .experts = options_in.experts, .linear_start = true}) {}

void LoraMixerImpl::begin_step(const std::vector<LoraMixerImpl*>& layers,
                               const adapters::StepInfo& info) {
  for (LoraMixerImpl* layer : layers) {
    const int64_t hard = layer->options.hard_steps;
    layer->soft_share_ =
        hard == 0 ? 1.0 : std::min(static_cast<double>(info.step) / static_cast<double>(hard), 1.0);
  }
}

at::Tensor LoraMixerImpl::gates(const at::Tensor& x) {
  Routing routing = route_tokens(*router, x);
  if (!is_training()) {
    const RouterOptions best{.selection = Selection::top_k_softmax,
                             .experts = options.experts,
                             .top_k = std::min(options.top_k, options.experts)};
    routing = route(best, routing.logits, {.valid = routing.valid});
  }
  keep(routing);
  const at::Tensor soft = gates_of(routing);
  if (!is_training() || soft_share_ == 1.0) return soft;
  const at::Tensor labels = TokenScope::current().kinds;
  if (!labels.defined()) return soft;
  const int64_t tokens = routing.tokens();
  GRAFT_CHECK(labels.numel() == tokens, kArea, "there must be one kind a token, ", tokens,
              "; got kinds of ", labels.sizes(), " (layer '", context.name, "')");
  const at::Tensor rows = labels.reshape({-1, 1});
  GRAFT_CHECK(((rows >= 0) & (rows < options.experts)).all().item<bool>(), kArea,
              "a token's kind must be in [0, ", options.experts, "); got ",
              rows.min().item<int64_t>(), " to ", rows.max().item<int64_t>(), " (layer '",
              context.name, "')");
  at::Tensor hard = at::zeros(soft.sizes(), soft.options().requires_grad(false));
  hard.scatter_(1, rows.to(hard.device()), 1.0 - soft_share_);
  if (routing.valid.defined()) hard.masked_fill_(routing.valid.logical_not().unsqueeze(1), 0);
  return hard + soft * soft_share_;
}

at::Tensor LoraMixerImpl::balance(const std::vector<Routing>& layers, const LoraMixerOptions&) {
  return balance_loss(layers, {.normalisation = Normalisation::first_choice});
}

void LoraMixerImpl::write_config(const LoraMixerOptions& options, nlohmann::json& config) {
  write_routed_fields(options, config);
  config[kTopK] = options.top_k;
  config["hard_steps"] = options.hard_steps;
}

std::string LoraMixerImpl::describe(const LoraMixerOptions& options) {
  std::string text = concat(options.experts, " experts, top ", options.top_k, " in the end, ",
                            describe_routed(options));
  if (options.hard_steps > 0) text += concat(", by labels for ", options.hard_steps, " steps");
  return text;
}

adapters::MethodEntry lora_mixer_entry() {
  adapters::MethodEntry entry{
      kArea,
      "LORA_MIXER",
      "LoRA experts routed by labels first, then softly, then by the best few",
      {},
      read_config};
  entry.keys = routed_keys(/*top_k=*/true);
  entry.tensor_prefix = "experts.";
  return entry;
}

}  // namespace graft::moe
