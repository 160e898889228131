#include <ATen/ATen.h>
#include <graft/adapters/config_fields.h>
#include <graft/adapters/paca.h>
#include <graft/core/error.h>
#include <graft/core/philox.h>
#include <graft/ops/sparse_linear.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "low_rank.h"
#include "positions.h"

namespace graft::adapters {
namespace {

constexpr const char* kArea = PacaImpl::kName;

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  ConfigFields fields(config, kArea);
  PacaOptions options;
  options.rank = fields.integer("r", options.rank);
  options.alpha = fields.number("paca_alpha", options.alpha);
  return make_recipe(options);
}

// `count` distinct numbers below `size`, ascending: the start of a Fisher-Yates shuffle whose i-th
// draw is Philox's i-th number.
std::vector<int32_t> draw_columns(int64_t count, int64_t size, uint64_t seed) {
  std::vector<int32_t> numbers(size);
  std::iota(numbers.begin(), numbers.end(), 0);
  for (int64_t i = 0; i < count; ++i) {
    const Philox4 words = philox4x32({static_cast<uint32_t>(i), 0, 0, 0}, seed);
    const uint64_t random = uint64_t{words.x} << 32 | words.y;
    std::swap(numbers[i], numbers[i + random % static_cast<uint64_t>(size - i)]);
  }
  numbers.resize(count);
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

// A: unit vectors as rows, B: D.
PlainLora to_lora(const Recipe& recipe, const StoredLayer& layer, int64_t rank) {
  GRAFT_CHECK(rank == 0, kArea, "the ranks of this method do not nest; got rank=", rank);
  PacaOptions options = dynamic_cast<const RecipeOf<PacaImpl>&>(recipe).options();
  const at::Tensor &D = stored(kArea, layer, "paca_weight"),
                   &columns = stored(kArea, layer, "paca_indices"),
                   &sizes = stored(kArea, layer, "paca_in_features");
  GRAFT_CHECK(D.dim() == 2 && columns.dim() == 1 && columns.size(0) == D.size(1) &&
                  columns.numel() > 0 && sizes.numel() == 1,
              kArea, "D [out, r], its columns [r] and one size must be stored; got ", D.sizes(),
              ", ", columns.sizes(), " and ", sizes.sizes());
  const auto in = sizes.item<int64_t>();
  check_positions(columns, in, kArea, "columns", "");
  options.rank = D.size(1);  // rank_pattern may have given this layer another one
  const at::Tensor A = at::zeros({options.rank, in}, D.options());
  A.scatter_(1, columns.to(at::kLong).unsqueeze(1), 1.0);
  return {A, D, options.scale()};
}

}  // namespace

double PacaOptions::scale() const {
  return alpha / static_cast<double>(rank);
}

void PacaOptions::validate() const {
  GRAFT_CHECK(rank >= 1, kArea, "rank must be in [1, in]; got rank=", rank);
  GRAFT_CHECK(std::isfinite(alpha) && alpha != 0.0, kArea,
              "alpha must be finite and not 0, which would switch the adapter off; got ", alpha);
}

PacaImpl::PacaImpl(const nn::FrozenLayer& base, const PacaOptions& options_in,
                   const LayerContext& context_in)
    : AdapterModule(options_in, context_in), scale(options_in.scale()) {
  options.validate();
  check_supports(base, context.name);
  const at::Tensor& weight = nn::weight_of(base);
  GRAFT_CHECK(at::isFloatingType(weight.scalar_type()), kArea,
              "the base weight must be floating point; got ", weight.scalar_type(), place(context));
  const auto [out, in] = dense_sizes(base);
  GRAFT_CHECK(options.rank <= in && in <= std::numeric_limits<int32_t>::max(), kArea,
              "rank must be in [1, in]; got rank=", options.rank, " for in=", in, place(context));
  in_ = in;
  at::Tensor chosen = at::zeros({options.rank}, at::TensorOptions(at::kInt));
  if (context.initialise)
    chosen = at::tensor(draw_columns(options.rank, in, context.layer_seed()),
                        at::TensorOptions(at::kInt));
  const auto type = at::TensorOptions(master_type(base)).device(weight.device());
  paca_weight = register_parameter("paca_weight", at::zeros({out, options.rank}, type));
  paca_indices = register_buffer("paca_indices", chosen.to(weight.device()));
  paca_in_features =
      register_buffer("paca_in_features", at::tensor({in}, at::TensorOptions(at::kInt)));
}

at::Tensor PacaImpl::columns() const {
  keep_int32(paca_indices, kArea, place(context));
  return paca_indices;
}

at::Tensor PacaImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  return ops::column_linear(x, base.weight, base.bias, {columns(), paca_weight, scale});
}

at::Tensor PacaImpl::merged_weight(const nn::FrozenLinear& base) const {
  check_positions(columns(), in_, kArea, "columns", place(context));
  return base.weight.detach()
      .to(paca_weight.scalar_type())
      .index_add(1, columns(), paca_weight.detach(), scale)
      .to(base.weight.scalar_type());
}

std::vector<nn::Adapter::FileTensor> PacaImpl::file_tensors() const {
  keep_int32(paca_in_features, kArea, place(context));
  return {{"paca_weight", paca_weight},
          {"paca_indices", columns()},
          {"paca_in_features", paca_in_features}};
}

void PacaImpl::check_file_tensor(std::string_view suffix, const at::Tensor& values) const {
  if (suffix == "paca_indices")
    check_positions(values, in_, kArea, "columns", place(context));
  else if (suffix == "paca_in_features")
    GRAFT_CHECK(values.numel() == 1 && values.item<double>() == static_cast<double>(in_), kArea,
                "a file's number of inputs must be the layer's, in=", in_, "; got ",
                values.item<double>(), place(context));
}

void PacaImpl::write_config(const PacaOptions& options, nlohmann::json& config) {
  config["r"] = options.rank;
  config["paca_alpha"] = number_field(options.alpha);
}

std::string PacaImpl::describe(const PacaOptions& options) {
  return concat("rank ", options.rank, ", alpha ", options.alpha);
}

MethodEntry paca_entry() {
  MethodEntry entry{
      "paca",
      "PACA",
      "partial connections: trains r input columns of the weight, keeps r numbers a token",
      {},
      read_config,
      {.alpha = "paca_alpha", .dropout = "", .rslora = "", .init = ""},
      to_lora};
  entry.tensor_prefix = "paca_";
  return entry;
}

}  // namespace graft::adapters
