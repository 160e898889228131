#include <ATen/ATen.h>
#include <graft/moe/meteora.h>
#include <graft/moe/token_scope.h>

#include <algorithm>
#include <cmath>

#include "expert_fields.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = MeteoraImpl::kName;

std::shared_ptr<const adapters::Recipe> read_config(nlohmann::json& config) {
  MeteoraOptions options;
  options.experts = ExpertLibrary::read_config(kArea, config);
  adapters::ConfigFields fields(config, kArea);
  options.top_k = fields.integer(kTopK, options.top_k);
  options.temperature = fields.number("router_temperature", options.temperature);
  options.label_loss = fields.number("label_loss", options.label_loss);
  return adapters::make_recipe(options);
}

}  // namespace

RouterOptions MeteoraOptions::router() const {
  RouterOptions router{.selection = Selection::top_k_softmax,
                       .experts = experts->count(),
                       .top_k = top_k,
                       .temperature = temperature};
  router.linear_start = true;
  return router;
}

void MeteoraOptions::validate() const {
  check_library(kArea, experts);
  router().validate();
  GRAFT_CHECK(std::isfinite(label_loss) && label_loss >= 0, kArea,
              "label_loss must not be negative; got ", label_loss);
}

MeteoraImpl::MeteoraImpl(const nn::FrozenLayer& base, const MeteoraOptions& options_in,
                         const adapters::LayerContext& context_in)
    : LinearMixture(options_in, context_in) {
  check_supports(base, context.name);
  options.validate();
  experts = options.experts->experts(kArea, base, context);
  register_buffer("lora_A", experts.A);
  register_buffer("lora_B", experts.B);
  router = register_module("router", make_router(base, options.router(), context));
}

at::Tensor MeteoraImpl::gates(const at::Tensor& x) {
  const Routing routing = route_tokens(*router, x);
  routing_ = is_training() && options.label_loss != 0.0 ? routing : detached(routing);
  return gates_of(routing);
}

std::vector<nn::Adapter::FileTensor> MeteoraImpl::file_tensors() const {
  auto tensors = router_tensors(*router);
  for (auto& tensor : experts.file_tensors()) tensors.push_back(std::move(tensor));
  return tensors;
}

at::Tensor MeteoraImpl::penalty(const std::vector<MeteoraImpl*>& layers) {
  if (layers.empty() || layers.front()->options.label_loss == 0.0) return {};
  const at::Tensor kinds = TokenScope::current().kinds;
  GRAFT_CHECK(kinds.defined(), kArea,
              "the loss of labels needs kinds of tokens (TokenScope); got none");
  const at::Tensor labels = kinds.reshape({-1}).to(layers.front()->router->weight.device());
  at::Tensor total;
  int64_t counted = 0;
  for (const MeteoraImpl* layer : layers) {
    check_has_graph(kArea, layer->routing_, layer->context.name);
    const Routing& routing = layer->routing_;
    GRAFT_CHECK(labels.numel() == routing.tokens(), kArea, "there must be one kind a token, ",
                routing.tokens(), "; got kinds of ", kinds.sizes(), " (layer '",
                layer->context.name, "')");
    at::Tensor labelled = (labels >= 0) & (labels < routing.expert_count());
    if (routing.valid.defined()) labelled = labelled & routing.valid;
    const at::Tensor target = labels.masked_fill(labelled.logical_not(), 0).unsqueeze(1);
    const at::Tensor losses = -at::log_softmax(routing.logits, -1).gather(1, target).squeeze(1);
    const at::Tensor sum = losses.masked_fill(labelled.logical_not(), 0).sum();
    total = total.defined() ? total + sum : sum;
    counted += labelled.sum().item<int64_t>();
  }
  return total *
         (layers.front()->options.label_loss / static_cast<double>(std::max<int64_t>(counted, 1)));
}

void MeteoraImpl::end_step(const std::vector<MeteoraImpl*>& layers, const adapters::StepInfo&) {
  for (MeteoraImpl* layer : layers) layer->routing_ = detached(layer->routing_);
}

adapters::Figures MeteoraImpl::figures(const std::vector<MeteoraImpl*>& layers) {
  const at::NoGradGuard no_grad;
  std::vector<Routing> routings;
  for (const MeteoraImpl* layer : layers)
    if (layer->routing_.logits.defined()) routings.push_back(layer->routing_);
  if (routings.empty()) return {};
  return mixture_figures(routings, balance_loss(routings, balance_of("mixtral")));
}

void MeteoraImpl::write_config(const MeteoraOptions& options, nlohmann::json& config) {
  options.experts->write_config(config);
  config[kTopK] = options.top_k;
  config["router_temperature"] = options.temperature;
  config["label_loss"] = options.label_loss;
}

std::string MeteoraImpl::describe(const MeteoraOptions& options) {
  std::string text =
      concat(options.experts->count(), " frozen adapters, top ", options.top_k, " by a gate");
  if (options.label_loss > 0) text += concat(", label loss times ", options.label_loss);
  return text;
}

adapters::MethodEntry meteora_entry() {
  adapters::MethodEntry entry{
      kArea, "METEORA", "frozen adapters behind a gate that is trained", {}, read_config};
  entry.keys = {.rank = "", .alpha = "", .dropout = "", .rslora = "", .init = "", .top_k = kTopK};
  entry.tensor_prefix = "experts.";
  return entry;
}

}  // namespace graft::moe
