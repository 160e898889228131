// The loops over rows that the operations of mixtures share, and how they keep the plan.
#pragma once

#include <graft/ops/expert_rows.h>
#include <torch/csrc/autograd/custom_function.h>

namespace graft::ops {

// The sum over the rows m of each token of weights[m] values[m], in the order of slots.  values:
// [M, n], weights: [M] or undefined (1), of one type, fp32 or fp64 (on a device values of any);
// returns [tokens, n].
at::Tensor sum_rows(const at::Tensor& values, const at::Tensor& weights, const ExpertRows& rows);

// x[token of the row]: [tokens, n] to [M, n].
at::Tensor token_rows(const at::Tensor& x, const ExpertRows& rows);

// The plan among the saved data of a function: by reference.
void save_expert_rows(torch::autograd::AutogradContext* ctx, const ExpertRows& rows);
ExpertRows saved_expert_rows(torch::autograd::AutogradContext* ctx);

}  // namespace graft::ops
