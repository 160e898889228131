#include <graft/nn/adapter_slot.h>
#include <graft/train/parameter_groups.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>

namespace graft::train {
namespace {

// The adapters by what stands before the last name of their parameters: "q.adapters.default.".
std::map<std::string, std::shared_ptr<nn::Adapter>> adapters_by_prefix(
    const AttachedAdapter& adapter) {
  std::map<std::string, std::shared_ptr<nn::Adapter>> found;
  for (const auto& layer : adapter.layers())
    found.emplace(layer.name + "." + nn::AdapterSlot::kChildName + "." + adapter.name() + ".",
                  layer.adapter);
  return found;
}

}  // namespace

std::vector<ParameterGroup> parameter_groups(const AttachedAdapter& adapter, double weight_decay) {
  const auto own = adapters_by_prefix(adapter);
  std::vector<ParameterGroup> groups;
  for (const auto& [name, tensor] : adapter.named_parameters()) {
    adapters::ParameterRule rule;
    std::shared_ptr<nn::Adapter> layer;
    const size_t dot = name.rfind('.') + 1;
    const std::string parameter = name.substr(dot);
    if (const auto it = own.find(name.substr(0, dot)); it != own.end()) {
      layer = it->second;
      rule = adapter.recipe().rule(parameter);
    }
    const double decay = rule.decays ? weight_decay : 0.0;
    auto group = std::find_if(groups.begin(), groups.end(), [&](const ParameterGroup& g) {
      return g.lr_scale == rule.lr_scale && g.weight_decay == decay;
    });
    if (group == groups.end())
      group = groups.insert(groups.end(), ParameterGroup{{}, rule.lr_scale, decay});
    group->parameters.emplace_back(name, tensor);
    if (layer && layer->live_rows(parameter))
      group->live_rows[name] = [layer, parameter] { return layer->live_rows(parameter).value(); };
  }
  return groups;
}

}  // namespace graft::train
