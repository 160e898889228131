#include "file_options.h"

#include <graft/core/error.h>
#include <graft/nn/gated_mlp.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

namespace graft {
namespace {

// Options that change what the tensors mean; dropout, initialisation and what a file holds do not.
nlohmann::json meaning(const adapters::Recipe& recipe) {
  // By the type in files, not by name: a LoRA-FA folder is a LoRA folder.
  nlohmann::json fields = {{"peft_type", adapters::find_method(recipe.method()).peft_type}}, kept;
  recipe.write_config(fields);
  const std::set<std::string> others = {
      "init_lora_weights", "init_weights",         "d_initial",
      "save_projection",   "dora_dropout_on_base", "random_seed",
      "mask_type",         "forward_path",         "jitter_noise"};
  for (const auto& [key, value] : fields.items()) {
    // What a router is trained with: router_aux_loss_coef, router_init_range, router_bias_rate.
    const bool training =
        key.starts_with("router_") && (key.find("_loss") != std::string::npos ||
                                       key.ends_with("_range") || key.ends_with("_rate"));
    if (key.ends_with("_dropout") || training || others.count(key) > 0) continue;
    kept[key] = value;
    if (value.is_object()) kept[key].erase("lora_dropout");
  }
  return kept;
}

}  // namespace

std::vector<std::string> target_list(const AttachedAdapter::State& state) {
  std::set<std::string> adapted, last;
  for (const auto& layer : state.layers) {
    const bool block = layer.module->as<nn::GatedMlpImpl>() != nullptr;
    for (const char* part : {".gate_proj", ".up_proj", ".down_proj"})
      adapted.insert(block ? layer.name + part : layer.name);
  }
  for (const auto& name : adapted) last.insert(name.substr(name.rfind('.') + 1));
  nn::Selector by_last;
  by_last.names.assign(last.begin(), last.end());
  const bool exact = std::all_of(
      state.all_layer_names.begin(), state.all_layer_names.end(),
      [&](const auto& name) { return by_last.matches(name) == (adapted.count(name) > 0); });
  return exact ? by_last.names : std::vector<std::string>(adapted.begin(), adapted.end());
}

void check_same_options(const adapters::Recipe& theirs, const adapters::Recipe& ours,
                        const std::filesystem::path& folder) {
  const nlohmann::json in_file = meaning(theirs), attached = meaning(ours);
  std::string difference;
  for (const auto& [key, value] : attached.items()) {
    const nlohmann::json other = in_file.value(key, nlohmann::json());
    if (other != value)
      difference +=
          concat(difference.empty() ? "" : ", ", key, "=", other.dump(), " for ", value.dump());
  }
  GRAFT_CHECK(difference.empty(), "adapter",
              "a folder's options must agree with the adapter's; got ", difference, " (folder '",
              folder.string(), "')");
}

bool subtracts(const adapters::Recipe& recipe) {
  return recipe.start_plan().kind.subtracts;
}

std::map<std::string, adapters::PlainLora> plain_layers(const io::AdapterConfig& config,
                                                        const AttachedAdapter::State& state) {
  std::map<std::string, adapters::PlainLora> plain;
  for (const auto& layer : state.layers) {
    adapters::StoredLayer stored;
    for (const auto& [suffix, tensor] : layer.adapter->trained_file_tensors())
      stored[suffix] = tensor;
    for (const auto& item : layer.adapter->named_buffers()) stored[item.key()] = item.value();
    plain.emplace(layer.name, io::plain_lora(config, layer.name, stored));
  }
  return plain;
}

void check_same_scale(const io::AdapterConfig& theirs, const AttachedAdapter::State& state,
                      const std::filesystem::path& folder) {
  const auto in_file = plain_layers(theirs, state),
             attached = plain_layers({state.recipe, state.options, "", ""}, state);
  for (const auto& [name, lora] : attached) {
    const double other = in_file.at(name).scale;
    GRAFT_CHECK(std::abs(other - lora.scale) <= 1e-9 * std::abs(lora.scale), "adapter",
                "a folder's scale must be the adapter's; got ", other, " for ", lora.scale,
                " (layer '", name, "', folder '", folder.string(), "')");
  }
}

}  // namespace graft
