#include <ATen/ATen.h>
#include <graft/moe/arrow.h>

#include "expert_fields.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = ArrowImpl::kName;
constexpr const char* kTemperature = "router_temperature";

std::shared_ptr<const adapters::Recipe> read_config(nlohmann::json& config) {
  ArrowOptions options;
  options.experts = ExpertLibrary::read_config(kArea, config);
  adapters::ConfigFields fields(config, kArea);
  options.top_k = fields.integer(kTopK, options.top_k);
  options.temperature = fields.number(kTemperature, options.temperature);
  return adapters::make_recipe(options);
}

}  // namespace

RouterOptions ArrowOptions::router() const {
  return {.selection = Selection::top_k_softmax,
          .experts = experts->count(),
          .top_k = top_k,
          .temperature = temperature};
}

void ArrowOptions::validate() const {
  check_library(kArea, experts);
  router().validate();
}

at::Tensor arrow_prototype(const at::Tensor& A, const at::Tensor& B) {
  const auto [left, R_B] = at::linalg_qr(B);
  const auto [right, R_A] = at::linalg_qr(A.t());
  const at::Tensor core = R_B.mm(R_A.t());
  if (core.count_nonzero().item<int64_t>() == 0) return at::zeros({A.size(1)}, A.options());
  const auto [U, S, Vh] = at::linalg_svd(core, /*full_matrices=*/false);
  const at::Tensor v = right.mv(Vh[0]);
  return v * v[v.abs().argmax()].sign();
}

ArrowImpl::ArrowImpl(const nn::FrozenLayer& base, const ArrowOptions& options_in,
                     const adapters::LayerContext& context_in)
    : LinearMixture(options_in, context_in) {
  check_supports(base, context.name);
  options.validate();
  experts = options.experts->experts(kArea, base, context);
  register_buffer("lora_A", experts.A);
  register_buffer("lora_B", experts.B);
  prototypes = register_buffer(
      "prototypes", at::zeros({experts.count(), experts.A.size(1)}, experts.A.options()));
  if (context.initialise) find_prototypes();
}

void ArrowImpl::find_prototypes() {
  const at::NoGradGuard no_grad;
  for (int64_t e = 0; e < experts.count(); ++e) {
    const auto [A, B] = experts.expert(e);
    at::Tensor(prototypes[e]).copy_(arrow_prototype(A, B));
  }
}

void ArrowImpl::take_file_tensors(const std::vector<FileTensor>&) {
  find_prototypes();
}

at::Tensor ArrowImpl::gates(const at::Tensor& x) {
  const at::Tensor tokens = x.dim() == 1 ? x.unsqueeze(0) : x;
  const at::Tensor scores = at::linear(tokens.to(prototypes.scalar_type()), prototypes).abs();
  return gates_of(route(options.router(), scores, {.valid = valid_tokens(x)}));
}

void ArrowImpl::write_config(const ArrowOptions& options, nlohmann::json& config) {
  options.experts->write_config(config);
  config[kTopK] = options.top_k;
  config[kTemperature] = options.temperature;
}

std::string ArrowImpl::describe(const ArrowOptions& options) {
  return concat(options.experts->count(), " adapters, top ", options.top_k,
                " by their main directions");
}

adapters::MethodEntry arrow_entry() {
  adapters::MethodEntry entry{kArea,
                              "ARROW",
                              "adapters chosen a token by their main directions, nothing trained",
                              {},
                              read_config};
  entry.keys = {.rank = "", .alpha = "", .dropout = "", .rslora = "", .init = "", .top_k = kTopK};
  entry.tensor_prefix = "experts.";
  return entry;
}

}  // namespace graft::moe
