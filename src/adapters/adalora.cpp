#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/adapters/adalora.h>
#include <graft/adapters/config_fields.h>
#include <graft/core/error.h>
#include <graft/ops/lora_linear.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "low_rank.h"

namespace graft::adapters {
namespace {

constexpr const char* kArea = AdaLoraImpl::kName;
constexpr double kStartDeviation = 0.02;

// PEFT opens no folder without total_step. Where the options leave it to the training loop, a file
// holds this number, which no run reaches, and reading turns it into "not given" again.
constexpr int64_t kOpenEnd = 2147483647;

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  ConfigFields fields(config, kArea);
  AdaLoraOptions options;
  options.init_rank = fields.integer("init_r", options.init_rank);
  options.target_rank = fields.integer("target_r", options.target_rank);
  options.lora_alpha = fields.number("lora_alpha", options.lora_alpha);
  options.dropout = fields.number("lora_dropout", options.dropout);
  options.tinit = fields.integer("tinit", options.tinit);
  options.tfinal = fields.integer("tfinal", options.tfinal);
  options.delta_t = fields.integer("deltaT", options.delta_t);
  options.beta1 = fields.number("beta1", options.beta1);
  options.beta2 = fields.number("beta2", options.beta2);
  options.orth_reg_weight = fields.number("orth_reg_weight", options.orth_reg_weight);
  options.total_step = fields.integer("total_step");
  if (options.total_step == kOpenEnd) options.total_step.reset();
  // To PEFT's AdaLoRA any name of an initialiser means the start that `true` means.
  options.random_start = init_from_config(kArea, config, "init_lora_weights") == "random";
  // PEFT's AdaLoRA does not read `r`; the others speak to options that are off.
  fields.ignore({"r", "qalora_group_size", "megatron_core", "eva_config"});
  return make_recipe(options);
}

void check_phases(int64_t tinit, int64_t tfinal, int64_t total) {
  // Without sums of the options, which a file may have chosen to overflow.
  GRAFT_CHECK(total > 0 && tinit < total && tfinal < total - tinit, kArea,
              "tinit + tfinal must leave steps of total_step for the budget to fall; got tinit=",
              tinit, ", tfinal=", tfinal, ", total_step=", total);
}

// |P P^T - I|_F for the rows of P. Its gradient at exactly 0 is 0.
at::Tensor distance_from_orthonormal(const at::Tensor& P) {
  return at::linalg_vector_norm(P.mm(P.t()) - at::eye(P.size(0), P.options()));
}

// PEFT wants to know which triplets of a pruned layer are left, of init_r; their values lie in the
// file in this order, so any list with as many trues opens it. A key of rank_pattern is anchored to
// one layer's whole name ("^layers\.0\.q_proj") when it comes from a file.
void write_pruned_layers(const AdaLoraOptions& options, nlohmann::json& config) {
  const auto pattern = config.find("rank_pattern");
  if (pattern == config.end() || pattern->empty()) return;
  nlohmann::json lists = nlohmann::json::object();
  for (const auto& [key, rank] : pattern->items()) {
    std::string name = key;
    std::erase_if(name, [](char c) { return c == '^' || c == '\\'; });
    nlohmann::json kept = nlohmann::json::array();
    for (int64_t i = 0; i < options.init_rank; ++i) kept.push_back(i < rank.get<int64_t>());
    lists[name + ".lora_E"] = std::move(kept);
  }
  *pattern = std::move(lists);
}

PlainLora to_lora(const Recipe& recipe, const StoredLayer& layer, int64_t rank) {
  GRAFT_CHECK(rank == 0, kArea, "the ranks of this method do not nest; got rank=", rank);
  const at::Tensor &A = stored(kArea, layer, "lora_A"), &B = stored(kArea, layer, "lora_B"),
                   &E = stored(kArea, layer, "lora_E");
  GRAFT_CHECK(A.dim() == 2 && B.dim() == 2 && E.dim() == 2 && E.size(1) == 1 &&
                  A.size(0) == E.size(0) && B.size(1) == E.size(0),
              kArea, "A, E and B must fit each other; got ", A.sizes(), ", ", E.sizes(), " and ",
              B.sizes());
  const at::Tensor kept = E.view(-1).nonzero().view(-1);
  return {(A * E).index_select(0, kept), B.index_select(1, kept),
          dynamic_cast<const RecipeOf<AdaLoraImpl>&>(recipe).options().scale()};
}

}  // namespace

double AdaLoraOptions::scale() const {
  return lora_alpha / (static_cast<double>(init_rank) + 1e-5);
}

void AdaLoraOptions::validate() const {
  const auto decays = [](const char* name, double beta) {
    GRAFT_CHECK(beta > 0.0 && beta < 1.0, kArea, name, " must be in (0, 1); got ", beta);
  };
  GRAFT_CHECK(init_rank >= 1, kArea, "init_r must be in [1, min(in, out)]; got ", init_rank);
  GRAFT_CHECK(target_rank >= 1 && target_rank <= init_rank, kArea,
              "target_r must be in [1, init_r]; got ", target_rank, " for init_r=", init_rank);
  GRAFT_CHECK(!rank || (*rank >= 0 && *rank <= init_rank), kArea,
              "a pruned layer's rank must be in [0, init_r]; got ", rank.value_or(0),
              " for init_r=", init_rank);
  GRAFT_CHECK(std::isfinite(lora_alpha) && lora_alpha > 0.0, kArea,
              "lora_alpha must be finite and positive; got ", lora_alpha);
  GRAFT_CHECK(tinit >= 0 && tfinal >= 0, kArea, "tinit and tfinal must be >= 0; got ", tinit,
              " and ", tfinal);
  GRAFT_CHECK(delta_t >= 1, kArea, "deltaT must be at least 1; got ", delta_t);
  GRAFT_CHECK(std::isfinite(orth_reg_weight) && orth_reg_weight >= 0.0, kArea,
              "orth_reg_weight must be >= 0; got ", orth_reg_weight);
  decays("beta1", beta1);
  decays("beta2", beta2);
  ops::check_dropout(dropout, kArea);
  if (total_step) check_phases(tinit, tfinal, *total_step);
}

int64_t AdaLoraSchedule::budget(int64_t step) const {
  if (step <= tinit) return initial;
  if (step >= last_choice()) return target;
  const double left =
      1.0 - static_cast<double>(step - tinit) / static_cast<double>(last_choice() - tinit);
  return static_cast<int64_t>(static_cast<double>(initial - target) * std::pow(left, 3.0) +
                              static_cast<double>(target));
}

bool AdaLoraSchedule::chooses(int64_t step) const {
  return step > tinit && (step == last_choice() || (step < last_choice() && step % delta_t == 0));
}

AdaLoraImpl::AdaLoraImpl(const nn::FrozenLayer& base, const AdaLoraOptions& options_in,
                         const LayerContext& context_in)
    : AdapterModule(options_in, context_in), scale(options_in.scale()) {
  options.validate();
  check_supports(base, context.name);
  check_rank(kName, base, options.init_rank, options.dropout, context);
  if (const auto* conv = std::get_if<nn::FrozenConv>(&base))
    GRAFT_CHECK(conv->groups == 1, kName,
                "the factors of a convolution with groups would mix them; got groups=",
                conv->groups, place(context));
  GRAFT_CHECK(!context.initialise || !options.rank, kName,
              "training allots the ranks itself, and what it has pruned trains no further but as "
              "plain LoRA; got rank=",
              options.rank.value_or(0), place(context));

  const auto [out, in] = dense_sizes(base);
  const int64_t rank = options.rank.value_or(options.init_rank);
  const auto type = at::TensorOptions().dtype(master_type(base));
  at::Tensor A = at::zeros({rank, in}, type), B = at::zeros({out, rank}, type),
             E = at::zeros({rank, 1}, type);
  if (context.initialise) {
    const auto generator = at::detail::createCPUGenerator(context.layer_seed());
    const double deviation = options.random_start ? 1.0 : kStartDeviation;
    A.normal_(0.0, deviation, generator);
    B.normal_(0.0, deviation, generator);
    if (options.random_start) E.normal_(0.0, 1.0, generator);
  }
  const auto device = nn::weight_of(base).device();
  lora_A = register_parameter("lora_A", A.to(device));
  lora_B = register_parameter("lora_B", B.to(device));
  lora_E = register_parameter("lora_E", E.to(device));
}

at::Tensor AdaLoraImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  return ops::lora_linear(
      x, base.weight, base.bias,
      {lora_A, lora_B, {}, scale, next_dropout(options.dropout), /*gate=*/lora_E.squeeze(1)});
}

at::Tensor AdaLoraImpl::forward(const nn::FrozenConv& base, const at::Tensor& x) {
  const at::Tensor y = base.apply(x);
  if (lora_E.size(0) == 0) return y;  // a kernel without outputs is no convolution to ATen
  const at::Tensor dropped =
      ops::dropout(x.to(lora_A.scalar_type()), next_dropout(options.dropout));
  auto [shape_A, shape_B] = factor_shapes(base, lora_A.size(0));
  const at::Tensor branch =
      conv_branch(base, (lora_E * lora_A).view(shape_A), lora_B.view(shape_B), {}, dropped);
  return (y + branch * scale).to(y.scalar_type());
}

at::Tensor AdaLoraImpl::delta() const {
  return lora_B.detach().mm((lora_E * lora_A).detach()).mul_(scale);
}

at::Tensor AdaLoraImpl::merged_weight(const nn::FrozenLinear& base) const {
  return add_to_weight(base, delta());
}

at::Tensor AdaLoraImpl::merged_weight(const nn::FrozenConv& base) const {
  return add_to_weight(base, delta());
}

std::vector<nn::Adapter::FileTensor> AdaLoraImpl::file_tensors() const {
  return {{"lora_A", lora_A}, {"lora_B", lora_B}, {"lora_E", lora_E}};
}

void AdaLoraImpl::ensure_state() {
  if (kept_.defined()) return;
  const at::Tensor* parameters[] = {&lora_A, &lora_B, &lora_E};
  for (size_t i = 0; i < importance_.size(); ++i) {
    importance_[i].average = at::zeros_like(*parameters[i]);
    importance_[i].uncertainty = at::zeros_like(*parameters[i]);
  }
  kept_ = at::ones({lora_E.size(0)}, lora_E.options().dtype(at::kBool));
}

std::vector<nn::Adapter::FileTensor> AdaLoraImpl::state_tensors() {
  ensure_state();
  const auto& [of_A, of_B, of_E] = importance_;
  return {{"importance_A", of_A.average},
          {"uncertainty_A", of_A.uncertainty},
          {"importance_B", of_B.average},
          {"uncertainty_B", of_B.uncertainty},
          {"importance_E", of_E.average},
          {"uncertainty_E", of_E.uncertainty},
          {"kept", kept_}};
}

void AdaLoraImpl::Importance::update(const at::Tensor& parameter, double beta1, double beta2) {
  const at::Tensor& gradient = parameter.grad();
  const at::Tensor now =
      gradient.defined() ? (parameter * gradient).abs() : at::zeros_like(parameter);
  average.mul_(beta1).add_(now, 1.0 - beta1);
  uncertainty.mul_(beta2).add_((now - average).abs(), 1.0 - beta2);
}

at::Tensor AdaLoraImpl::triplet_scores() const {
  const at::NoGradGuard no_grad;
  if (!kept_.defined()) return at::zeros({lora_E.size(0)}, lora_E.options());
  const auto& [of_A, of_B, of_E] = importance_;
  return of_E.score().squeeze(1) + (of_A.score().mean(1) + of_B.score().mean(0));
}

int64_t AdaLoraImpl::active_rank() const {
  return lora_E.count_nonzero().item<int64_t>();
}

AdaLoraSchedule AdaLoraImpl::schedule_of(const std::vector<AdaLoraImpl*>& adapters,
                                         const StepInfo& info) {
  const AdaLoraOptions& o = adapters.front()->options;
  const int64_t total = o.total_step.value_or(info.total_steps);
  GRAFT_CHECK(total > 0, kArea,
              "the number of steps must be known in advance: set total_step, or have the training "
              "loop report its total_steps; got neither");
  check_phases(o.tinit, o.tfinal, total);
  AdaLoraSchedule schedule{0,         o.target_rank * static_cast<int64_t>(adapters.size()),
                           o.tinit,   o.tfinal,
                           o.delta_t, total};
  for (const AdaLoraImpl* adapter : adapters) schedule.initial += adapter->lora_E.size(0);
  return schedule;
}

// Switches off the `off` triplets of the lowest score; of equal ones those that come first, so that
// the budget is met exactly.
void AdaLoraImpl::choose(const std::vector<AdaLoraImpl*>& adapters, int64_t off) {
  std::vector<at::Tensor> scores;
  for (const AdaLoraImpl* adapter : adapters) scores.push_back(adapter->triplet_scores());
  const at::Tensor all = at::cat(scores);
  const at::Tensor order =
      std::get<1>(at::sort(all, /*stable=*/true, /*dim=*/0, /*descending=*/false));
  at::Tensor kept = at::ones(all.sizes(), all.options().dtype(at::kBool));
  kept.index_fill_(0, order.narrow(0, 0, off), false);
  int64_t first = 0;
  for (AdaLoraImpl* adapter : adapters) {
    const int64_t rank = adapter->lora_E.size(0);
    adapter->kept_.copy_(kept.narrow(0, first, rank));
    first += rank;
  }
}

void AdaLoraImpl::begin_step(const std::vector<AdaLoraImpl*>& adapters, const StepInfo& info) {
  schedule_of(adapters, info);
}

at::Tensor AdaLoraImpl::penalty(const std::vector<AdaLoraImpl*>& adapters) {
  const double weight = adapters.front()->options.orth_reg_weight;
  if (weight == 0.0) return {};
  at::Tensor sum;
  for (const AdaLoraImpl* adapter : adapters) {
    const at::Tensor term =
        distance_from_orthonormal(adapter->lora_A) + distance_from_orthonormal(adapter->lora_B.t());
    sum = sum.defined() ? sum + term : term;
  }
  return sum * (weight / (2.0 * static_cast<double>(adapters.size())));
}

void AdaLoraImpl::end_step(const std::vector<AdaLoraImpl*>& adapters, const StepInfo& info) {
  const at::NoGradGuard no_grad;
  const AdaLoraSchedule schedule = schedule_of(adapters, info);
  const int64_t budget = schedule.budget(info.step);
  for (AdaLoraImpl* adapter : adapters) {
    adapter->budget_ = budget;
    adapter->ensure_state();
    if (info.step >= schedule.last_choice()) continue;
    const at::Tensor* parameters[] = {&adapter->lora_A, &adapter->lora_B, &adapter->lora_E};
    for (size_t i = 0; i < adapter->importance_.size(); ++i)
      adapter->importance_[i].update(*parameters[i], adapter->options.beta1,
                                     adapter->options.beta2);
  }
  const bool chooses = schedule.chooses(info.step);
  if (chooses) choose(adapters, schedule.initial - budget);
  // Between two choices the optimiser may bring triplets back.
  if (!chooses && info.step < schedule.last_choice()) return;
  for (AdaLoraImpl* adapter : adapters)
    adapter->lora_E.masked_fill_(adapter->kept_.logical_not().unsqueeze(1), 0.0);
}

Figures AdaLoraImpl::figures(const std::vector<AdaLoraImpl*>& adapters) {
  int64_t active = 0, all = 0;
  for (const AdaLoraImpl* adapter : adapters) {
    active += adapter->active_rank();
    all += adapter->lora_E.size(0);
  }
  const int64_t budget = adapters.front()->budget_;
  return {{"budget", static_cast<double>(budget < 0 ? all : budget)},
          {"active_rank", static_cast<double>(active) / static_cast<double>(adapters.size())}};
}

void AdaLoraImpl::write_config(const AdaLoraOptions& options, nlohmann::json& config) {
  config["init_r"] = options.init_rank;
  config["target_r"] = options.target_rank;
  config["lora_alpha"] = number_field(options.lora_alpha);
  config["lora_dropout"] = options.dropout;
  config["tinit"] = options.tinit;
  config["tfinal"] = options.tfinal;
  config["deltaT"] = options.delta_t;
  config["beta1"] = options.beta1;
  config["beta2"] = options.beta2;
  config["orth_reg_weight"] = options.orth_reg_weight;
  config["total_step"] = options.total_step.value_or(kOpenEnd);
  config["init_lora_weights"] = !options.random_start;
  config["fan_in_fan_out"] = false;
  write_pruned_layers(options, config);
}

std::string AdaLoraImpl::describe(const AdaLoraOptions& options) {
  std::string text = concat("rank ", options.init_rank, " to ", options.target_rank, ", alpha ",
                            options.lora_alpha, ", budget from step ", options.tinit);
  if (options.tfinal > 0) text += concat(", final ", options.tfinal, " steps");
  if (options.dropout > 0) text += concat(", dropout ", options.dropout);
  return text;
}

MethodEntry adalora_entry() {
  return {
      "adalora", "ADALORA",   "triplets B diag(E) A under a shrinking budget that all layers share",
      {},        read_config, {.rank = "init_r", .rslora = "", .init = ""},
      to_lora};
}

}  // namespace graft::adapters
