#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/adapters/config_fields.h>
#include <graft/adapters/lora_xs.h>
#include <graft/core/error.h>
#include <graft/init/start.h>
#include <graft/ops/lora_linear.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "low_rank.h"

namespace graft::adapters {
namespace {

constexpr const char* kArea = LoraXsImpl::kName;

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  ConfigFields fields(config, kArea);
  LoraXsOptions options;
  options.rank = fields.integer("r", options.rank);
  options.alpha = fields.number("lora_alpha", options.alpha);
  options.dropout = fields.number("lora_dropout", options.dropout);
  options.r_std = fields.number("r_std", options.r_std);
  options.init = init::find_kind(fields.text("init_lora_weights", options.init)).name;
  options.sb_step = fields.number("sb_step", options.sb_step);
  return make_recipe(options);
}

// A = S_r V_r^T, B = U_r and a small random R.
init::Start svd_start(const at::Tensor& weight, const LoraXsOptions& options, uint64_t seed) {
  GRAFT_CHECK(at::isfinite(weight).all().item<bool>(), kArea,
              "the base weight must be finite to be decomposed; got NaN or infinity");
  const int64_t rank = options.rank;
  const auto [U, S, Vt] = at::linalg_svd(weight, /*full_matrices=*/false);
  init::Start start;
  start.A = (S.narrow(0, 0, rank).unsqueeze(1) * Vt.narrow(0, 0, rank)).contiguous();
  start.B = U.narrow(1, 0, rank).contiguous();
  start.core = at::zeros({rank, rank}, weight.options());
  start.core.normal_(0.0, options.r_std, at::detail::createCPUGenerator(seed));
  start.singular_values = S;
  const double total = S.square().sum().item<double>();
  if (total > 0) start.explained = S.narrow(0, 0, rank).square().sum().item<double>() / total;
  return start;
}

init::Start sb_start(const LoraXsOptions& options, const init::LayerFacts* facts) {
  GRAFT_CHECK(facts != nullptr && facts->gradient.defined(), kArea,
              "lora_sb needs gradients, gathered over some batches; got none");
  return init::lora_sb(facts->gradient, options.rank, options.scale(), options.sb_step);
}

// R A in A's shape: the down factor of the plain LoRA with the same update.
at::Tensor fold(const at::Tensor& R, const at::Tensor& A) {
  return R.mm(A.reshape({A.size(0), -1})).reshape(A.sizes());
}

PlainLora to_lora(const Recipe& recipe, const StoredLayer& layer, int64_t rank) {
  GRAFT_CHECK(rank == 0, kArea, "the ranks of this method do not nest; got rank=", rank);
  const auto& options = dynamic_cast<const RecipeOf<LoraXsImpl>&>(recipe).options();
  const auto [A, B] = stored_factors(kArea, layer);
  const at::Tensor& R = stored(kArea, layer, "lora_R");
  GRAFT_CHECK(R.dim() == 2 && A.dim() >= 2 && R.size(1) == A.size(0) && R.size(0) == B.size(1),
              kArea, "A, R and B must fit each other; got ", A.sizes(), ", ", R.sizes(), " and ",
              B.sizes());
  LoraXsOptions of_layer = options;
  of_layer.rank = R.size(0);  // rank_pattern may have given it another one
  return {fold(R, A), B, of_layer.scale()};
}

}  // namespace

double LoraXsOptions::scale() const {
  return alpha / static_cast<double>(rank);
}

void LoraXsOptions::validate() const {
  check_options(kArea, rank, alpha, dropout);
  GRAFT_CHECK(std::isfinite(r_std) && r_std >= 0.0, kArea, "r_std must be >= 0; got ", r_std);
  const init::Kind kind = init::find_kind(init);
  GRAFT_CHECK(kind.has_core(), kArea, "init must be svd or lora_sb; got '", init, "'");
  GRAFT_CHECK(std::isfinite(sb_step) && sb_step > 0.0, kArea, "sb_step must be > 0; got ", sb_step);
}

LoraXsImpl::LoraXsImpl(const nn::FrozenLayer& base, const LoraXsOptions& options_in,
                       const LayerContext& context_in)
    : AdapterModule(options_in, context_in), scale(options_in.scale()) {
  options.validate();
  check_rank(kName, base, options.rank, options.dropout, context);
  check_no_groups(kName, base, context);
  embedding_ = std::holds_alternative<nn::FrozenEmbedding>(base);

  const auto type = at::TensorOptions().dtype(master_type(base));
  const auto device = nn::weight_of(base).device();
  const auto [shape_A, shape_B] = factor_shapes(base, options.rank);
  at::Tensor A = at::zeros(shape_A, type), B = at::zeros(shape_B, type),
             R = at::zeros({options.rank, options.rank}, type);
  if (context.initialise) {
    const bool by_step = init::find_kind(options.init).name == "lora_sb";
    const init::Start start = found_start(base, context, [&](const at::Tensor& weight) {
      return by_step ? sb_start(options, context.facts.get())
                     : svd_start(weight, options, context.layer_seed());
    });
    A = start.A.to(type).reshape(shape_A);
    B = start.B.to(type).reshape(shape_B);
    R = start.core.to(type);
  }
  lora_A = register_buffer("lora_A", A.to(device));
  lora_B = register_buffer("lora_B", B.to(device));
  lora_R = register_parameter("lora_R", R.to(device));
}

at::Tensor LoraXsImpl::up() const {
  return times_core(lora_B, lora_R);
}

at::Tensor LoraXsImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  return ops::lora_linear(x, base.weight, base.bias,
                          {lora_A, up(), {}, scale, next_dropout(options.dropout)});
}

at::Tensor LoraXsImpl::forward(const nn::FrozenEmbedding& base, const at::Tensor& indices) {
  const at::Tensor y = base.apply(indices);
  return (y + embedding_branch(base, lora_A, up(), indices) * scale).to(y.scalar_type());
}

at::Tensor LoraXsImpl::forward(const nn::FrozenConv& base, const at::Tensor& x) {
  const at::Tensor y = base.apply(x);
  const at::Tensor dropped =
      ops::dropout(x.to(lora_A.scalar_type()), next_dropout(options.dropout));
  return (y + conv_branch(base, lora_A, up(), {}, dropped) * scale).to(y.scalar_type());
}

at::Tensor LoraXsImpl::merged_weight(const nn::FrozenLayer& base) const {
  return add_to_weight(base, dense_product(lora_A, up(), scale));
}

std::vector<nn::Adapter::FileTensor> LoraXsImpl::file_tensors() const {
  std::vector<FileTensor> tensors = factor_tensors(lora_A, lora_B, embedding_);
  tensors.push_back({"lora_R", lora_R});
  return tensors;
}

void LoraXsImpl::write_config(const LoraXsOptions& options, nlohmann::json& config) {
  config["r"] = options.rank;
  config["lora_alpha"] = number_field(options.alpha);
  config["lora_dropout"] = options.dropout;
  config["r_std"] = options.r_std;
  config["init_lora_weights"] = init::find_kind(options.init).name;
  config["sb_step"] = options.sb_step;
}

std::string LoraXsImpl::describe(const LoraXsOptions& options) {
  std::string text = concat("rank ", options.rank, ", alpha ", options.alpha);
  if (options.dropout > 0) text += concat(", dropout ", options.dropout);
  if (init::find_kind(options.init).name == "lora_sb")
    return text + concat(", start by lora_sb with a step of ", options.sb_step);
  return text + concat(", R starts with deviation ", options.r_std);
}

MethodEntry lora_xs_entry() {
  return {"lora-xs",
          "LORA_XS",
          "a trained r x r matrix between frozen singular factors of the weight",
          {},
          read_config,
          {.rslora = ""},
          to_lora};
}

}  // namespace graft::adapters
