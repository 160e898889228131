#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/adapters/config_fields.h>
#include <graft/adapters/sora.h>
#include <graft/core/error.h>
#include <graft/ops/lora_linear.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "low_rank.h"

namespace graft::adapters {
namespace {

constexpr uint64_t kGateSeed = 0x6A7E;  // the gate's own stream beside that of the factors

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  ConfigFields fields(config, "sora");
  SoraOptions options;
  options.rank = fields.integer("r", options.rank);
  options.alpha = fields.number("lora_alpha", options.alpha);
  options.dropout = fields.number("lora_dropout", options.dropout);
  options.init = init_from_config("sora", config, "init_lora_weights");
  options.threshold = fields.text("threshold", options.threshold);
  options.sparse_lambda = fields.number("sparse_lambda", options.sparse_lambda);
  options.sparse_schedule = fields.text("sparse_schedule", options.sparse_schedule);
  options.sparse_lambda_end = fields.number("sparse_lambda_end", options.sparse_lambda_end);
  options.sparse_stages = fields.integer("sparse_stages", options.sparse_stages);
  options.l1_penalty = fields.number("l1_penalty", options.l1_penalty);
  return make_recipe(options);
}

// g ~ N(0, 1), or zeros when values are about to be loaded.
at::Tensor make_gate(const nn::FrozenLayer& layer, int64_t rank, const LayerContext& context) {
  at::Tensor gate = at::zeros({rank}, at::TensorOptions().dtype(master_type(layer)));
  if (context.initialise)
    gate.normal_(0.0, 1.0, at::detail::createCPUGenerator(context.layer_seed() ^ kGateSeed));
  return gate.to(nn::weight_of(layer).device());
}

PlainLora to_lora(const Recipe& recipe, const StoredLayer& layer, int64_t rank) {
  GRAFT_CHECK(rank == 0, "sora",
              "units are cut where their gate is 0, not from a rank on; got rank=", rank);
  const auto& options = dynamic_cast<const RecipeOf<SoraImpl>&>(recipe).options();
  const auto [A, B] = stored_factors("sora", layer);
  const at::Tensor& gate = layer.at("lora_gate");
  std::vector<int64_t> one_a_unit(A.dim(), 1);
  one_a_unit[0] = A.size(0);
  const at::Tensor gated = A * gate.view(one_a_unit);
  const double scale = options.alpha / static_cast<double>(A.size(0));
  // A grouped convolution's B says by position which units it reads: none can go.
  if (B.size(1) != A.size(0)) return {gated, B.clone(), scale};
  const at::Tensor kept = gate.nonzero().flatten();
  return {gated.index_select(0, kept), B.index_select(1, kept), scale};
}

}  // namespace

double SoraOptions::strength(int64_t step, int64_t total_steps) const {
  if (sparse_schedule == "constant") return sparse_lambda;
  GRAFT_CHECK(total_steps >= 1, "sora",
              "a schedule of the threshold needs the run's length; got total_steps=", total_steps);
  const int64_t last = sparse_stages - 1,
                stage = std::clamp<int64_t>(step * sparse_stages / total_steps, 0, last);
  const double at = static_cast<double>(stage) / static_cast<double>(last), first = sparse_lambda,
               end = sparse_lambda_end;
  if (stage == 0) return first;
  if (sparse_schedule == "linear") return first + (end - first) * at;
  if (sparse_schedule == "exp_linear") return first * std::pow(end / first, at);
  // log_linear: the log of equal steps from e^first to e^end, with e^end taken out.
  const double low = std::exp(first - end);
  return end + std::log(low + (1.0 - low) * at);
}

double SoraOptions::xi(const StepInfo& info) const {
  const double value = strength(info.step, info.total_steps);
  return threshold == "proximal" ? info.lr * value : value;
}

void SoraOptions::validate() const {
  constexpr const char* kArea = "sora";
  const auto one_of = [](const std::string& value, std::initializer_list<const char*> list) {
    return std::any_of(list.begin(), list.end(), [&](const char* item) { return value == item; });
  };
  check_options(kArea, rank, alpha, dropout);
  GRAFT_CHECK(one_of(threshold, {"proximal", "constant", "released"}), kArea,
              "threshold must be proximal, constant or released; got '", threshold, "'");
  GRAFT_CHECK(std::isfinite(sparse_lambda) && sparse_lambda >= 0, kArea,
              "sparse_lambda must be finite and >= 0; got ", sparse_lambda);
  GRAFT_CHECK(std::isfinite(l1_penalty) && l1_penalty >= 0, kArea,
              "l1_penalty must be finite and >= 0; got ", l1_penalty);
  GRAFT_CHECK(one_of(sparse_schedule, {"constant", "linear", "log_linear", "exp_linear"}), kArea,
              "sparse_schedule must be constant, linear, log_linear or exp_linear; got '",
              sparse_schedule, "'");
  if (sparse_schedule == "constant") return;
  GRAFT_CHECK(std::isfinite(sparse_lambda_end) && sparse_lambda_end >= sparse_lambda, kArea,
              "sparse_lambda_end must be finite and at least sparse_lambda; got ",
              sparse_lambda_end, " for ", sparse_lambda);
  GRAFT_CHECK(sparse_stages >= 2 && sparse_stages <= 1'000'000, kArea,
              "sparse_stages must be in [2, 1000000]; got ", sparse_stages);
  GRAFT_CHECK(sparse_schedule != "exp_linear" || sparse_lambda > 0, kArea,
              "an exp_linear schedule must start above 0; got sparse_lambda=", sparse_lambda);
}

at::Tensor soft_threshold(const at::Tensor& v, double xi) {
  return v.sign() * (v.abs() - xi).clamp_min(0);
}

at::Tensor released_threshold(const at::Tensor& v, double xi) {
  const at::Tensor shrunk = at::where(v.abs() > xi, v - xi * v.sign(), v);
  return at::where(shrunk.abs() < xi, at::zeros_like(v), shrunk);
}

SoraImpl::SoraImpl(const nn::FrozenLayer& base, const SoraOptions& options_in,
                   const LayerContext& context_in)
    : AdapterModule(options_in, context_in), scale(options_in.scale()) {
  options.validate();
  check_rank(kName, base, options.rank, options.dropout, context);
  embedding_ = std::holds_alternative<nn::FrozenEmbedding>(base);
  const auto [A, B] = make_factors(base, options.rank, options.init, context);
  lora_A = register_parameter("lora_A", A);
  lora_B = register_parameter("lora_B", B);
  lora_gate = register_parameter("lora_gate", make_gate(base, options.rank, context));
}

at::Tensor SoraImpl::gated_A() const {
  std::vector<int64_t> one_a_unit(lora_A.dim(), 1);
  one_a_unit[0] = options.rank;
  return lora_A * lora_gate.view(one_a_unit);
}

at::Tensor SoraImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  return ops::lora_linear(x, base.weight, base.bias,
                          {lora_A, lora_B, {}, scale, next_dropout(options.dropout), lora_gate});
}

// B is the small factor here: gating its columns costs less than gating the hidden units or A.
at::Tensor SoraImpl::forward(const nn::FrozenEmbedding& base, const at::Tensor& indices) {
  const at::Tensor y = base.apply(indices);
  return (y + embedding_branch(base, lora_A, lora_B * lora_gate, indices) * scale)
      .to(y.scalar_type());
}

at::Tensor SoraImpl::forward(const nn::FrozenConv& base, const at::Tensor& x) {
  const at::Tensor y = base.apply(x);
  const at::Tensor dropped =
      ops::dropout(x.to(lora_A.scalar_type()), next_dropout(options.dropout));
  return (y + conv_branch(base, gated_A(), lora_B, {}, dropped) * scale).to(y.scalar_type());
}

at::Tensor SoraImpl::merged_weight(const nn::FrozenLayer& base) const {
  check_mergeable(kName, base, context);
  return add_to_weight(base, dense_product(gated_A(), lora_B, scale));
}

std::vector<nn::Adapter::FileTensor> SoraImpl::file_tensors() const {
  std::vector<FileTensor> tensors = factor_tensors(lora_A, lora_B, embedding_);
  tensors.push_back({"lora_gate", lora_gate});
  return tensors;
}

int64_t SoraImpl::active_rank() const {
  return lora_gate.count_nonzero().item<int64_t>();
}

at::Tensor SoraImpl::penalty(const std::vector<SoraImpl*>& layers) {
  if (layers.empty() || layers.front()->options.l1_penalty == 0.0) return {};
  std::vector<at::Tensor> gates;
  for (const SoraImpl* layer : layers) gates.push_back(layer->lora_gate);
  return at::cat(gates).abs().mean() * layers.front()->options.l1_penalty;
}

void SoraImpl::end_step(const std::vector<SoraImpl*>& layers, const StepInfo& info) {
  const at::NoGradGuard no_grad;
  for (SoraImpl* layer : layers) {
    const double xi = layer->options.xi(info);
    at::Tensor& gate = layer->lora_gate;
    gate.copy_(layer->options.threshold == "released" ? released_threshold(gate, xi)
                                                      : soft_threshold(gate, xi));
  }
}

Figures SoraImpl::figures(const std::vector<SoraImpl*>& layers) {
  double active = 0.0, units = 0.0;
  for (const SoraImpl* layer : layers) {
    active += static_cast<double>(layer->active_rank());
    units += static_cast<double>(layer->options.rank);
  }
  if (layers.empty()) return {};
  return {{"active_rank", active / static_cast<double>(layers.size())},
          {"sparsity", 1.0 - active / units}};
}

ParameterRule SoraImpl::rule(const SoraOptions&, std::string_view parameter) {
  return {1.0, parameter != "lora_gate"};
}

void SoraImpl::write_config(const SoraOptions& options, nlohmann::json& config) {
  write_factor_fields(config, options.rank, options.alpha, options.dropout, options.init);
  config["threshold"] = options.threshold;
  config["sparse_lambda"] = options.sparse_lambda;
  config["sparse_schedule"] = options.sparse_schedule;
  config["sparse_lambda_end"] = options.sparse_lambda_end;
  config["sparse_stages"] = options.sparse_stages;
  config["l1_penalty"] = options.l1_penalty;
}

std::string SoraImpl::describe(const SoraOptions& options) {
  std::string text = concat("rank ", options.rank, " at the start, alpha ", options.alpha, ", ",
                            options.threshold, " threshold of strength ", options.sparse_lambda);
  if (options.sparse_schedule != "constant")
    text += concat(" to ", options.sparse_lambda_end, " (", options.sparse_schedule, ", ",
                   options.sparse_stages, " stages)");
  if (options.l1_penalty > 0) text += concat(", l1 penalty ", options.l1_penalty);
  if (options.dropout > 0) text += concat(", dropout ", options.dropout);
  if (options.init != "kaiming") text += ", init " + options.init;
  return text;
}

MethodEntry sora_entry() {
  OptionKeys keys;
  keys.rslora = "";
  return {"sora",
          "SORA",
          "LoRA with a gate a unit that training drives to 0: the rank shrinks by itself",
          {},
          read_config,
          keys,
          to_lora};
}

}  // namespace graft::adapters
