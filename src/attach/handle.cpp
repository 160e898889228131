// The handle's switches: active, enabled, merged, detached.
#include <ATen/ATen.h>
#include <graft/attach/attach.h>
#include <graft/core/error.h>
#include <graft/nn/conv.h>
#include <graft/nn/embedding.h>
#include <graft/nn/gated_mlp.h>
#include <graft/nn/linear.h>

#include <algorithm>
#include <set>
#include <utility>

#include "state.h"

namespace graft {
namespace {

std::string quoted_list(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < names.size() && i < 10; ++i) text += (i ? ", '" : "'") + names[i] + "'";
  if (names.size() > 10) text += concat(" and ", names.size() - 10, " more");
  return text;
}

bool holds(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

}  // namespace

bool is_graft_layer(const torch::nn::Module& module) {
  return module.as<nn::LinearImpl>() != nullptr || module.as<nn::EmbeddingImpl>() != nullptr ||
         module.as<nn::GatedMlpImpl>() != nullptr || module.as<nn::Conv1dImpl>() != nullptr ||
         module.as<nn::Conv2dImpl>() != nullptr || module.as<nn::Conv3dImpl>() != nullptr;
}

std::vector<std::shared_ptr<AttachedAdapter::State>> ModelAdapters::alive() const {
  std::vector<std::shared_ptr<AttachedAdapter::State>> states;
  for (const auto& member : members)
    if (auto state = member.lock(); state && !state->detached) states.push_back(std::move(state));
  return states;
}

void ModelAdapters::refresh() {
  // What was trained may have moved since (to another type or device): the model's is the truth.
  for (const auto& state : alive())
    for (auto& parameter : state->model_parameters)
      if (std::exchange(parameter.in_model, false))
        parameter.trained = parameter.parameter.variable_data();
  std::set<std::string> taken;
  for (const auto& state : alive()) {
    const bool active_here = holds(active, state->options.name);
    for (size_t i = 0; i < state->layers.size(); ++i) {
      state->slots[i]->set_active(active);
      state->slots[i]->enabled = enabled;
      for (auto& parameter : state->layers[i].adapter->parameters())
        parameter.set_requires_grad(active_here);
    }
    if (!active_here || !enabled) continue;
    for (auto& parameter : state->model_parameters) {
      if (!taken.insert(parameter.name).second) continue;  // of several, the first one's
      parameter.parameter.set_data(parameter.trained.to(parameter.parameter.options()));
      parameter.in_model = true;
      parameter.parameter.set_requires_grad(true);
    }
  }
  for (auto& [name, original] : originals) {
    if (taken.count(name) > 0) continue;
    original.first.set_data(original.second.to(original.first.options()));
    original.first.set_requires_grad(false);
  }
}

bool AttachedAdapter::State::is_active() const {
  return holds(shared->active, options.name);
}

std::vector<std::pair<std::string, at::Tensor>> AttachedAdapter::State::trained_tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> found;
  std::set<const void*> seen;
  const auto add = [&](const std::string& name, const at::Tensor& tensor) {
    if (seen.insert(tensor.unsafeGetTensorImpl()).second) found.emplace_back(name, tensor);
  };
  for (const auto& layer : layers)
    for (const auto& item : layer.adapter->named_parameters())
      add(layer.name + "." + nn::AdapterSlot::kChildName + "." + options.name + "." + item.key(),
          item.value());
  for (const auto& parameter : model_parameters) add(parameter.name, parameter.parameter);
  return found;
}

void AttachedAdapter::State::remember_versions() {
  versions.clear();
  for (const auto& [name, tensor] : trained_tensors()) versions.push_back(tensor._version());
}

bool AttachedAdapter::State::changed_since_remembered() const {
  const auto tensors = trained_tensors();
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].second._version() != versions[i]) return true;
  return false;
}

const std::string& AttachedAdapter::name() const {
  return state_->options.name;
}
const adapters::Recipe& AttachedAdapter::recipe() const {
  return *state_->recipe;
}
const std::vector<AdaptedLayer>& AttachedAdapter::layers() const {
  return state_->layers;
}

const std::vector<init::LayerReport>& AttachedAdapter::start_reports() const {
  return state_->start_reports;
}

std::vector<std::pair<std::string, at::Tensor>> AttachedAdapter::named_parameters() const {
  auto tensors = state_->trained_tensors();
  std::erase_if(tensors, [](const auto& item) { return !item.second.requires_grad(); });
  GRAFT_CHECK(!tensors.empty(), "attach",
              "the adapter must be active and enabled to be trained; got '", name(),
              "' with nothing to train");
  return tensors;
}

std::vector<at::Tensor> AttachedAdapter::parameters() const {
  std::vector<at::Tensor> tensors;
  for (auto& item : named_parameters()) tensors.push_back(std::move(item.second));
  return tensors;
}

int64_t AttachedAdapter::parameter_count() const {
  int64_t count = 0;
  for (const auto& item : state_->trained_tensors()) count += item.second.numel();
  return count;
}

bool AttachedAdapter::is_merged() const {
  return state_->shared->merged;
}
bool AttachedAdapter::is_enabled() const {
  return state_->shared->enabled;
}
bool AttachedAdapter::is_active() const {
  return state_->is_active();
}

void AttachedAdapter::enable() {
  GRAFT_CHECK(!is_merged(), "attach", "merged adapters cannot be switched; unmerge first");
  state_->shared->enabled = true;
  state_->shared->refresh();
}

void AttachedAdapter::disable() {
  GRAFT_CHECK(!is_merged(), "attach", "merged adapters cannot be switched; unmerge first");
  state_->shared->enabled = false;
  state_->shared->refresh();
}

void AttachedAdapter::set_active() {
  set_active({name()});
}

void AttachedAdapter::set_active(const std::vector<std::string>& names) {
  GRAFT_CHECK(!is_merged(), "attach", "merged adapters cannot be switched; unmerge first");
  for (const auto& name : names) {
    const auto states = state_->shared->alive();
    const bool known = std::any_of(states.begin(), states.end(),
                                   [&](const auto& s) { return s->options.name == name; });
    std::vector<std::string> all;
    for (const auto& state : states) all.push_back(state->options.name);
    GRAFT_CHECK(known, "attach", "an adapter to activate must be one of ", quoted_list(all),
                "; got '", name, "'");
  }
  state_->shared->active = names;
  state_->shared->refresh();
}

nn::BatchRows AttachedAdapter::batch_rows(const nn::BatchParts& parts) const {
  GRAFT_CHECK(!is_merged(), "attach",
              "merged adapters are part of the weights and have no part of a batch; unmerge first");
  for (const auto& part : parts)
    GRAFT_CHECK(part.adapter.empty() || holds(state_->shared->active, part.adapter), "attach",
                "an adapter with a part of the batch must be active; got '", part.adapter,
                "' beside the active ", quoted_list(state_->shared->active));
  for (const auto& state : state_->shared->alive())
    GRAFT_CHECK(parts.size() < 2 || state->model_parameters.empty() || !state->is_active(),
                "attach",
                "an adapter that trains biases or modules of the model cannot share a batch: they "
                "are one for all its sequences; got '",
                state->options.name, "'");
  return nn::BatchRows(parts);
}

void AttachedAdapter::detach() {
  GRAFT_CHECK(!is_merged(), "attach", "merged adapters cannot be detached; unmerge first");
  auto& state = *state_;
  if (state.detached) return;
  state.detached = true;
  std::erase(state.shared->active, name());
  for (size_t i = 0; i < state.layers.size(); ++i) {
    state.slots[i]->erase(name());
    if (state.slots[i]->names().empty()) nn::AdapterSlot::remove(*state.layers[i].module);
  }
  state.shared->refresh();
}

bool AttachedAdapter::needs_activation() const {
  return std::any_of(state_->layers.begin(), state_->layers.end(),
                     [](const auto& layer) { return !is_graft_layer(*layer.module); });
}

ActivationScope AttachedAdapter::activate() const {
  GRAFT_CHECK(!state_->detached, "attach", "a detached adapter cannot be activated; got '", name(),
              "'");
  GRAFT_CHECK(!is_merged(), "attach",
              "merged adapters are part of the weights; there is nothing to activate");
  std::vector<std::pair<std::string, std::shared_ptr<torch::nn::Module>>> layers;
  std::set<const torch::nn::Module*> seen;
  for (const auto& state : state_->shared->alive())
    for (const auto& layer : state->layers)
      if (!is_graft_layer(*layer.module) && seen.insert(layer.module.get()).second)
        layers.emplace_back(layer.name, layer.module);
  return ActivationScope(layers);
}

void AttachedAdapter::check_used() const {
  std::vector<std::string> unused;
  for (size_t i = 0; i < state_->layers.size(); ++i)
    if (state_->slots[i]->runs == 0) unused.push_back(state_->layers[i].name);
  GRAFT_CHECK(
      unused.empty(), "attach", "every adapted layer must run; got ", unused.size(), " of ",
      state_->layers.size(),
      " that never did, so their adapters have no effect: ", quoted_list(unused),
      needs_activation() ? " (layers of torch::nn run adapters inside activate() only)" : "");
}

}  // namespace graft
