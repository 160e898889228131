/// The optimiser's groups for an attached adapter.
#pragma once

#include <graft/attach/attach.h>
#include <graft/train/adamw.h>

#include <vector>

namespace graft::train {

/// What the adapter trains, grouped by what its method says of learning rate and weight decay
/// (adapters::ParameterRule; LoRA+ is such a rule). Each parameter is in exactly one group; those
/// that train some rows at a time (nn::Adapter::live_rows, DyLoRA) say so there.
std::vector<ParameterGroup> parameter_groups(const AttachedAdapter& adapter, double weight_decay);

}  // namespace graft::train
