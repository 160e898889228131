#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/adapters/config_fields.h>
#include <graft/adapters/shira.h>
#include <graft/core/error.h>
#include <graft/ops/sparse_linear.h>

#include <nlohmann/json.hpp>

#include "low_rank.h"
#include "positions.h"

namespace graft::adapters {
namespace {

constexpr const char* kArea = ShiraImpl::kName;

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  ConfigFields fields(config, kArea);
  ShiraOptions options;
  options.rank = fields.integer("r", options.rank);
  options.mask = fields.text("mask_type", options.mask);
  options.random_seed = fields.integer("random_seed");
  options.init_zero = fields.flag("init_weights", options.init_zero);
  return make_recipe(options);
}

// Places in [0, numel) of the entries, ascending.
at::Tensor choose_places(const at::Tensor& weight, int64_t count, const ShiraOptions& options,
                         const LayerContext& context) {
  at::Tensor places;
  if (options.mask == "random") {
    const auto seed =
        options.random_seed ? static_cast<uint64_t>(*options.random_seed) : context.layer_seed();
    const auto generator = at::detail::createCPUGenerator(seed);
    // PEFT's draw, whole: the first `count` of a shuffle of all places.
    places =
        at::randperm(weight.numel(), generator, at::TensorOptions(at::kLong)).narrow(0, 0, count);
  } else if (options.mask == "magnitude") {
    places = std::get<1>(weight.detach().cpu().to(at::kDouble).abs().flatten().topk(count));
  } else {
    fail(kArea, concat("mask must be random or magnitude to choose positions; got '", options.mask,
                       "'", place(context)));
  }
  return std::get<0>(places.sort());
}

}  // namespace

void ShiraOptions::validate() const {
  GRAFT_CHECK(rank >= 1, kArea, "rank must be at least 1; got rank=", rank);
}

ShiraImpl::ShiraImpl(const nn::FrozenLayer& base, const ShiraOptions& options_in,
                     const LayerContext& context_in)
    : AdapterModule(options_in, context_in) {
  options.validate();
  check_supports(base, context.name);
  const at::Tensor& weight = nn::weight_of(base);
  GRAFT_CHECK(at::isFloatingType(weight.scalar_type()), kArea,
              "the base weight must be floating point; got ", weight.scalar_type(), place(context));
  std::tie(out_, in_) = dense_sizes(base);
  GRAFT_CHECK(options.rank <= weight.numel() / (out_ + in_), kArea,
              "rank must be at most in * out / (in + out), all entries of the weight; got rank=",
              options.rank, " for in=", in_, ", out=", out_, place(context));
  const int64_t count = options.rank * (out_ + in_);
  at::Tensor values = at::zeros({count}, at::TensorOptions(master_type(base)));
  at::Tensor positions = at::zeros({2, count}, at::TensorOptions(at::kInt));
  if (context.initialise) {
    const at::Tensor places = choose_places(weight, count, options, context);
    positions = at::stack({places.floor_divide(in_), places.remainder(in_)}).to(at::kInt);
    if (!options.init_zero)
      values.normal_(0.0, 1.0, at::detail::createCPUGenerator(context.layer_seed()));
  }
  shira_weight = register_parameter("shira_weight", values.to(weight.device()));
  shira_indices = register_buffer("shira_indices", positions.to(weight.device()));
}

at::Tensor ShiraImpl::positions() const {
  keep_int32(shira_indices, kArea, place(context));
  return shira_indices;
}

at::Tensor ShiraImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  return ops::sparse_linear(x, base.weight, base.bias, {positions(), shira_weight, scale});
}

at::Tensor ShiraImpl::merged_weight(const nn::FrozenLinear& base) const {
  return ops::add_sparse(base.weight, {positions(), shira_weight, scale})
      .to(base.weight.scalar_type());
}

std::vector<nn::Adapter::FileTensor> ShiraImpl::file_tensors() const {
  return {{"shira_weight", shira_weight}, {"shira_indices", positions()}};
}

void ShiraImpl::check_file_tensor(std::string_view suffix, const at::Tensor& values) const {
  if (suffix != "shira_indices") return;
  check_positions(values[0], out_, kArea, "rows of trained entries", place(context));
  check_positions(values[1], in_, kArea, "columns of trained entries", place(context));
}

void ShiraImpl::write_config(const ShiraOptions& options, nlohmann::json& config) {
  config["r"] = options.rank;
  config["mask_type"] = options.mask;
  config["random_seed"] =
      options.random_seed ? nlohmann::json(*options.random_seed) : nlohmann::json();
  config["init_weights"] = options.init_zero;
  config["fan_in_fan_out"] = false;
}

std::string ShiraImpl::describe(const ShiraOptions& options) {
  std::string text = concat("rank ", options.rank, ", mask ", options.mask);
  if (options.random_seed) text += concat(", seed ", *options.random_seed);
  if (!options.init_zero) text += ", random values";
  return text;
}

MethodEntry shira_entry() {
  MethodEntry entry{
      "shira", "SHIRA",     "sparse high-rank: trains r (in + out) single entries of the weight",
      {},      read_config, {.alpha = "", .dropout = "", .rslora = "", .init = ""}};
  entry.tensor_prefix = "shira_";
  return entry;
}

}  // namespace graft::adapters
