#include "optimizer_state.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>

#include <algorithm>
#include <map>
#include <set>

namespace graft::train {

std::string first_names(const std::vector<std::string>& names) {
  constexpr size_t kShown = 10;
  std::string text;
  for (size_t i = 0; i < std::min(kShown, names.size()); ++i)
    text += (i == 0 ? "" : ", ") + names[i];
  if (names.size() > kShown) text += concat(" and ", names.size() - kShown, " more");
  return text;
}

int64_t stored_step(const NamedTensors& state) {
  for (const auto& [name, value] : state)
    if (name == "step" && value.defined() && value.scalar_type() == at::kLong && value.dim() == 0)
      return value.item<int64_t>();
  return -1;
}

void copy_state(const char* area, const char* what, const NamedTensors& targets,
                const NamedTensors& state,
                const std::function<bool(const std::string&, const at::Tensor&)>& sound) {
  const std::map<std::string, at::Tensor> given(state.begin(), state.end());
  std::vector<std::string> missing, unexpected, unfit;
  std::set<std::string> known;
  for (const auto& [name, target] : targets) {
    known.insert(name);
    const auto entry = given.find(name);
    if (entry == given.end()) {
      missing.push_back(name);
    } else if (const at::Tensor& value = entry->second;
               !value.defined() || value.sizes() != target.sizes() ||
               value.scalar_type() != target.scalar_type() ||
               (name == "step" && value.item<int64_t>() < 0) || !sound(name, value)) {
      unfit.push_back(name);
    }
  }
  for (const auto& entry : given)
    if (!known.contains(entry.first)) unexpected.push_back(entry.first);
  GRAFT_CHECK(
      missing.empty() && unexpected.empty() && unfit.empty() && given.size() == state.size(), area,
      "the state must fit ", what, "; missing: [", first_names(missing), "], unexpected: [",
      first_names(unexpected), "], of another shape or dtype: [", first_names(unfit),
      "], given twice: ", state.size() - given.size());
  const at::NoGradGuard no_grad;
  for (const auto& [name, target] : targets) at::Tensor(target).copy_(given.at(name));
}

}  // namespace graft::train
