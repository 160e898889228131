// What an adapter's configuration file says of an attached adapter, and whether the two agree;
// private to the attach folder.
#pragma once

#include <graft/io/adapter_config.h>
#include <graft/io/convert_adapter.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "state.h"

namespace graft {

// The shortest honest target list: last components of the layers' names where those choose exactly
// the adapted layers, else whole names. A block is named by its three layers.
std::vector<std::string> target_list(const AttachedAdapter::State& state);

// PEFT sorts a pattern's keys when it saves, so overlapping keys would change their meaning: then
// each layer that a key matches gets a key of its own, anchored to its whole name.
template <class T>
nn::LayerPattern<T> order_free(const nn::LayerPattern<T>& pattern,
                               const std::vector<AdaptedLayer>& layers) {
  nn::LayerPattern<T> by_layer;
  bool overlap = false;
  for (const auto& layer : layers) {
    const auto matches = std::count_if(pattern.begin(), pattern.end(), [&](const auto& item) {
      return nn::pattern_key_matches(item.first, layer.name);
    });
    overlap = overlap || matches > 1;
    if (matches == 0) continue;
    by_layer.emplace_back(nn::exact_pattern_key(layer.name),
                          *nn::find_pattern(pattern, layer.name));
  }
  return overlap ? by_layer : pattern;
}

// Throws unless the folder's options mean what the adapter's do.
void check_same_options(const adapters::Recipe& theirs, const adapters::Recipe& ours,
                        const std::filesystem::path& folder);

// Whether the adapter starts from a part of the base weight: its file is then the plain LoRA of
// twice the rank (docs/design.md, section 5).
bool subtracts(const adapters::Recipe& recipe);

// The plain LoRA of each layer, by the layer's name.
std::map<std::string, adapters::PlainLora> plain_layers(const io::AdapterConfig& config,
                                                        const AttachedAdapter::State& state);

// A plain folder gives back an adapter that starts from a part of the weight only with its scale.
void check_same_scale(const io::AdapterConfig& theirs, const AttachedAdapter::State& state,
                      const std::filesystem::path& folder);

}  // namespace graft
