#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/moe/linear_mixture.h>
#include <graft/moe/token_scope.h>
#include <graft/ops/lora_linear.h>

#include <algorithm>
#include <limits>

#include "../adapters/low_rank.h"

namespace graft::moe {

std::pair<at::Tensor, at::Tensor> Experts::expert(int64_t e) const {
  GRAFT_CHECK(e >= 0 && e < count(), "experts", "an expert must be in [0, ", count(), "); got ", e);
  int64_t first = 0;
  for (int64_t before = 0; before < e; ++before) first += ranks[before];
  return {A.narrow(0, first, ranks[e]), B.narrow(1, first, ranks[e])};
}

at::Tensor Experts::forward(const nn::FrozenLinear& base, const at::Tensor& x,
                            const at::Tensor& gates, const ops::Dropout& dropout) const {
  // The operation has one scale; where experts differ in theirs, the gates carry them.
  const bool same = std::all_of(scales.begin(), scales.end(),
                                [&](double scale) { return scale == scales.front(); });
  const at::Tensor weighted = same ? gates : gates * at::tensor(scales, gates.options());
  return ops::lora_linear(x, base.weight, base.bias,
                          {A, B, {}, same ? scales.front() : 1.0, dropout, weighted, {}, ranks});
}

std::vector<nn::Adapter::FileTensor> Experts::file_tensors() const {
  std::vector<nn::Adapter::FileTensor> tensors;
  for (int64_t e = 0; e < count(); ++e) {
    const auto [one_A, one_B] = expert(e);
    tensors.push_back({concat("experts.", e, ".lora_A.weight"), one_A});
    tensors.push_back({concat("experts.", e, ".lora_B.weight"), one_B});
  }
  return tensors;
}

Experts make_experts(const char* method, const nn::FrozenLayer& base, std::vector<int64_t> ranks,
                     double scale, const std::string& init, const adapters::LayerContext& context) {
  std::vector<at::Tensor> As, Bs;
  adapters::LayerContext own = context;
  for (size_t e = 0; e < ranks.size(); ++e) {
    adapters::check_rank(method, base, ranks[e], 0.0, context);
    own.name = concat(context.name, ".experts.", e);  // each draws its own numbers
    const auto [A, B] = adapters::make_factors(base, ranks[e], init, own);
    As.push_back(A);
    Bs.push_back(B);
  }
  std::vector<double> scales(ranks.size(), scale);
  return {at::cat(As, 0), at::cat(Bs, 1), std::move(ranks), std::move(scales)};
}

void check_expert_options(const char* method, int64_t rank, double alpha, double dropout,
                          const std::string& init) {
  adapters::check_options(method, rank, alpha, dropout);
  GRAFT_CHECK(init::find_kind(init).needs == init::Needs::nothing, method,
              "experts start at random; got init=", init);
}

void refuse_merge(const char* method, const std::string& layer) {
  fail(method, concat("a mixture cannot be merged, its gates depend on the input; extract_expert "
                      "gives one expert as plain LoRA (layer '",
                      layer, "')"));
}

Router make_router(const nn::FrozenLayer& base, const RouterOptions& options,
                   const adapters::LayerContext& context) {
  adapters::LayerContext own = context;
  own.name = context.name + ".router";
  Router router(adapters::dense_sizes(base).second, adapters::master_type(base), options, own);
  router->to(nn::weight_of(base).device());
  return router;
}

std::vector<nn::Adapter::FileTensor> router_tensors(const RouterImpl& router) {
  std::vector<nn::Adapter::FileTensor> tensors = {{"moe_gate.weight", router.weight}};
  if (router.offset.defined()) tensors.push_back({"moe_gate.bias", router.offset});
  if (router.threshold_weight.defined()) {
    tensors.push_back({"moe_gate.threshold.weight", router.threshold_weight});
    tensors.push_back({"moe_gate.threshold.bias", router.threshold_bias});
  }
  return tensors;
}

at::Tensor valid_tokens(const at::Tensor& x) {
  if (!TokenScope::current().valid.defined()) return {};
  const at::Tensor valid = TokenScope::current().valid.to(x.device());
  // A layer may see its tokens in one row, whatever the batch's shape.
  const bool in_a_row = x.dim() == 2 && valid.numel() == x.size(0);
  return in_a_row ? valid.reshape({-1}) : valid;
}

Routing route_tokens(RouterImpl& router, const at::Tensor& x) {
  return router.forward(x.dim() == 1 ? x.unsqueeze(0) : x, valid_tokens(x));
}

Routing detached(const Routing& routing) {
  Routing plain = routing;
  for (at::Tensor* tensor : {&plain.logits, &plain.probabilities, &plain.weights, &plain.threshold})
    if (tensor->defined()) *tensor = tensor->detach();
  return plain;
}

void check_has_graph(const char* method, const Routing& routing, const std::string& layer) {
  GRAFT_CHECK(
      routing.logits.defined() && routing.logits.requires_grad(), method,
      "the balance loss needs the graph of a training pass, which a checkpointed block does "
      "not leave; got none (layer '",
      layer, "')");
}

adapters::Figures mixture_figures(const std::vector<Routing>& layers, const at::Tensor& loss) {
  if (layers.empty()) return {};
  double smallest = std::numeric_limits<double>::infinity(), largest = 0;
  for (const Routing& layer : layers) {
    const at::Tensor sums = gates_of(layer).sum(0), total = sums.sum();
    if (total.item<double>() == 0) continue;  // padding alone
    const at::Tensor shares = sums / total;
    smallest = std::min(smallest, shares.min().item<double>());
    largest = std::max(largest, shares.max().item<double>());
  }
  return {{"balance_loss", loss.item<double>()},
          {"smallest_expert_share", std::min(smallest, largest)},
          {"largest_expert_share", largest}};
}

}  // namespace graft::moe
