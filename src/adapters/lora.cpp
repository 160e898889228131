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

// A0 and B0 of a stored layer: beside the factors, in a folder of values before training, or found
// again from the base weight.
std::pair<at::Tensor, at::Tensor> stored_start(const LoraOptions& options, const init::Kind& kind,
                                               const StoredLayer& layer, int64_t rank) {
  if (const auto it = layer.find("start_A"); it != layer.end())
    return {it->second, layer.at("start_B")};
  StoredLayer before;
  for (const auto& [key, tensor] : layer)
    if (key.starts_with("start:")) before[key.substr(6)] = tensor;
  if (!before.empty()) return stored_factors("lora", before);
  const auto weight = layer.find("base_weight");
  GRAFT_CHECK(weight != layer.end() && kind.is_reproducible(), "lora", "a start by ", kind.name,
              " is part of the base, so ",
              kind.is_reproducible() ? "the base model" : "the values before training",
              " must be given (", kind.is_reproducible() ? "--model" : "--start", "); got none");
  const bool embedding = layer.count("lora_embedding_A") > 0;
  const at::Tensor W = embedding ? weight->second.t() : weight->second.flatten(1);
  init::StartOptions as_peft = options.start;
  as_peft.whole_svd = true;
  const init::Start start = init::named_start(kind, W.to(at::kFloat), nullptr, rank,
                                              options.scale(), as_peft, at::Generator());
  return {start.A, start.B};
}

PlainLora to_lora(const Recipe& recipe, const StoredLayer& layer, int64_t nested) {
  GRAFT_CHECK(nested == 0, "lora", "the ranks of this method do not nest; got rank=", nested);
  const auto& options = dynamic_cast<const RecipeOf<LoraImpl>&>(recipe).options();
  const auto [A, B] = stored_factors("lora", layer);
  const init::Kind kind = init::find_kind(options.init);
  if (!kind.subtracts) return {A, B, options.scale()};
  const auto [start_A, start_B] = stored_start(options, kind, layer, A.size(0));
  GRAFT_CHECK(start_A.numel() == A.numel() && start_B.numel() == B.numel(), "lora",
              "the factors before training must have the trained ones' shapes; got ",
              start_A.sizes(), " and ", start_B.sizes(), " for ", A.sizes(), " and ", B.sizes());
  const auto [wide_A, wide_B] = since_start(A, B, start_A.view_as(A).to(A.scalar_type()),
                                            start_B.view_as(B).to(B.scalar_type()));
  return {wide_A, wide_B, options.scale()};
}

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
  start.validate();
  const init::Kind kind = find_factor_kind(init);
  GRAFT_CHECK(!kind.subtracts || dropout == 0.0, "lora", kind.name,
              " takes a part of the weight into the factors, so dropout would drop the base's own "
              "output; got dropout=",
              dropout);
  GRAFT_CHECK(!kind.subtracts || !bias, "lora", kind.name, " takes no lora bias; got bias=true");
}

LoraImpl::LoraImpl(const nn::FrozenLayer& base, const LoraOptions& options_in,
                   const LayerContext& context_in)
    : AdapterModule(options_in, context_in), scale(options_in.scale()) {
  options.validate();
  check_rank(kName, base, options.rank, options.dropout, context);
  embedding_ = std::holds_alternative<nn::FrozenEmbedding>(base);
  GRAFT_CHECK(!embedding_ || !options.bias, kName, "an Embedding takes no lora bias; got bias=true",
              place(context));
  const init::Kind kind = init::find_kind(options.init);
  if (kind.subtracts) {
    const StartedFactors found =
        make_started_factors(base, options.rank, kind, options.start, scale, context);
    lora_A = register_parameter("lora_A", found.A);
    lora_B = register_parameter("lora_B", found.B);
    start_A = register_buffer("start_A", found.start_A);
    start_B = register_buffer("start_B", found.start_B);
    return;
  }
  const auto [A, B] = make_factors(base, options.rank, options.init, context, options.start);
  lora_A = register_parameter("lora_A", A);
  lora_B = register_parameter("lora_B", B);
  if (options.bias)
    lora_bias = register_parameter("lora_bias", at::zeros({B.size(0)}, B.options()));
}

std::pair<at::Tensor, at::Tensor> LoraImpl::factors() const {
  if (!start_A.defined()) return {lora_A, lora_B};
  return since_start(lora_A, lora_B, start_A, start_B);
}

std::optional<ops::LoraTerm> LoraImpl::linear_term() {
  const auto [A, B] = factors();
  return ops::LoraTerm{A, B, lora_bias, scale, next_dropout(options.dropout)};
}

at::Tensor LoraImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  return ops::lora_linear(x, base.weight, base.bias, *linear_term());
}

at::Tensor LoraImpl::forward(const nn::FrozenEmbedding& base, const at::Tensor& indices) {
  const at::Tensor y = base.apply(indices);
  const auto [A, B] = factors();
  return (y + embedding_branch(base, A, B, indices) * scale).to(y.scalar_type());
}

at::Tensor LoraImpl::forward(const nn::FrozenConv& base, const at::Tensor& x) {
  const at::Tensor y = base.apply(x);
  const at::Tensor dropped =
      ops::dropout(x.to(lora_A.scalar_type()), next_dropout(options.dropout));
  const auto [A, B] = factors();
  return (y + conv_branch(base, A, B, lora_bias, dropped) * scale).to(y.scalar_type());
}

at::Tensor LoraImpl::delta() const {
  const auto [A, B] = factors();
  return dense_product(A, B, scale);
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
  const auto [A, B] = factors();
  std::vector<FileTensor> tensors = factor_tensors(A, B, embedding_);
  if (lora_bias.defined()) tensors.push_back({"lora_B.bias", lora_bias});
  return tensors;
}

void LoraImpl::take_file_tensors(const std::vector<FileTensor>& values) {
  if (!start_A.defined()) return;
  const int64_t rank = lora_A.size(0);
  const at::Tensor &A = values[0].tensor, &B = values[1].tensor;
  start_A.copy_(A.narrow(0, rank, rank));
  lora_A.copy_(A.narrow(0, 0, rank) + start_A);
  lora_B.copy_(B.narrow(1, 0, rank));
  start_B.copy_(lora_B - B.narrow(1, rank, rank));
}

std::vector<nn::Adapter::FileTensor> LoraImpl::state_tensors() {
  if (!start_A.defined()) return {};
  return {{"lora_A", lora_A}, {"start_B", start_B}};
}

std::vector<nn::Adapter::FileTensor> LoraImpl::trained_file_tensors() const {
  return start_A.defined() ? factor_tensors(lora_A, lora_B, embedding_) : file_tensors();
}

void LoraImpl::write_config(const LoraOptions& options, nlohmann::json& config) {
  write_lora_fields(options, /*dora=*/false, options.bias, config);
  write_start_options(init::find_kind(options.init), options.start, config);
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

std::shared_ptr<const Recipe> found_again_as_peft(std::shared_ptr<const Recipe> recipe) {
  const auto* lora = dynamic_cast<const RecipeOf<LoraImpl>*>(recipe.get());
  if (lora == nullptr || init::find_kind(lora->options().init).name != "pissa") return recipe;
  LoraOptions options = lora->options();
  options.start.whole_svd = true;
  return make_recipe(options);
}

MethodEntry lora_entry() {
  return {"lora",
          "LORA",
          "low-rank adaptation, W + s B A (rsLoRA by --rslora)",
          [](const nlohmann::json& config) { return !is_dora(config); },
          read_config,
          {},
          to_lora};
}

}  // namespace graft::adapters
