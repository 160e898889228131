#include <ATen/ATen.h>
#include <graft/adapters/config_fields.h>
#include <graft/adapters/lora_fa.h>
#include <graft/core/error.h>
#include <graft/ops/lora_linear.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "low_rank.h"

namespace graft::adapters {
namespace {

constexpr const char* kArea = LoraFaImpl::kName;

// Added to the diagonal of A A^T, as PEFT's optimiser does.
constexpr double kRidge = 1e-8;

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  ConfigFields fields(config, kArea);
  LoraFaOptions options;
  read_lora_fields(kArea, config, options);
  options.projected = fields.flag("projected", true);
  return make_recipe(options);
}

}  // namespace

double LoraFaOptions::scale() const {
  return lora_scale(alpha, rank, rslora);
}

void LoraFaOptions::validate() const {
  check_options(kArea, rank, alpha, dropout);
}

LoraFaImpl::LoraFaImpl(const nn::FrozenLayer& base, const LoraFaOptions& options_in,
                       const LayerContext& context_in)
    : AdapterModule(options_in, context_in), scale(options_in.scale()) {
  options.validate();
  check_supports(base, context.name);
  check_rank(kName, base, options.rank, options.dropout, context);
  const auto [A, B] = make_factors(base, options.rank, options.init, context);
  lora_A = register_buffer("lora_A", A);
  lora_B = register_parameter("lora_B", B);
}

std::optional<ops::LoraTerm> LoraFaImpl::linear_term() {
  return ops::LoraTerm{lora_A, lora_B, {}, scale, next_dropout(options.dropout)};
}

at::Tensor LoraFaImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  return ops::lora_linear(x, base.weight, base.bias, *linear_term());
}

at::Tensor LoraFaImpl::forward(const nn::FrozenConv& base, const at::Tensor& x) {
  const at::Tensor y = base.apply(x);
  const at::Tensor dropped =
      ops::dropout(x.to(lora_A.scalar_type()), next_dropout(options.dropout));
  return (y + conv_branch(base, lora_A, lora_B, {}, dropped) * scale).to(y.scalar_type());
}

at::Tensor LoraFaImpl::merged_weight(const nn::FrozenLinear& base) const {
  return add_to_weight(base, dense_product(lora_A, lora_B, scale));
}

at::Tensor LoraFaImpl::merged_weight(const nn::FrozenConv& base) const {
  check_mergeable(kName, base, context);
  return add_to_weight(base, dense_product(lora_A, lora_B, scale));
}

const at::Tensor& LoraFaImpl::inverse_gram() {
  const auto version = static_cast<int64_t>(lora_A._version());
  if (inverse_version_ == version && inverse_gram_.device() == lora_A.device())
    return inverse_gram_;
  const int64_t rank = lora_A.size(0), units = lora_B.size(1);  // units of one group
  const at::Tensor A = lora_A.to(at::kDouble).reshape({rank / units, units, -1});
  const at::Tensor gram = A.bmm(A.transpose(1, 2)) + kRidge * at::eye(units, A.options());
  inverse_gram_ = at::linalg_inv(gram).div_(scale * scale);
  inverse_version_ = version;
  return inverse_gram_;
}

at::Tensor LoraFaImpl::projected_gradient(const at::Tensor& gradient) {
  const at::NoGradGuard no_grad;
  const at::Tensor& inverse = inverse_gram();
  const at::Tensor rows =
      gradient.to(at::kDouble).reshape({inverse.size(0), -1, inverse.size(1)});  // by group
  return rows.bmm(inverse).reshape(gradient.sizes()).to(gradient.scalar_type());
}

void LoraFaImpl::before_update(const std::vector<LoraFaImpl*>& adapters, const StepInfo&) {
  for (LoraFaImpl* adapter : adapters) {
    at::Tensor& gradient = adapter->lora_B.mutable_grad();
    if (!adapter->options.projected || !gradient.defined()) continue;
    const at::NoGradGuard no_grad;
    gradient.copy_(adapter->projected_gradient(gradient));
  }
}

std::vector<nn::Adapter::FileTensor> LoraFaImpl::file_tensors() const {
  return factor_tensors(lora_A, lora_B, /*embedding=*/false);
}

void LoraFaImpl::write_config(const LoraFaOptions& options, nlohmann::json& config) {
  write_lora_fields(options, /*dora=*/false, /*bias=*/false, config);
}

std::string LoraFaImpl::describe(const LoraFaOptions& options) {
  std::string text = concat("rank ", options.rank, ", alpha ", options.alpha);
  if (options.rslora) text += ", rsLoRA";
  if (options.dropout > 0) text += concat(", dropout ", options.dropout);
  if (options.init != "kaiming") text += ", init " + options.init;
  return text + (options.projected ? ", projected gradient" : ", plain gradient");
}

MethodEntry lora_fa_entry() {
  return {"lora-fa", "LORA", "LoRA with A frozen, B's gradient projected; saved as plain LoRA",
          [](const nlohmann::json&) { return false; }, read_config};
}

}  // namespace graft::adapters
