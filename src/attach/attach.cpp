#include <ATen/ATen.h>
#include <graft/attach/attach.h>
#include <graft/core/error.h>
#include <graft/nn/gated_mlp.h>

#include <algorithm>
#include <map>
#include <set>

#include "init_pass.h"
#include "state.h"

namespace graft {
namespace {

using State = AttachedAdapter::State;

// The adapters that already sit on this model, or a new record.
std::shared_ptr<ModelAdapters> shared_of(torch::nn::Module& model) {
  for (const auto& module : model.modules(/*include_self=*/false)) {
    if (auto slot = nn::AdapterSlot::find(*module))
      if (auto shared = std::static_pointer_cast<ModelAdapters>(slot->owner)) return shared;
  }
  return std::make_shared<ModelAdapters>();
}

bool names_module(const std::string& name, const std::string& item) {
  return name == item || (name.size() > item.size() && name.ends_with("." + item));
}

// The model's parameters without those of adapters.
std::vector<std::pair<std::string, at::Tensor>> plain_parameters(const torch::nn::Module& model) {
  const std::string slot = std::string(".") + nn::AdapterSlot::kChildName + ".";
  std::vector<std::pair<std::string, at::Tensor>> found;
  for (const auto& item : model.named_parameters())
    if (item.key().find(slot) == std::string::npos) found.emplace_back(item.key(), item.value());
  return found;
}

void refuse_shared(const std::vector<std::pair<std::string, at::Tensor>>& parameters,
                   const std::string& name, const at::Tensor& tensor) {
  for (const auto& [other, value] : parameters)
    GRAFT_CHECK(other == name || !value.is_same(tensor), "attach",
                "a module to save must not share a weight with another module; got '", name,
                "' shared with '", other, "'");
}

void collect_modules_to_save(torch::nn::Module& model, State& state) {
  const auto parameters = plain_parameters(model);
  for (const auto& item : state.options.modules_to_save) {
    bool found = false;
    for (const auto& module : model.named_modules("", false)) {
      if (!names_module(module.key(), item)) continue;
      found = true;
      for (const auto& parameter : module.value()->named_parameters()) {
        const std::string name = module.key() + "." + parameter.key();
        refuse_shared(parameters, name, parameter.value());
        state.model_parameters.push_back({name, name, parameter.value(), {}});
      }
    }
    GRAFT_CHECK(found, "attach", "modules_to_save must name modules of the model; got '", item,
                "'");
  }
}

void collect_biases(torch::nn::Module& model, State& state) {
  if (state.options.bias == TrainedBias::none) return;
  std::set<std::string> adapted;
  for (const auto& layer : state.layers) adapted.insert(layer.name + ".bias");
  for (const auto& [name, tensor] : plain_parameters(model)) {
    if (!name.ends_with(".bias")) continue;
    const bool in_adapted = adapted.count(name) > 0;
    if (state.options.bias == TrainedBias::adapted_layers && !in_adapted) continue;
    const bool known = std::any_of(state.model_parameters.begin(), state.model_parameters.end(),
                                   [&](const auto& p) { return p.name == name; });
    if (known) continue;
    std::string key = name;
    if (in_adapted) key.insert(key.size() - 5, ".base_layer");
    state.model_parameters.push_back({name, key, tensor, {}});
  }
}

// The chosen layers of gated blocks as their blocks, each at the place of its first layer.
std::vector<nn::SelectedLayer> whole_blocks(const torch::nn::Module& model,
                                            const std::vector<nn::SelectedLayer>& chosen,
                                            std::string_view method) {
  std::map<const torch::nn::Module*, nn::SelectedLayer> block_of;  // by its layers
  for (const auto& module : model.named_modules("", false)) {
    const auto* block = module.value()->as<nn::GatedMlpImpl>();
    if (block == nullptr) continue;
    for (const auto& layer : {block->gate_proj, block->up_proj, block->down_proj})
      block_of[layer.get()] = {module.key(), module.value()};
  }
  GRAFT_CHECK(!block_of.empty(), "attach", method,
              " needs gated feed-forward blocks (graft::nn::GatedMlp); got a model without one");
  std::vector<nn::SelectedLayer> layers;
  std::map<std::string, int> layers_chosen;  // by block
  for (const auto& layer : chosen) {
    const auto it = block_of.find(layer.module.get());
    if (it == block_of.end())
      layers.push_back(layer);
    else if (++layers_chosen[it->second.name] == 1)
      layers.push_back(it->second);
  }
  GRAFT_CHECK(
      !layers_chosen.empty(), "attach", method,
      " needs targets that choose gate_proj, up_proj and down_proj of some block; got none");
  for (const auto& [name, count] : layers_chosen)
    GRAFT_CHECK(count == 3, "attach", method,
                " takes all three layers of a block, gate_proj, up_proj and down_proj; got ", count,
                " of them (block '", name, "')");
  return layers;
}

void check_name(const std::string& name) {
  GRAFT_CHECK(!name.empty() && name.find('.') == std::string::npos, "attach",
              "an adapter's name must not be empty or hold a dot; got '", name, "'");
}

// What the initialiser has to know, where it has to know something; the options' patterns then say
// what EVA decided, and layers without a rank are left out.
InitFindings find_starts(torch::nn::Module& model, std::vector<nn::SelectedLayer>& layers,
                         State& state) {
  const adapters::StartPlan plan = state.recipe->start_plan();
  const bool reads_data =
      plan.kind.needs == init::Needs::gradient || plan.kind.needs == init::Needs::inputs;
  if (!reads_data || !state.options.initialise) return {};
  InitFindings found = run_init_pass(model, layers, plan, state.options, *state.shared);
  if (found.ranks.empty()) return found;
  nn::LayerPattern<int64_t> ranks;
  nn::LayerPattern<double> alphas;
  for (const auto& [name, module] : layers) {
    const int64_t asked = nn::find_pattern(state.options.rank_pattern, name).value_or(plan.rank);
    const double alpha = nn::find_pattern(state.options.alpha_pattern, name).value_or(plan.alpha);
    const int64_t rank = found.ranks.at(name);
    const double follows = plan.options.eva.adjust_scaling_factors
                               ? static_cast<double>(rank) / static_cast<double>(asked)
                               : 1.0;
    if (rank == 0) continue;
    const std::string key = nn::exact_pattern_key(name);
    if (rank != plan.rank) ranks.emplace_back(key, rank);
    if (alpha * follows != plan.alpha) alphas.emplace_back(key, alpha * follows);
  }
  std::erase_if(layers, [&](const auto& layer) { return found.ranks.at(layer.name) == 0; });
  state.options.rank_pattern = std::move(ranks);
  state.options.alpha_pattern = std::move(alphas);
  return found;
}

// Makes the adapters, without touching the model.
void make_layers(const std::vector<nn::SelectedLayer>& layers, State& state,
                 InitFindings findings) {
  const bool initialise = state.options.initialise;
  std::vector<std::pair<std::string, nn::FrozenLayer>> views;
  for (const auto& [name, module] : layers) views.emplace_back(name, nn::frozen_layer(*module));
  const auto shared = state.recipe->make_shared_part(
      views, {.name = "", .seed = state.options.seed, .initialise = initialise});
  for (const auto& [name, module] : layers) {
    const adapters::LayerOverride override_{nn::find_pattern(state.options.rank_pattern, name),
                                            nn::find_pattern(state.options.alpha_pattern, name)};
    const auto report = std::make_shared<init::LayerReport>();
    const auto facts = findings.facts.extract(name);
    const adapters::LayerContext context{
        name,  state.options.seed, initialise, shared, facts.empty() ? nullptr : facts.mapped(),
        report};
    auto adapter = state.recipe->make(nn::frozen_layer(*module), context, override_);
    // An adapter keeps its context, so what was found of its layer is emptied in place: a gradient
    // would stay in memory for as long as the adapter.
    if (!facts.empty()) {
      *facts.mapped() = {};
      return_free_memory();
    }
    state.layers.push_back({name, module, std::move(adapter)});
    if (report->rank > 0) state.start_reports.push_back(*report);
  }
}

template <class T>
void check_patterns_used(const nn::LayerPattern<T>& pattern,
                         const std::vector<nn::SelectedLayer>& layers, const char* what) {
  for (const auto& [key, value] : pattern) {
    const bool used = std::any_of(layers.begin(), layers.end(), [&](const auto& layer) {
      return nn::pattern_key_matches(key, layer.name);
    });
    GRAFT_CHECK(used, "attach", "every key of ", what, " must match an adapted layer; got '", key,
                "'");
  }
}

// Everything that can fail has happened before this.
void put_in(torch::nn::Module& model, const std::shared_ptr<State>& state) {
  for (auto& item : plain_parameters(model)) item.second.set_requires_grad(false);
  for (const auto& layer : state->layers) {
    auto slot = nn::AdapterSlot::ensure(*layer.module);
    slot->owner = state->shared;
    slot->add(state->options.name, layer.adapter);
    state->slots.push_back(std::move(slot));
  }
  for (auto& parameter : state->model_parameters) {
    auto& shared = state->shared->originals;
    const auto it = shared.find(parameter.name);
    if (it == shared.end())
      shared.emplace(parameter.name,
                     std::pair(parameter.parameter, parameter.parameter.variable_data()));
    parameter.trained = shared.at(parameter.name).second.clone();
  }
  state->shared->members.push_back(state);
  state->shared->active = {state->options.name};
  state->shared->refresh();
  state->remember_versions();
}

}  // namespace

AttachedAdapter attach(torch::nn::Module& model, std::shared_ptr<const adapters::Recipe> recipe,
                       const AttachOptions& options) {
  GRAFT_CHECK(recipe != nullptr, "attach", "a method must be given; got none");
  check_name(options.name);
  recipe->validate();
  auto state = std::make_shared<State>();
  state->recipe = std::move(recipe);
  state->options = options;
  state->shared = shared_of(model);
  GRAFT_CHECK(!state->shared->merged, "attach",
              "adapters can only be attached to a model that is not merged");
  for (const auto& other : state->shared->alive()) {
    GRAFT_CHECK(other->options.name != options.name, "attach",
                "an adapter's name must be new; got '", options.name, "' a second time");
    GRAFT_CHECK(other->options.bias == TrainedBias::none || options.bias == TrainedBias::none,
                "attach", "only one adapter of a model may train biases; got '",
                other->options.name, "' and '", options.name, "'");
  }
  auto layers = nn::select(model, options.targets, options.modules_to_save);
  if (state->recipe->adapts_blocks()) {
    GRAFT_CHECK(options.bias == TrainedBias::none, "attach",
                "biases of mixtures' blocks stay frozen; got bias=all or lora_only");
    layers = whole_blocks(model, layers, state->recipe->method());
  }
  if (options.initialise) {
    check_patterns_used(options.rank_pattern, layers, "rank_pattern");
    check_patterns_used(options.alpha_pattern, layers, "alpha_pattern");
  }
  make_layers(layers, *state, find_starts(model, layers, *state));
  state->options.init_data = {};  // its functions may hold on to the model
  collect_modules_to_save(model, *state);
  collect_biases(model, *state);
  for (const auto& module : model.named_modules("", false))
    if (nn::is_adaptable(*module.value())) state->all_layer_names.push_back(module.key());
  state->shared->owners.clear();
  for (const auto& [name, tensor] : plain_parameters(model))
    state->shared->owners[tensor.unsafeGetTensorImpl()].push_back(name);
  put_in(model, state);
  return AttachedAdapter(state);
}

}  // namespace graft
