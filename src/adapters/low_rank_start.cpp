// Where the factors of methods with A and B start.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/core/error.h>
#include <graft/init/initialiser.h>
#include <graft/init/named_start.h>

#include <nlohmann/json.hpp>

#include "low_rank.h"

namespace graft::adapters {
namespace {

// What attach found out is about Linear layers; the weight alone serves every kind without groups.
void check_start_fits(const nn::FrozenLayer& layer, const init::Kind& kind,
                      const LayerContext& context) {
  const auto* conv = std::get_if<nn::FrozenConv>(&layer);
  const bool fits = kind.needs == init::Needs::weight
                        ? conv == nullptr || conv->groups == 1
                        : std::holds_alternative<nn::FrozenLinear>(layer);
  GRAFT_CHECK(
      fits, "init", kind.name, " does not fit ",
      kind.needs == init::Needs::weight ? "a convolution with groups" : nn::kind_name(layer),
      place(context));
}

// The start of that layer; runs the decomposition.
init::Start find_start(const nn::FrozenLayer& layer, int64_t rank, const init::Kind& kind,
                       const init::StartOptions& options, double scale,
                       const LayerContext& context) {
  check_start_fits(layer, kind, context);
  return found_start(layer, context, [&](const at::Tensor& weight) {
    return init::named_start(kind, weight, context.facts.get(), rank, scale, options,
                             at::detail::createCPUGenerator(context.layer_seed()));
  });
}

}  // namespace

init::Start found_start(const nn::FrozenLayer& layer, const LayerContext& context,
                        const std::function<init::Start(const at::Tensor& weight)>& find) {
  try {
    init::Start start = find(
        dense_weight(layer).to(at::TensorOptions().dtype(master_type(layer)).device(at::kCPU)));
    if (context.report != nullptr)
      *context.report = {context.name, start.A.size(0), start.singular_values, start.explained};
    return start;
  } catch (const Error& error) {
    throw Error(error.what() + place(context));
  }
}

init::Kind find_factor_kind(std::string_view name) {
  init::Kind kind = init::find_kind(name);
  GRAFT_CHECK(
      !kind.has_core(), "init", kind.name,
      " needs a matrix between A and B, which lora-xs alone starts so; use it with lora-xs");
  return kind;
}

std::pair<at::Tensor, at::Tensor> make_factors(const nn::FrozenLayer& layer, int64_t rank,
                                               const std::string& init, const LayerContext& context,
                                               const init::StartOptions& start) {
  const init::Kind kind = find_factor_kind(init);
  GRAFT_CHECK(!kind.subtracts, "init", kind.name,
              " starts from the base weight's own part, which this method does not subtract; use "
              "it with lora",
              place(context));
  const auto [shape_A, shape_B] = factor_shapes(layer, rank);
  const auto options = at::TensorOptions().dtype(master_type(layer));
  at::Tensor A = at::zeros(shape_A, options), B = at::zeros(shape_B, options);
  if (context.initialise && kind.needs != init::Needs::nothing) {
    A.copy_(find_start(layer, rank, kind, start, 1.0, context).A);
  } else if (context.initialise) {
    const auto generator = at::detail::createCPUGenerator(context.layer_seed());
    if (std::holds_alternative<nn::FrozenEmbedding>(layer))
      init::initialise_embedding(init, {A, B}, generator);
    else
      init::initialise(init, {A, B}, generator);
  }
  const auto device = nn::weight_of(layer).device();
  return {A.to(device), B.to(device)};
}

StartedFactors make_started_factors(const nn::FrozenLayer& layer, int64_t rank,
                                    const init::Kind& kind, const init::StartOptions& options,
                                    double scale, const LayerContext& context) {
  check_start_fits(layer, kind, context);
  const auto [out, in] = dense_sizes(layer);
  const auto [shape_A, shape_B] = factor_shapes(layer, init::rank_of_start(kind, rank, out, in));
  const auto type = at::TensorOptions().dtype(master_type(layer));
  const auto device = nn::weight_of(layer).device();
  StartedFactors factors;
  if (context.initialise) {
    const init::Start start = find_start(layer, shape_A[0], kind, options, scale, context);
    factors.A = start.A.to(type).reshape(shape_A).contiguous().to(device);
    factors.B = start.B.to(type).reshape(shape_B).contiguous().to(device);
  } else {
    factors.A = at::zeros(shape_A, type.device(device));
    factors.B = at::zeros(shape_B, type.device(device));
  }
  factors.start_A = factors.A.clone();
  factors.start_B = factors.B.clone();
  return factors;
}

void read_start_options(const char* method, nlohmann::json& config, init::StartOptions& options) {
  const auto part = [&](const char* key, auto read) {
    const auto it = config.find(key);
    if (it == config.end()) return;
    nlohmann::json fields = std::move(*it);
    config.erase(it);
    if (fields.is_null()) return;
    GRAFT_CHECK(fields.is_object(), method, key, " must be an object; got ", fields.dump());
    read(fields);
    GRAFT_CHECK(fields.empty(), method, key, " holds an option that graft does not know; got ",
                fields.begin().key());
  };
  part("lora_ga_config", [&](nlohmann::json& json) {
    ConfigFields fields(json, method);
    options.lora_ga.direction = fields.text("direction", options.lora_ga.direction);
    options.lora_ga.scale = fields.text("scale", options.lora_ga.scale);
    options.lora_ga.gamma = fields.number("stable_gamma", options.lora_ga.gamma);
    options.lora_ga.peft_variant = fields.flag("peft_variant", options.lora_ga.peft_variant);
  });
  part("nystrom_config", [&](nlohmann::json& json) {
    ConfigFields fields(json, method);
    options.nystrom.core = fields.text("core", options.nystrom.core);
    options.nystrom.rcond = fields.number("rcond", options.nystrom.rcond);
  });
  part("eva_config", [&](nlohmann::json& json) {
    ConfigFields fields(json, method);
    options.eva.rho = fields.number("rho", options.eva.rho);
    options.eva.tau = fields.number("tau", options.eva.tau);
    options.eva.whiten = fields.flag("whiten", options.eva.whiten);
    options.eva.adjust_scaling_factors =
        fields.flag("adjust_scaling_factors", options.eva.adjust_scaling_factors);
    fields.ignore({"use_label_mask", "label_mask_value"});  // the caller's batches say what counts
  });
  part("corda_config", [&](nlohmann::json& json) {
    ConfigFields fields(json, method);
    options.corda_method = fields.text("corda_method", options.corda_method);
    fields.ignore({"cache_file", "covariance_file", "verbose", "use_float16_for_covariance",
                   "prune_temporary_fields"});
  });
}

void write_start_options(const init::Kind& kind, const init::StartOptions& options,
                         nlohmann::json& config) {
  if (kind.name == "lora_ga")
    config["lora_ga_config"] = {{"direction", options.lora_ga.direction},
                                {"scale", options.lora_ga.scale},
                                {"stable_gamma", number_field(options.lora_ga.gamma)},
                                {"peft_variant", options.lora_ga.peft_variant}};
  if (kind.name == "nystrom")
    config["nystrom_config"] = {{"core", options.nystrom.core}, {"rcond", options.nystrom.rcond}};
  if (kind.name == "eva")
    config["eva_config"] = {{"rho", options.eva.rho},
                            {"tau", options.eva.tau},
                            {"whiten", options.eva.whiten},
                            {"adjust_scaling_factors", options.eva.adjust_scaling_factors}};
  if (kind.name == "corda") config["corda_config"] = {{"corda_method", options.corda_method}};
}

}  // namespace graft::adapters
