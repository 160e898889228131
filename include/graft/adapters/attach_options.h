/// Where adapters go in a model, beside the method's own options.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/nn/selector.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace graft {

/// Which of the model's own biases are trained and saved along: none, all, or those of the adapted
/// layers.
enum class TrainedBias { none, all, adapted_layers };

/// Batches of the training data for an initialiser that needs them (lora_ga, corda, eva). The model
/// runs on them as it is before attaching, in eval mode; lora_ga also runs backward.
struct InitData {
  int64_t batches = 8;  ///< how many there are at most; EVA may stop earlier
  /// Runs the model on batch i, counted from 0, and returns its mean loss. Batches must not depend
  /// on anything but i, so that the same call finds the same start.
  std::function<at::Tensor(int64_t batch)> loss;
  /// Which tokens of batch i count as inputs: bool, one a row of the layers' inputs; empty: all.
  std::function<at::Tensor(int64_t batch)> mask = {};
  /// Told after every batch.
  std::function<void(int64_t done, int64_t batches)> progress = {};
};

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
  InitData init_data = {};               ///< for initialisers that need data
  /// Off: the factors stay empty for a `load` that follows, and no initialiser runs.
  bool initialise = true;
};

}  // namespace graft
