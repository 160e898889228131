#include <ATen/ATen.h>
#include <graft/adapters/config_fields.h>
#include <graft/adapters/dylora.h>
#include <graft/core/error.h>
#include <graft/core/philox.h>
#include <graft/ops/lora_linear.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "low_rank.h"

namespace graft::adapters {
namespace {

constexpr uint32_t kRankDraw = 0xD710A;  // sets these draws apart from dropout's

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  ConfigFields fields(config, "dylora");
  DyloraOptions options;
  options.rank = fields.integer("r", options.rank);
  options.alpha = fields.number("lora_alpha", options.alpha);
  options.dropout = fields.number("lora_dropout", options.dropout);
  options.init = init_from_config("dylora", config, "init_lora_weights");
  options.rank_min = fields.integer("rank_min", options.rank_min);
  options.rank_max = fields.integer("rank_max", options.rank_max);
  options.rank_weights = fields.numbers("rank_weights");
  options.frozen = fields.flag("frozen", options.frozen);
  options.eval_rank = fields.integer("eval_rank", options.eval_rank);
  return make_recipe(options);
}

// The leading `rank` units, laid out as a file of that rank holds them: the same operation on them
// gives the same bits.
at::Tensor leading_rows(const at::Tensor& A, int64_t rank) {
  return A.narrow(0, 0, rank);
}
at::Tensor leading_columns(const at::Tensor& B, int64_t rank) {
  return rank == B.size(1) ? B : B.narrow(1, 0, rank).contiguous();
}

// The leading units along a dimension, all but the last without a gradient.
at::Tensor last_unit_trained(const at::Tensor& factor, int64_t dim, int64_t rank) {
  return at::cat({factor.narrow(dim, 0, rank - 1).detach(), factor.narrow(dim, rank - 1, 1)}, dim);
}

PlainLora to_lora(const Recipe& recipe, const StoredLayer& layer, int64_t rank) {
  const auto& options = dynamic_cast<const RecipeOf<DyloraImpl>&>(recipe).options();
  const auto [A, B] = stored_factors("dylora", layer);
  const int64_t whole = A.size(0), largest = std::max(whole, options.rank);
  GRAFT_CHECK(rank >= 0 && rank <= largest, "dylora", "a rank to cut to must be in [1, ", largest,
              "]; got ", rank);
  if (rank == 0) rank = options.eval_rank == 0 ? whole : options.eval_rank;
  rank = std::min(rank, whole);  // of layers with a smaller R, all there is
  return {leading_rows(A, rank).clone(), leading_columns(B, rank).clone(),
          options.alpha / static_cast<double>(rank)};
}

}  // namespace

void DyloraOptions::validate() const {
  constexpr const char* kArea = "dylora";
  check_options(kArea, rank, alpha, dropout);
  GRAFT_CHECK(rank_min >= 1 && rank_min <= largest_drawn() && largest_drawn() <= rank, kArea,
              "the drawn ranks must be 1 <= rank_min <= rank_max <= r; got rank_min=", rank_min,
              ", rank_max=", largest_drawn(), ", r=", rank);
  GRAFT_CHECK(eval_rank >= 0 && eval_rank <= rank, kArea, "eval_rank must be in [1, ", rank,
              "], or 0 for the whole rank; got ", eval_rank);
  if (rank_weights.empty()) return;
  const int64_t ranks = largest_drawn() - rank_min + 1;
  GRAFT_CHECK(static_cast<int64_t>(rank_weights.size()) == ranks, kArea,
              "rank_weights must hold one number for each of the ", ranks, " ranks from ", rank_min,
              " to ", largest_drawn(), "; got ", rank_weights.size());
  const bool sound = std::all_of(rank_weights.begin(), rank_weights.end(),
                                 [](double w) { return std::isfinite(w) && w >= 0.0; });
  const double total = std::accumulate(rank_weights.begin(), rank_weights.end(), 0.0);
  GRAFT_CHECK(sound && total > 0.0 && std::isfinite(total), kArea,
              "rank_weights must be finite, none negative, not all 0; got ",
              nlohmann::json(rank_weights).dump());
}

int64_t draw_rank(const DyloraOptions& options, uint64_t seed, int64_t step) {
  const auto counter = static_cast<uint64_t>(step);
  const Philox4 words = philox4x32(
      {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), kRankDraw, 0}, seed);
  const uint64_t bits = (uint64_t{words.x} << 32 | words.y) >> 11;
  const double u = std::ldexp(static_cast<double>(bits), -53);  // uniform on [0, 1)
  const auto& weights = options.rank_weights;
  if (weights.empty()) {
    const int64_t ranks = options.largest_drawn() - options.rank_min + 1;
    return options.rank_min + static_cast<int64_t>(u * static_cast<double>(ranks));
  }
  const double at = u * std::accumulate(weights.begin(), weights.end(), 0.0);
  double below = 0.0;
  int64_t drawn = options.rank_min;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0.0) continue;
    drawn = options.rank_min + static_cast<int64_t>(i);
    below += weights[i];
    if (at < below) break;
  }
  return drawn;
}

DyloraImpl::DyloraImpl(const nn::FrozenLayer& base, const DyloraOptions& options_in,
                       const LayerContext& context_in)
    : AdapterModule(options_in, context_in) {
  options.validate();
  check_rank(kName, base, options.rank, options.dropout, context);
  const auto* conv = std::get_if<nn::FrozenConv>(&base);
  GRAFT_CHECK(conv == nullptr || conv->groups == 1, kName,
              "ranks do not nest in a convolution with groups; got groups=", conv->groups,
              place(context));
  embedding_ = std::holds_alternative<nn::FrozenEmbedding>(base);
  eval_rank_ = options.eval_rank == 0 ? options.rank : options.eval_rank;
  const auto [A, B] = make_factors(base, options.rank, options.init, context);
  lora_A = register_parameter("lora_A", A);
  lora_B = register_parameter("lora_B", B);
}

void DyloraImpl::set_rank(int64_t rank) {
  GRAFT_CHECK(rank >= 1 && rank <= options.rank, kName, "rank must be in [1, ", options.rank,
              "]; got ", rank, place(context));
  eval_rank_ = rank;
}

int64_t DyloraImpl::active_rank() const {
  if (!is_training()) return eval_rank_;
  return step_rank_ == 0 ? options.rank : step_rank_;
}

DyloraImpl::Leading DyloraImpl::leading() const {
  const int64_t rank = active_rank();
  const double scale = options.alpha / static_cast<double>(rank);
  const bool last_only = options.frozen && is_training() && step_rank_ != 0 && rank > 1;
  if (last_only)
    return {last_unit_trained(lora_A, 0, rank), last_unit_trained(lora_B, 1, rank), scale};
  return {leading_rows(lora_A, rank), leading_columns(lora_B, rank), scale};
}

std::optional<nn::LiveRows> DyloraImpl::live_rows(std::string_view parameter) const {
  const int64_t dim = parameter == "lora_A" ? 0 : 1;
  if (step_rank_ == 0) return nn::LiveRows{dim, 0, options.rank};
  return nn::LiveRows{dim, options.frozen ? step_rank_ - 1 : 0, step_rank_};
}

at::Tensor DyloraImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  const auto [A, B, scale] = leading();
  return ops::lora_linear(x, base.weight, base.bias,
                          {A, B, {}, scale, next_dropout(options.dropout)});
}

at::Tensor DyloraImpl::forward(const nn::FrozenEmbedding& base, const at::Tensor& indices) {
  const auto [A, B, scale] = leading();
  const at::Tensor y = base.apply(indices);
  return (y + embedding_branch(base, A, B, indices) * scale).to(y.scalar_type());
}

at::Tensor DyloraImpl::forward(const nn::FrozenConv& base, const at::Tensor& x) {
  const auto [A, B, scale] = leading();
  const at::Tensor y = base.apply(x);
  const at::Tensor dropped = ops::dropout(x.to(A.scalar_type()), next_dropout(options.dropout));
  return (y + conv_branch(base, A, B, {}, dropped) * scale).to(y.scalar_type());
}

at::Tensor DyloraImpl::merged_weight(const nn::FrozenLayer& base) const {
  const double scale = options.alpha / static_cast<double>(eval_rank_);
  return add_to_weight(base, dense_product(leading_rows(lora_A, eval_rank_),
                                           leading_columns(lora_B, eval_rank_), scale));
}

std::vector<nn::Adapter::FileTensor> DyloraImpl::file_tensors() const {
  return factor_tensors(lora_A, lora_B, embedding_);
}

void DyloraImpl::begin_step(const std::vector<DyloraImpl*>& layers, const StepInfo& info) {
  const auto largest = std::max_element(layers.begin(), layers.end(), [](auto* a, auto* b) {
    return a->options.rank < b->options.rank;
  });
  if (largest == layers.end()) return;
  const int64_t rank = draw_rank((*largest)->options, info.seed, info.step);
  for (DyloraImpl* layer : layers) layer->step_rank_ = std::min(rank, layer->options.rank);
}

Figures DyloraImpl::figures(const std::vector<DyloraImpl*>& layers) {
  int64_t rank = 0;
  for (const DyloraImpl* layer : layers) rank = std::max(rank, layer->step_rank_);
  return {{"rank", static_cast<double>(rank)}};
}

void DyloraImpl::write_config(const DyloraOptions& options, nlohmann::json& config) {
  write_factor_fields(config, options.rank, options.alpha, options.dropout, options.init);
  config["rank_min"] = options.rank_min;
  config["rank_max"] = options.rank_max;
  config["rank_weights"] = options.rank_weights;
  config["frozen"] = options.frozen;
  config["eval_rank"] = options.eval_rank;
}

std::string DyloraImpl::describe(const DyloraOptions& options) {
  std::string text = concat("rank ", options.rank, ", alpha ", options.alpha, ", trained at ranks ",
                            options.rank_min, " to ", options.largest_drawn());
  if (!options.rank_weights.empty()) text += " with weights";
  text += options.frozen ? ", one unit a step" : ", all leading units";
  if (options.dropout > 0) text += concat(", dropout ", options.dropout);
  if (options.init != "kaiming") text += ", init " + options.init;
  if (options.eval_rank != 0) text += concat(", used at rank ", options.eval_rank);
  return text;
}

void set_dylora_rank(torch::nn::Module& model, int64_t rank) {
  std::vector<DyloraImpl*> layers;
  for (const auto& module : model.modules(/*include_self=*/false))
    if (auto* layer = module->as<DyloraImpl>()) layers.push_back(layer);
  GRAFT_CHECK(!layers.empty(), "dylora",
              "a rank can be set in a model with DyLoRA layers; got a model without");
  int64_t largest = 0;
  for (const DyloraImpl* layer : layers) largest = std::max(largest, layer->options.rank);
  GRAFT_CHECK(rank >= 1 && rank <= largest, "dylora", "rank must be in [1, ", largest, "]; got ",
              rank);
  for (DyloraImpl* layer : layers) layer->set_rank(std::min(rank, layer->options.rank));
}

MethodEntry dylora_entry() {
  OptionKeys keys;
  keys.rslora = "";
  return {"dylora",
          "DYLORA",
          "LoRA that works at every rank up to its own, cut afterwards without a search",
          {},
          read_config,
          keys,
          to_lora,
          "lora_",
          /*ranks_nest=*/true};
}

}  // namespace graft::adapters
