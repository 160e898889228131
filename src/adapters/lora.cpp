#include <ATen/ATen.h>
#include <graft/adapters/config_fields.h>
#include <graft/adapters/lora.h>
#include <graft/core/error.h>
#include <graft/ops/lora_linear.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "low_rank.h"

namespace graft::adapters {
namespace {

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  ConfigFields fields(config, "lora");
  LoraOptions options;
  options.rank = fields.integer("r", 8);
  options.alpha = fields.number("lora_alpha", 8.0);
  options.dropout = fields.number("lora_dropout", 0.0);
  options.rslora = fields.flag("use_rslora", false);
  options.bias = fields.flag("lora_bias", false);
  options.init = init_from_config("lora", config, "init_lora_weights");
  options.lr_ratio = fields.number("loraplus_lr_ratio", 1.0);
  // These speak only to options that are off, or to how values were found that the file already
  // holds.
  fields.ignore({"qalora_group_size", "megatron_core", "eva_config"});
  return make_recipe(options);
}

}  // namespace

double LoraOptions::scale() const {
  return alpha / (rslora ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank));
}

void LoraOptions::validate() const {
  GRAFT_CHECK(rank >= 1, "lora", "rank must be in [1, min(in, out)]; got rank=", rank);
  GRAFT_CHECK(std::isfinite(alpha) && alpha != 0.0, "lora",
              "alpha must be finite and not 0, which would switch the adapter off; got ", alpha);
  ops::check_dropout(dropout, "lora");
  GRAFT_CHECK(std::isfinite(lr_ratio) && lr_ratio > 0, "lora",
              "loraplus_lr_ratio must be positive; got ", lr_ratio);
}

LoraImpl::LoraImpl(const nn::FrozenLayer& base, const LoraOptions& options_in,
                   const LayerContext& context_in)
    : AdapterModule(options_in, context_in), scale(options_in.scale()) {
  options.validate();
  check_rank(kName, base, options.rank, options.dropout, context);
  embedding_ = std::holds_alternative<nn::FrozenEmbedding>(base);
  GRAFT_CHECK(!embedding_ || !options.bias, kName, "an Embedding takes no lora bias; got bias=true",
              place(context));
  const auto [A, B] = make_factors(base, options.rank, options.init, context);
  lora_A = register_parameter("lora_A", A);
  lora_B = register_parameter("lora_B", B);
  if (options.bias)
    lora_bias = register_parameter("lora_bias", at::zeros({B.size(0)}, B.options()));
}

at::Tensor LoraImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  return ops::lora_linear(x, base.weight, base.bias,
                          {lora_A, lora_B, lora_bias, scale, next_dropout(options.dropout)});
}

at::Tensor LoraImpl::forward(const nn::FrozenEmbedding& base, const at::Tensor& indices) {
  const at::Tensor y = base.apply(indices);
  return (y + embedding_branch(base, lora_A, lora_B, indices) * scale).to(y.scalar_type());
}

at::Tensor LoraImpl::forward(const nn::FrozenConv& base, const at::Tensor& x) {
  const at::Tensor y = base.apply(x);
  const at::Tensor dropped =
      ops::dropout(x.to(lora_A.scalar_type()), next_dropout(options.dropout));
  return (y + conv_branch(base, lora_A, lora_B, lora_bias, dropped) * scale).to(y.scalar_type());
}

at::Tensor LoraImpl::delta() const {
  return dense_product(lora_A, lora_B, scale);
}

at::Tensor LoraImpl::merged_weight(const nn::FrozenLayer& base) const {
  check_mergeable(kName, base, context);
  return add_to_weight(base, delta());
}

at::Tensor LoraImpl::merged_bias(const nn::FrozenLayer& base) const {
  const at::Tensor bias = nn::bias_of(base);
  if (!lora_bias.defined()) return bias;
  GRAFT_CHECK(bias.defined(), "lora",
              "a lora bias can only be merged into a layer that has a bias; got none",
              place(context));
  return (bias.detach() + lora_bias.detach() * scale).to(bias.scalar_type());
}

std::vector<nn::Adapter::FileTensor> LoraImpl::file_tensors() const {
  if (embedding_) return {{"lora_embedding_A", lora_A}, {"lora_embedding_B", lora_B}};
  std::vector<FileTensor> tensors = {{"lora_A.weight", lora_A}, {"lora_B.weight", lora_B}};
  if (lora_bias.defined()) tensors.push_back({"lora_B.bias", lora_bias});
  return tensors;
}

void LoraImpl::write_config(const LoraOptions& options, nlohmann::json& config) {
  config["r"] = options.rank;
  config["lora_alpha"] = number_field(options.alpha);
  config["lora_dropout"] = options.dropout;
  config["use_rslora"] = options.rslora;
  config["lora_bias"] = options.bias;
  config["init_lora_weights"] = init_to_config(options.init);
  config["use_dora"] = false;
  config["fan_in_fan_out"] = false;
}

ParameterRule LoraImpl::rule(const LoraOptions& options, std::string_view parameter) {
  return {parameter == "lora_A" ? 1.0 : options.lr_ratio, true};
}

std::string LoraImpl::describe(const LoraOptions& options) {
  std::string text = concat("rank ", options.rank, ", alpha ", options.alpha);
  if (options.rslora) text += ", rsLoRA";
  if (options.dropout > 0) text += concat(", dropout ", options.dropout);
  if (options.bias) text += ", lora bias";
  if (options.init != "kaiming") text += ", init " + options.init;
  if (options.lr_ratio != 1.0) text += concat(", LoRA+ ratio ", options.lr_ratio);
  return text;
}

MethodEntry lora_entry() {
  return {"lora", "LORA", "low-rank adaptation, W + s B A (rsLoRA by --rslora)",
          [](const nlohmann::json& config) { return !is_dora(config); }, read_config};
}

}  // namespace graft::adapters
