#include <ATen/ATen.h>
#include <graft/adapters/config_fields.h>
#include <graft/adapters/randlora.h>
#include <graft/core/error.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "low_rank.h"
#include "random_bases.h"

namespace graft::adapters {
namespace {

using ops::RandLoraPairing;

constexpr const char* kFilePrefix = "base_model.randlora_";
constexpr const char* kOwnType = "GRAFT_RANDLORA";

const char* name_of(RandLoraPairing pairing) {
  return pairing == RandLoraPairing::peft ? "peft" : "paper";
}
const char* name_of(RandLoraScaling scaling) {
  return scaling == RandLoraScaling::peft ? "peft" : "paper";
}

// Whether a field says "paper" rather than "peft".
bool is_paper(ConfigFields& fields, const char* key, const char* fallback) {
  const std::string value = fields.text(key, fallback);
  GRAFT_CHECK(value == "peft" || value == "paper", "randlora", key, " must be peft or paper; got '",
              value, "'");
  return value == "paper";
}

std::shared_ptr<const Recipe> read_config_with(nlohmann::json& config, const char* convention) {
  ConfigFields fields(config, "randlora");
  const bool paper = convention == std::string("paper");
  RandLoraOptions options;
  options.rank = fields.integer("r", 32);
  const double alpha = paper ? 2.0 * static_cast<double>(options.rank) : 640.0;
  options.alpha = fields.number("randlora_alpha", alpha);
  options.dropout = fields.number("randlora_dropout", 0.0);
  const bool sparse = fields.flag("sparse", false), very_sparse = fields.flag("very_sparse", false);
  options.bases = very_sparse ? RandLoraBases::very_sparse
                  : sparse    ? RandLoraBases::sparse
                              : RandLoraBases::dense;
  if (is_paper(fields, "randlora_pairing", convention)) options.pairing = RandLoraPairing::paper;
  if (is_paper(fields, "randlora_scaling", convention)) options.scaling = RandLoraScaling::paper;
  options.projection_key = fields.integer("projection_prng_key", 0);
  options.save_projection = fields.flag("save_projection", true);
  fields.ignore({"init_weights"});  // how values were found that the file already holds
  return make_recipe(options);
}

// Whether PEFT computes the same from such a configuration.
bool is_pefts(const RandLoraOptions& options, const nlohmann::json& config) {
  const auto alphas = config.find("alpha_pattern");
  return options.pairing == RandLoraPairing::peft && options.scaling == RandLoraScaling::peft &&
         (alphas == config.end() || alphas->empty());
}

}  // namespace

void RandLoraOptions::validate() const {
  GRAFT_CHECK(rank >= 1 && rank <= 65536, "randlora",
              "rank must be in [1, 65536]; got rank=", rank);
  GRAFT_CHECK(std::isfinite(alpha) && alpha != 0.0, "randlora",
              "alpha must be finite and not 0, which would switch the adapter off; got ", alpha);
  ops::check_dropout(dropout, "randlora");
}

std::shared_ptr<RandomBases> RandLoraImpl::make_shared_part(
    const RandLoraOptions& options,
    const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers, const LayerContext&) {
  for (const auto& [name, layer] : layers) check_supports(layer, name);
  return std::make_shared<RandomBases>(
      options.rank, [sizes = base_sizes(kName, layers), options](int64_t rank) {
        return draw_randlora_bases(sizes, rank, options.projection_key, options.bases);
      });
}

RandLoraImpl::RandLoraImpl(const nn::FrozenLayer& base, const RandLoraOptions& options_in,
                           const LayerContext& context_in)
    : AdapterModule(options_in, context_in) {
  options.validate();
  check_supports(base, context.name);
  bases_ = context.shared ? std::static_pointer_cast<RandomBases>(context.shared)
                          : make_shared_part(options, {{context.name, base}}, context);
  const BasePair& pair = bases_->of_rank(options.rank);
  A = register_buffer("randlora_A", pair.A);
  B = register_buffer("randlora_B", pair.B);
  std::tie(out_, in_) = dense_sizes(base);
  const int64_t p = std::min(out_, in_), count = (p + options.rank - 1) / options.rank;
  const auto of = at::TensorOptions(A.scalar_type()).device(nn::weight_of(base).device());
  const double start = context.initialise ? 1.0 / static_cast<double>(std::max(count, p)) : 0.0;
  lambda = register_parameter("randlora_lambda", at::zeros({options.rank, count}, of));
  gamma = register_parameter("randlora_gamma", at::full({count, p}, start, of));
  scale_ = options.alpha / static_cast<double>(options.rank);
  if (options.scaling == RandLoraScaling::paper) scale_ /= std::sqrt(static_cast<double>(count));
}

// The slices are views: column b r + a of a flattened B belongs to basis b, so the first N bases
// are its first N r columns.
ops::RandLoraTerm RandLoraImpl::term() const {
  const int64_t rank = lambda.size(0), q = std::max(out_, in_);
  ops::RandLoraTerm term;
  term.A = A.select(1, 0).narrow(1, 0, gamma.size(1)).to(lambda.device());
  term.B = B.flatten(1).narrow(0, 0, q).narrow(1, 0, bases() * rank).to(lambda.device());
  term.lambda = lambda;
  term.gamma = gamma;
  term.scale = scale_;
  term.pairing = options.pairing;
  return term;
}

at::Tensor RandLoraImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  ops::RandLoraTerm update = term();
  update.dropout = next_dropout(options.dropout);
  return ops::rand_lora_linear(x, base.weight, base.bias, update);
}

at::Tensor RandLoraImpl::delta() const {
  return ops::rand_lora_delta(out_, in_, term());
}

at::Tensor RandLoraImpl::merged_weight(const nn::FrozenLinear& base) const {
  return add_to_weight(base, delta());
}

std::vector<nn::Adapter::FileTensor> RandLoraImpl::file_tensors() const {
  return {{"randlora_lambda", lambda}, {"randlora_gamma", gamma}};
}

std::vector<nn::Adapter::FileTensor> RandLoraImpl::shared_file_tensors() const {
  return bases_->file_tensors(kFilePrefix);
}

void RandLoraImpl::write_config(const RandLoraOptions& options, nlohmann::json& config) {
  config["r"] = options.rank;
  config["randlora_alpha"] = number_field(options.alpha);
  config["randlora_dropout"] = options.dropout;
  config["sparse"] = options.bases == RandLoraBases::sparse;
  config["very_sparse"] = options.bases == RandLoraBases::very_sparse;
  config["projection_prng_key"] = options.projection_key;
  config["save_projection"] = options.save_projection;
  config["init_weights"] = true;
  config["fan_in_fan_out"] = false;
  if (is_pefts(options, config)) return;
  config["peft_type"] = kOwnType;
  config["randlora_pairing"] = name_of(options.pairing);
  config["randlora_scaling"] = name_of(options.scaling);
}

std::string RandLoraImpl::describe(const RandLoraOptions& options) {
  std::string text = concat("rank ", options.rank, ", alpha ", options.alpha);
  if (options.bases == RandLoraBases::sparse) text += ", sparse bases";
  if (options.bases == RandLoraBases::very_sparse) text += ", very sparse bases";
  if (options.pairing == RandLoraPairing::paper) text += ", the paper's pairing";
  if (options.scaling == RandLoraScaling::paper) text += ", scale alpha / (r sqrt(N))";
  if (options.dropout > 0) text += concat(", dropout ", options.dropout);
  if (options.projection_key != 0) text += concat(", projection key ", options.projection_key);
  if (!options.save_projection) text += ", bases not saved";
  return text;
}

MethodEntry randlora_entry() {
  MethodEntry entry{"randlora",
                    "RANDLORA",
                    "full-rank update from frozen random bases",
                    {},
                    [](nlohmann::json& config) { return read_config_with(config, "peft"); }};
  entry.keys = {.rank = "r",
                .alpha = "randlora_alpha",
                .dropout = "randlora_dropout",
                .rslora = "",
                .init = ""};
  entry.tensor_prefix = "randlora_";
  return entry;
}

MethodEntry randlora_paper_entry() {
  MethodEntry entry = randlora_entry();
  entry.name = "randlora-paper";
  entry.peft_type = kOwnType;
  entry.summary = "RandLoRA with the paper's pairing and the authors' scale";
  entry.read_config = [](nlohmann::json& config) { return read_config_with(config, "paper"); };
  return entry;
}

}  // namespace graft::adapters
