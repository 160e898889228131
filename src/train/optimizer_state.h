// What the optimisers have in common when their state is loaded.
#pragma once

#include <graft/train/adamw.h>

#include <functional>
#include <string>
#include <vector>

namespace graft::train {

// "a, b, c and 4 more"
std::string first_names(const std::vector<std::string>& names);

// The state's "step", or -1 when it has no such number.
int64_t stored_step(const NamedTensors& state);

// Copies the state into the targets of the same names; "step" must not be negative. Throws, with
// nothing changed, listing what is missing, unexpected, given twice, of another shape or dtype, or
// not sound. `what` is what the state belongs to: "the parameters".
void copy_state(const char* area, const char* what, const NamedTensors& targets,
                const NamedTensors& state,
                const std::function<bool(const std::string&, const at::Tensor&)>& sound);

}  // namespace graft::train
