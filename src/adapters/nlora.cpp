#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/adapters/config_fields.h>
#include <graft/adapters/nlora.h>
#include <graft/core/error.h>
#include <graft/init/start.h>
#include <graft/ops/lora_linear.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "low_rank.h"

namespace graft::adapters {
namespace {

constexpr const char* kArea = NloraImpl::kName;

// N's own random numbers beside A's.
constexpr uint64_t kCoreSeed = 0x6E6C6F72614E2121;

struct Factors {
  at::Tensor A, N, B;
};

// Zeros where values are about to be loaded.
Factors slora_start(const nn::FrozenLayer& base, int64_t rank, const LayerContext& context) {
  const auto [A, B] = make_factors(base, rank, "kaiming", context);
  at::Tensor N = at::zeros({rank, rank}, A.options().device(at::kCPU));
  if (context.initialise) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(rank));
    N.uniform_(-bound, bound, at::detail::createCPUGenerator(context.layer_seed() ^ kCoreSeed));
  }
  return {A, N.to(A.device()), B};
}

init::NystromOptions nystrom_options(const NloraOptions& options) {
  return {options.start_by, options.rcond, options.subtracts()};
}

Factors nystrom_start(const nn::FrozenLayer& base, const NloraOptions& options,
                      const LayerContext& context) {
  const init::Start start = found_start(base, context, [&](const at::Tensor& weight) {
    return init::nystrom(weight, options.rank, options.scale(), nystrom_options(options));
  });
  const auto [shape_A, shape_B] = factor_shapes(base, options.rank);
  const auto device = nn::weight_of(base).device();
  return {start.A.reshape(shape_A).to(device), start.core.to(device),
          start.B.reshape(shape_B).to(device)};
}

// A and B of the plain LoRA with the same update. `start`: A0, N0 and B0 N0 as far as they are
// subtracted.
std::pair<at::Tensor, at::Tensor> plain_factors(const Factors& now, const Factors& start) {
  if (start.N.defined()) return {now.A, times_core(now.B, now.N - start.N)};
  const at::Tensor up = times_core(now.B, now.N);
  if (!start.A.defined()) return {now.A, up};
  return since_start(now.A, up, start.A, start.B);
}

PlainLora to_lora(const Recipe& recipe, const StoredLayer& layer, int64_t rank) {
  GRAFT_CHECK(rank == 0, kArea, "the ranks of this method do not nest; got rank=", rank);
  NloraOptions options = dynamic_cast<const RecipeOf<NloraImpl>&>(recipe).options();
  const auto [A, B] = stored_factors(kArea, layer);
  const Factors now = {A, stored(kArea, layer, "lora_N"), B};
  Factors start;
  if (options.subtracts() && options.train == "core") {
    start.N = stored(kArea, layer, "lora_start_N");
  } else if (options.subtracts()) {
    start.A = stored(kArea, layer, "lora_start_A");
    start.B = stored(kArea, layer, "lora_start_B");
  }
  const auto check_fits = [](const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
    GRAFT_CHECK(!tensor.defined() || tensor.sizes() == shape, kArea, name,
                " must fit the other factors; got ", tensor.sizes(), " for ", shape);
  };
  GRAFT_CHECK(A.dim() >= 2 && B.dim() >= 2 && A.size(0) == B.size(1), kArea,
              "A and B must fit each other; got ", A.sizes(), " and ", B.sizes());
  options.rank = A.size(0);  // rank_pattern may have given it another one
  check_fits("lora_N", now.N, {options.rank, options.rank});
  check_fits("lora_start_N", start.N, {options.rank, options.rank});
  check_fits("lora_start_A", start.A, A.sizes());
  check_fits("lora_start_B", start.B, B.sizes());
  const auto [plain_A, plain_B] = plain_factors(now, start);
  return {plain_A, plain_B, options.scale()};
}

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  ConfigFields fields(config, kArea);
  NloraOptions options;
  options.rank = fields.integer("r", options.rank);
  options.alpha = fields.number("lora_alpha", options.alpha);
  options.dropout = fields.number("lora_dropout", options.dropout);
  options.start_by = fields.text("init_lora_weights", options.start_by);
  options.rcond = fields.number("rcond", options.rcond);
  options.subtract = fields.flag("subtract", options.subtracts());
  options.train = fields.text("train", options.train);
  return make_recipe(options);
}

}  // namespace

bool NloraOptions::subtracts() const {
  return subtract.value_or(start_by == "cur" || start_by == "pinv");
}

double NloraOptions::scale() const {
  return alpha / static_cast<double>(rank);
}

void NloraOptions::validate() const {
  check_options(kArea, rank, alpha, dropout);
  const bool slora = start_by == "slora";
  GRAFT_CHECK(slora || start_by == "block" || start_by == "pinv" || start_by == "cur", kArea,
              "the start must be slora, block, pinv or cur; got '", start_by, "'");
  GRAFT_CHECK(train == "all" || train == "core", kArea, "train must be all or core; got '", train,
              "'");
  GRAFT_CHECK(!slora || !subtracts(), kArea,
              "slora starts as the base, so there is nothing to subtract; got subtract=true");
  GRAFT_CHECK(!slora || train == "all", kArea,
              "with slora B is zero, so the core alone would never change anything; got train=core "
              "(start by block, pinv or cur)");
  if (!slora) nystrom_options(*this).validate();
  GRAFT_CHECK(!subtracts() || dropout == 0.0, kArea, start_by,
              " with subtract takes a part of the weight into the factors, so dropout would drop "
              "the base's own output; got dropout=",
              dropout);
}

NloraImpl::NloraImpl(const nn::FrozenLayer& base, const NloraOptions& options_in,
                     const LayerContext& context_in)
    : AdapterModule(options_in, context_in), scale(options_in.scale()) {
  options.validate();
  check_rank(kName, base, options.rank, options.dropout, context);
  check_no_groups(kName, base, context);
  embedding_ = std::holds_alternative<nn::FrozenEmbedding>(base);

  const bool from_weight = options.start_by != "slora" && context.initialise;
  const Factors found = from_weight ? nystrom_start(base, options, context)
                                    : slora_start(base, options.rank, context);
  const bool core_alone = options.train == "core";
  const auto add = [&](const char* name, const at::Tensor& values) {
    return core_alone ? register_buffer(name, values) : register_parameter(name, values);
  };
  lora_A = add("lora_A", found.A);
  lora_B = add("lora_B", found.B);
  lora_N = register_parameter("lora_N", found.N);
  if (!options.subtracts()) return;
  if (core_alone) {
    start_N = register_buffer("start_N", found.N.clone());
  } else {
    start_A = register_buffer("start_A", found.A.clone());
    start_B = register_buffer("start_B", times_core(found.B, found.N).detach());
  }
}

std::pair<at::Tensor, at::Tensor> NloraImpl::factors() const {
  return plain_factors({lora_A, lora_N, lora_B}, {start_A, start_N, start_B});
}

at::Tensor NloraImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  const auto [A, B] = factors();
  return ops::lora_linear(x, base.weight, base.bias,
                          {A, B, {}, scale, next_dropout(options.dropout)});
}

at::Tensor NloraImpl::forward(const nn::FrozenEmbedding& base, const at::Tensor& indices) {
  const at::Tensor y = base.apply(indices);
  const auto [A, B] = factors();
  return (y + embedding_branch(base, A, B, indices) * scale).to(y.scalar_type());
}

at::Tensor NloraImpl::forward(const nn::FrozenConv& base, const at::Tensor& x) {
  const at::Tensor y = base.apply(x);
  const at::Tensor dropped =
      ops::dropout(x.to(lora_A.scalar_type()), next_dropout(options.dropout));
  const auto [A, B] = factors();
  return (y + conv_branch(base, A, B, {}, dropped) * scale).to(y.scalar_type());
}

at::Tensor NloraImpl::merged_weight(const nn::FrozenLayer& base) const {
  const auto [A, B] = factors();
  return add_to_weight(base, dense_product(A, B, scale));
}

std::vector<nn::Adapter::FileTensor> NloraImpl::file_tensors() const {
  std::vector<FileTensor> tensors = factor_tensors(lora_A, lora_B, embedding_);
  tensors.push_back({"lora_N", lora_N});
  if (start_N.defined()) tensors.push_back({"lora_start_N", start_N});
  if (start_A.defined()) tensors.push_back({"lora_start_A", start_A});
  if (start_B.defined()) tensors.push_back({"lora_start_B", start_B});
  return tensors;
}

void NloraImpl::write_config(const NloraOptions& options, nlohmann::json& config) {
  config["r"] = options.rank;
  config["lora_alpha"] = number_field(options.alpha);
  config["lora_dropout"] = options.dropout;
  config["init_lora_weights"] = options.start_by;
  config["rcond"] = options.rcond;
  config["subtract"] = options.subtracts();
  config["train"] = options.train;
}

std::string NloraImpl::describe(const NloraOptions& options) {
  std::string text = concat("rank ", options.rank, ", alpha ", options.alpha);
  if (options.dropout > 0) text += concat(", dropout ", options.dropout);
  text += ", start by " + options.start_by;
  if (options.subtracts()) text += ", subtracted";
  return text + (options.train == "core" ? ", core alone" : "");
}

MethodEntry nlora_entry() {
  return {
      "nlora",
      "NLORA",
      "an r x r matrix between LoRA's factors (SLoRA; NLoRA by --init cur; IntTune: train=core)",
      {},
      read_config,
      {.rslora = ""},
      to_lora};
}

}  // namespace graft::adapters
