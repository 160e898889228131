#include <ATen/ATen.h>
#include <graft/moe/adamole.h>

#include <cmath>

#include "expert_fields.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = AdaMoleImpl::kName;

std::shared_ptr<const adapters::Recipe> read_config(nlohmann::json& config) {
  AdaMoleOptions options;
  read_routed_fields(kArea, config, options);
  adapters::ConfigFields fields(config, kArea);
  options.max_threshold = fields.number("max_threshold", options.max_threshold);
  return adapters::make_recipe(options);
}

}  // namespace

double AdaMoleOptions::scale() const {
  return adapters::lora_scale(alpha, rank, rslora);
}

RouterOptions AdaMoleOptions::router() const {
  return {.selection = Selection::threshold,
          .experts = experts,
          .tau_max = max_threshold,
          .linear_start = true};
}

void AdaMoleOptions::validate() const {
  check_routed_options(kArea, *this);
  router().validate();
}

AdaMoleImpl::AdaMoleImpl(const nn::FrozenLayer& base, const AdaMoleOptions& options_in,
                         const adapters::LayerContext& context_in)
    : RoutedMixture(base, options_in, context_in, options_in.router()) {}

at::Tensor AdaMoleImpl::balance(const std::vector<Routing>& layers, const AdaMoleOptions&) {
  return balance_loss(layers, balance_of("adamole"));
}

adapters::Figures AdaMoleImpl::figures(const std::vector<AdaMoleImpl*>& layers) {
  adapters::Figures figures = RoutedMixture::figures(layers);
  double active = 0, tokens = 0;
  for (const AdaMoleImpl* layer : layers) {
    const Routing& routing = layer->routing();
    if (!routing.logits.defined()) continue;
    active += (routing.experts >= 0).sum().item<double>();
    tokens += static_cast<double>(routing.valid.defined() ? routing.valid.sum().item<int64_t>()
                                                          : routing.tokens());
  }
  if (tokens > 0) figures.emplace_back("active_experts", active / tokens);
  return figures;
}

void AdaMoleImpl::write_config(const AdaMoleOptions& options, nlohmann::json& config) {
  write_routed_fields(options, config);
  config["max_threshold"] = options.max_threshold;
}

std::string AdaMoleImpl::describe(const AdaMoleOptions& options) {
  return concat("up to ", options.experts, " experts a token, ", describe_routed(options));
}

adapters::MethodEntry adamole_entry() {
  adapters::MethodEntry entry{kArea,
                              "ADAMOLE",
                              "LoRA experts above a trained threshold, as many as a token needs",
                              {},
                              read_config};
  entry.keys = routed_keys(/*top_k=*/false);
  entry.tensor_prefix = "experts.";
  return entry;
}

}  // namespace graft::moe
