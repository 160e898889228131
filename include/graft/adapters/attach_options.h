/// Where adapters go in a model, beside the method's own options.
#pragma once

#include <graft/nn/selector.h>

#include <cstdint>
#include <string>
#include <vector>

namespace graft {

/// Which of the model's own biases are trained and saved along: none, all, or those of the adapted
/// layers.
enum class TrainedBias { none, all, adapted_layers };

/// Options of `attach`; the names in brackets are PEFT's.
struct AttachOptions {
  nn::Selector targets =
      nn::Selector::all_linear();  ///< which layers [target_modules, exclude_modules, ...]
  nn::LayerPattern<int64_t> rank_pattern =
      {};  ///< rank of some layers, first match wins [rank_pattern]
  nn::LayerPattern<double> alpha_pattern =
      {};  ///< alpha of some layers, first match wins [alpha_pattern]
  /// Modules that are trained and saved whole; a module is meant when its name equals an item or
  /// ends with "." + item.
  std::vector<std::string> modules_to_save = {};
  TrainedBias bias = TrainedBias::none;  ///< [bias: none, all, lora_only]
  std::string name = "default";          ///< the adapter's name; no dots
  uint64_t seed = 0;                     ///< of initial values and dropout masks
};

}  // namespace graft
