/// Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): memory for time.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace graft::train {

/// f(x), keeping nothing of f's inside: backward runs f a second time.
///
/// trainable: every tensor besides x that f uses and that needs a gradient, parameters captured by
/// f included. They must be listed because f is hidden from autograd; where x needs no gradient
/// itself they are what connects the output to the graph. When neither x nor one of them requires a
/// gradient, f simply runs.
///
/// f must compute the same again: graft's dropout does (its random keys are recorded and played
/// back), and a batch's parts (nn::BatchRows) are in force again. Other scopes that are open around
/// the call (autocast, an adapter's activation) are not reopened in backward, f must open them
/// itself. f and what it captures live until the graph is freed.
/// Calls nest.
///
/// Differentiable once. Backward throws graft::Error when f uses a trainable tensor that is not
/// listed, and when the second run's output has another shape or dtype.
at::Tensor checkpoint(std::function<at::Tensor(const at::Tensor&)> f, const at::Tensor& x,
                      const std::vector<at::Tensor>& trainable);

}  // namespace graft::train
