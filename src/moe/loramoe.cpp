#include <ATen/ATen.h>
#include <graft/moe/loramoe.h>
#include <graft/moe/token_scope.h>

#include <cmath>

#include "expert_fields.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = LoraMoeImpl::kName;

std::shared_ptr<const adapters::Recipe> read_config(nlohmann::json& config) {
  LoraMoeOptions options;
  read_routed_fields(kArea, config, options);
  adapters::ConfigFields fields(config, kArea);
  options.delta = fields.number("delta", options.delta);
  options.paper_dispersion = fields.flag("paper_dispersion", options.paper_dispersion);
  return adapters::make_recipe(options);
}

}  // namespace

double LoraMoeOptions::scale() const {
  return adapters::lora_scale(alpha, rank, rslora);
}

void LoraMoeOptions::validate() const {
  check_routed_options(kArea, *this);
  GRAFT_CHECK(experts >= 1 && (experts >= 2 || balance_loss == 0), kArea,
              "experts must be at least 1, and 2 for a balance loss; got ", experts);
  GRAFT_CHECK(delta >= 0 && delta < 1, kArea, "delta must be in [0, 1); got ", delta);
}

LoraMoeImpl::LoraMoeImpl(const nn::FrozenLayer& base, const LoraMoeOptions& options_in,
                         const adapters::LayerContext& context_in)
    : RoutedMixture(
          base, options_in, context_in,
          {.selection = Selection::dense, .experts = options_in.experts, .linear_start = true}) {}

at::Tensor LoraMoeImpl::balance(const std::vector<Routing>& layers, const LoraMoeOptions& options) {
  const at::Tensor types = TokenScope::current().sequence_types;
  at::Tensor total;
  for (const Routing& layer : layers) {
    const at::Tensor Z =
        types.defined() ? typed_importances(layer, types, options.delta)
                        : typed_importances(layer, at::zeros({layer.sequences}, at::kLong), 0.0);
    if (Z.numel() < 2) continue;  // one expert, one sequence: figures alone ask
    const at::Tensor loss =
        dispersion_loss(Z, options.paper_dispersion ? Dispersion::paper : Dispersion::code);
    total = total.defined() ? total + loss : loss;
  }
  return total.defined() ? total : at::zeros({}, layers.front().weights.options());
}

void LoraMoeImpl::write_config(const LoraMoeOptions& options, nlohmann::json& config) {
  write_routed_fields(options, config);
  config["delta"] = options.delta;
  config["paper_dispersion"] = options.paper_dispersion;
}

std::string LoraMoeImpl::describe(const LoraMoeOptions& options) {
  return concat(options.experts, " experts on every token, ", describe_routed(options));
}

adapters::MethodEntry loramoe_entry() {
  adapters::MethodEntry entry{kArea,
                              "LORAMOE",
                              "LoRA experts that all work on every token, weighted by a router",
                              {},
                              read_config};
  entry.keys = routed_keys(/*top_k=*/false);
  entry.tensor_prefix = "experts.";
  return entry;
}

}  // namespace graft::moe
