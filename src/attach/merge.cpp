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

nn::FrozenLayer with_values(nn::FrozenLayer layer, const at::Tensor& weight,
                            const at::Tensor& bias) {
  std::visit(
      [&](auto& base) {
        base.weight = weight;
        if constexpr (requires { base.bias; }) base.bias = bias;
      },
      layer);
  return layer;
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
    nn::FrozenLayer current = nn::frozen_layer(*layer.module);
    for (const auto& adapter : slot->active_adapters()) {
      const auto result = adapter->merge(current);
      GRAFT_CHECK(at::isfinite(result.weight).all().item<bool>(), "merge",
                  "a merged weight must be finite; got NaN or infinity (layer '", layer.name, "')");
      current = with_values(current, result.weight, result.bias);
    }
    merged.emplace_back(weight, nn::weight_of(current));
    if (bias.defined() && !nn::bias_of(current).is_same(bias))
      merged.emplace_back(bias, nn::bias_of(current));
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
