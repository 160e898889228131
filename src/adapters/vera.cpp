#include <ATen/ATen.h>
#include <graft/adapters/config_fields.h>
#include <graft/adapters/vera.h>
#include <graft/core/error.h>
#include <graft/ops/lora_linear.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "low_rank.h"
#include "random_bases.h"

namespace graft::adapters {
namespace {

constexpr const char* kFilePrefix = "base_model.vera_";

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  ConfigFields fields(config, "vera");
  VeraOptions options;
  options.rank = fields.integer("r", 256);
  options.dropout = fields.number("vera_dropout", 0.0);
  options.d_initial = fields.number("d_initial", 0.1);
  options.projection_key = fields.integer("projection_prng_key", 0);
  options.save_projection = fields.flag("save_projection", true);
  fields.ignore({"init_weights"});  // how values were found that the file already holds
  return make_recipe(options);
}

// diag(d) A and diag(p) B.
PlainLora to_lora(const Recipe&, const StoredLayer& layer, int64_t rank) {
  GRAFT_CHECK(rank == 0, "vera", "the ranks of VeRA do not nest; got rank=", rank);
  const at::Tensor &d = stored("vera", layer, "vera_lambda_d"),
                   &p = stored("vera", layer, "vera_lambda_b");
  const std::string other = concat(".rank_", d.numel());
  const auto shared = [&](const std::string& name) {
    const std::string key = kFilePrefix + name;
    return stored("vera", layer, layer.count(key + other) > 0 ? key + other : key);
  };
  at::Tensor A = shared("A");
  const at::Tensor B = shared("B");
  const auto in = layer.find("in_features");
  GRAFT_CHECK(in != layer.end(), "vera",
              "the base model must be given to have a plain LoRA form: a layer's input size is not "
              "in the file; got none");
  A = A.narrow(1, 0, std::min(A.size(1), in->second.item<int64_t>()));
  GRAFT_CHECK(A.dim() == 2 && B.dim() == 2 && A.size(0) == d.numel() && B.size(1) == d.numel() &&
                  B.size(0) >= p.numel(),
              "vera", "A must be [r, in] and B [out, r]; got ", A.sizes(), " and ", B.sizes(),
              " for r=", d.numel(), ", out=", p.numel());
  return {d.unsqueeze(1) * A, p.unsqueeze(1) * B.narrow(0, 0, p.numel()), 1.0};
}

}  // namespace

void VeraOptions::validate() const {
  GRAFT_CHECK(rank >= 1 && rank <= 65536, "vera", "rank must be in [1, 65536]; got rank=", rank);
  GRAFT_CHECK(std::isfinite(d_initial) && d_initial != 0.0, "vera",
              "d_initial must be finite and not 0, from which nothing trains; got ", d_initial);
  ops::check_dropout(dropout, "vera");
}

std::shared_ptr<RandomBases> VeraImpl::make_shared_part(
    const VeraOptions& options, const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers,
    const LayerContext&) {
  for (const auto& [name, layer] : layers) check_supports(layer, name);
  return std::make_shared<RandomBases>(
      options.rank, [sizes = base_sizes(kName, layers), key = options.projection_key](
                        int64_t rank) { return draw_vera_bases(sizes, rank, key); });
}

VeraImpl::VeraImpl(const nn::FrozenLayer& base, const VeraOptions& options_in,
                   const LayerContext& context_in)
    : AdapterModule(options_in, context_in) {
  options.validate();
  check_supports(base, context.name);
  bases_ = context.shared ? std::static_pointer_cast<RandomBases>(context.shared)
                          : make_shared_part(options, {{context.name, base}}, context);
  const BasePair& pair = bases_->of_rank(options.rank);
  A = register_buffer("vera_A", pair.A);
  B = register_buffer("vera_B", pair.B);
  const auto [out, in] = dense_sizes(base);
  in_ = in;
  const auto of = at::TensorOptions(A.scalar_type()).device(nn::weight_of(base).device());
  const double start = context.initialise ? options.d_initial : 0.0;
  lambda_b = register_parameter("vera_lambda_b", at::zeros({out}, of));
  lambda_d = register_parameter("vera_lambda_d", at::full({options.rank}, start, of));
}

at::Tensor VeraImpl::sliced_A() const {
  return A.narrow(1, 0, in_).to(lambda_d.device());
}

at::Tensor VeraImpl::sliced_B() const {
  return B.narrow(0, 0, lambda_b.size(0)).to(lambda_d.device());
}

at::Tensor VeraImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  return ops::lora_linear(x, base.weight, base.bias,
                          {sliced_A(),
                           sliced_B(),
                           {},
                           1.0,
                           next_dropout(options.dropout),
                           /*gate=*/lambda_d,
                           /*factor=*/lambda_b});
}

at::Tensor VeraImpl::delta() const {
  const at::Tensor down = lambda_d.detach().unsqueeze(1) * sliced_A();
  const at::Tensor up = lambda_b.detach().unsqueeze(1) * sliced_B();
  return dense_product(down, up, 1.0);
}

at::Tensor VeraImpl::merged_weight(const nn::FrozenLinear& base) const {
  return add_to_weight(base, delta());
}

std::vector<nn::Adapter::FileTensor> VeraImpl::file_tensors() const {
  return {{"vera_lambda_b", lambda_b}, {"vera_lambda_d", lambda_d}};
}

std::vector<nn::Adapter::FileTensor> VeraImpl::shared_file_tensors() const {
  return bases_->file_tensors(kFilePrefix);
}

void VeraImpl::write_config(const VeraOptions& options, nlohmann::json& config) {
  config["r"] = options.rank;
  config["vera_dropout"] = options.dropout;
  config["d_initial"] = options.d_initial;
  config["projection_prng_key"] = options.projection_key;
  config["save_projection"] = options.save_projection;
  config["init_weights"] = true;
  config["fan_in_fan_out"] = false;
}

std::string VeraImpl::describe(const VeraOptions& options) {
  std::string text = concat("rank ", options.rank, ", d from ", options.d_initial);
  if (options.dropout > 0) text += concat(", dropout ", options.dropout);
  if (options.projection_key != 0) text += concat(", projection key ", options.projection_key);
  if (!options.save_projection) text += ", projection not saved";
  return text;
}

MethodEntry vera_entry() {
  MethodEntry entry{
      "vera", "VERA", "two trained vectors around a frozen random pair", {}, read_config};
  entry.keys = {.rank = "r", .alpha = "", .dropout = "vera_dropout", .rslora = "", .init = ""};
  entry.to_lora = to_lora;
  entry.tensor_prefix = "vera_";
  return entry;
}

}  // namespace graft::adapters
