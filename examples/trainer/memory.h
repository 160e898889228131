/// How much memory a training run needs, predicted: what `finetune` plans, and says when there is
/// too little.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>

#include "examples/models/decoder_config.h"

namespace graft::trainer {

/// Bytes of each part.
struct MemoryUse {
  int64_t weights = 0;      ///< the frozen model
  int64_t adapter = 0;      ///< its parameters
  int64_t optimiser = 0;    ///< their gradients and AdamW's two means
  int64_t activations = 0;  ///< what a pass keeps for backward, and its largest passing tensors

  int64_t total() const { return weights + adapter + optimiser + activations; }
};

/// What decides how much a forward and backward pass keeps.
struct PassShape {
  int64_t rows = 1, tokens = 1;  ///< of the largest batch
  int64_t rank = 0;              ///< of the adapter, on each of a block's seven linear layers
  bool segments = false;         ///< rows of several examples, each with a mask of its own
  bool recompute = false;        ///< --gradient-checkpointing
  at::ScalarType type = at::kFloat;
};

/// The numbers of a model times their size.
int64_t weight_bytes(const models::DecoderConfig& config, at::ScalarType type);

/// What LoRA on all linear layers keeps; methods that compute more keep more. A block of H hidden
/// and F inner features, Q query and K key features keeps for each token
///   2 H (the inputs of its norms) + 3 Q + 2 K (queries, keys, values, attention's result, and that
///   as the output layer's rows) + 2 F (gate and up)
/// numbers, and 7 r + a number a head of fp32. Recomputed blocks keep H, and one at a time the
/// rest. Products in fp16 on a CPU make fp32 copies besides.
int64_t activation_bytes(const models::DecoderConfig& config, const PassShape& pass);

/// "weights 513 MiB, adapter 9 MiB, optimiser 28 MiB, activations 1228 MiB, in all 1778 MiB".
std::string describe(const MemoryUse& use);

}  // namespace graft::trainer
