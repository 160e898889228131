// How an operation keeps its input for backward without holding on to memory that another
// operation can fill again.
//
// rms_norm and swiglu save what their outputs are computed from, for their own backward. A layer
// that reads such an output keeps the node that made it and computes the output once more in
// backward, bit for bit, instead of keeping the output: a norm's or a product's cost against
// [tokens, in] numbers a layer. A part that split_rows made of such an output is served, too.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <typeindex>

namespace graft::ops {

// Computes a node's output [tokens, n] again from what the node has saved.
using Recompute = at::Tensor (*)(torch::autograd::Node& node);

// Tells that the outputs of autograd::Function F can be computed again; called once, at start-up.
// Returns true, so that a static variable can hold the call.
bool register_recompute(std::type_index node, Recompute recompute);

// What to pass to save_for_backward for the input x, given as `rows` too ([tokens, in]): the rows,
// or undefined where they are not needed or their node is kept in the context instead.
at::Tensor keep_rows(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                     const at::Tensor& rows, bool needed = true);

// The rows in backward, from the saved variable that keep_rows gave.
at::Tensor kept_rows(torch::autograd::AutogradContext* ctx, const at::Tensor& saved);

}  // namespace graft::ops
