#include <ATen/ATen.h>
#include <graft/attach/attach.h>
#include <graft/core/error.h>

#include <map>
#include <set>

#include "state.h"

namespace graft {
namespace {

// The layer's parameters, as handles that share the model's own tensor objects.
std::pair<at::Tensor, at::Tensor> handles(const torch::nn::Module& layer) {
  const nn::FrozenLayer view = nn::frozen_layer(layer);
  return {nn::weight_of(view), nn::bias_of(view)};
}

// Each adapter works on the untouched layer, as in the forward pass: their changes add up.
nn::Adapter::Merged sum_of_merged(const nn::FrozenLayer& layer,
                                  const std::vector<std::shared_ptr<nn::Adapter>>& adapters) {
  nn::Adapter::Merged sum = adapters.front()->merge(layer);
  const at::Tensor weight = nn::weight_of(layer).detach(), bias = nn::bias_of(layer);
  for (size_t i = 1; i < adapters.size(); ++i) {
    const auto next = adapters[i]->merge(layer);
    sum.weight = sum.weight + (next.weight - weight);
    if (bias.defined() && !next.bias.is_same(bias))
      sum.bias = sum.bias + (next.bias - bias.detach());
  }
  return sum;
}

// A weight that two adapted layers, or an adapted layer and another module, have in common cannot
// hold one's update.
void refuse_shared_weight(const std::map<const void*, std::vector<std::string>>& owners,
                          const std::string& name, const at::Tensor& weight) {
  const auto it = owners.find(weight.unsafeGetTensorImpl());
  GRAFT_CHECK(it == owners.end() || it->second.size() < 2, "merge",
              "a merged weight must belong to one layer; got the weight of '", name,
              "', shared by '", it->second[0], "' and '",
              it->second.size() > 1 ? it->second[1] : "", "'");
}

}  // namespace

void AttachedAdapter::merge() {
  auto& shared = *state_->shared;
  GRAFT_CHECK(!shared.merged, "merge", "the adapters are merged already");
  GRAFT_CHECK(shared.enabled && !shared.active.empty(), "merge",
              "there must be an enabled active adapter; got none");
  const at::NoGradGuard no_grad;

  std::map<const nn::AdapterSlot*, AdaptedLayer> layers;
  for (const auto& state : shared.alive())
    for (size_t i = 0; i < state->layers.size(); ++i)
      layers.emplace(state->slots[i].get(), state->layers[i]);

  std::vector<std::pair<at::Tensor, at::Tensor>> merged;  // parameter, new data
  for (const auto& [slot, layer] : layers) {
    if (slot->active_adapters().empty()) continue;
    const auto [weight, bias] = handles(*layer.module);
    refuse_shared_weight(shared.owners, layer.name, weight);
    const auto sum = sum_of_merged(nn::frozen_layer(*layer.module), slot->active_adapters());
    GRAFT_CHECK(at::isfinite(sum.weight).all().item<bool>(), "merge",
                "a merged weight must be finite; got NaN or infinity (layer '", layer.name, "')");
    merged.emplace_back(weight, sum.weight);
    if (bias.defined() && !sum.bias.is_same(bias)) merged.emplace_back(bias, sum.bias);
  }
  for (auto& [parameter, data] : merged) {
    shared.unmerged.emplace_back(parameter, parameter.variable_data());
    parameter.set_data(data.detach());
  }
  for (const auto& item : layers) const_cast<nn::AdapterSlot*>(item.first)->merged = true;
  shared.merged = true;
}

void AttachedAdapter::unmerge() {
  auto& shared = *state_->shared;
  GRAFT_CHECK(shared.merged, "merge", "the adapters are not merged");
  for (auto& [parameter, data] : shared.unmerged) parameter.set_data(data.to(parameter.options()));
  shared.unmerged.clear();
  for (const auto& state : shared.alive())
    for (const auto& slot : state->slots) slot->merged = false;
  shared.merged = false;
}

}  // namespace graft
