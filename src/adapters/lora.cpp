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
  read_lora_fields("lora", config, options);
  options.bias = fields.flag("lora_bias", false);
  options.lr_ratio = fields.number("loraplus_lr_ratio", 1.0);
  return make_recipe(options);
}

}  // namespace

double LoraOptions::scale() const {
  return lora_scale(alpha, rank, rslora);
}

void LoraOptions::validate() const {
  check_options("lora", rank, alpha, dropout);
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
  std::vector<FileTensor> tensors = factor_tensors(lora_A, lora_B, embedding_);
  if (lora_bias.defined()) tensors.push_back({"lora_B.bias", lora_bias});
  return tensors;
}

void LoraImpl::write_config(const LoraOptions& options, nlohmann::json& config) {
  write_lora_fields(options, /*dora=*/false, options.bias, config);
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
