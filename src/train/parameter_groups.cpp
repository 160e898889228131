#include <graft/nn/adapter_slot.h>
#include <graft/train/parameter_groups.h>

#include <algorithm>

namespace graft::train {

std::vector<ParameterGroup> parameter_groups(const AttachedAdapter& adapter, double weight_decay) {
  const std::string own = std::string(".") + nn::AdapterSlot::kChildName + ".";
  std::vector<ParameterGroup> groups;
  for (const auto& [name, tensor] : adapter.named_parameters()) {
    adapters::ParameterRule rule;
    if (name.find(own) != std::string::npos)
      rule = adapter.recipe().rule(std::string_view(name).substr(name.rfind('.') + 1));
    const double decay = rule.decays ? weight_decay : 0.0;
    auto group = std::find_if(groups.begin(), groups.end(), [&](const ParameterGroup& g) {
      return g.lr_scale == rule.lr_scale && g.weight_decay == decay;
    });
    if (group == groups.end())
      group = groups.insert(groups.end(), ParameterGroup{{}, rule.lr_scale, decay});
    group->parameters.emplace_back(name, tensor);
  }
  return groups;
}

}  // namespace graft::train
