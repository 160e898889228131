/// From a routing to the rows of work: made once for each router and call, used by every projection
/// and by the backward pass.
#pragma once

#include <graft/moe/router.h>
#include <graft/ops/expert_rows.h>

namespace graft::moe {

/// The work of one routing. Rows are sorted by expert, within an expert by token and slot; a token
/// with no expert (padding, beyond the capacity) gets one row at the end, for the base alone.
/// Nothing depends on chance or on the number of threads.
struct DispatchPlan {
  ops::ExpertRows rows;
  bool weights_sum_to_one = false;  ///< over the rows of each token

  /// The rows' weights [M] from the routing's weights [tokens, slots]; 1 for a row without expert.
  /// Differentiable.
  at::Tensor row_weights(const at::Tensor& weights) const;
  /// Tokens that each expert works on.  int64 [experts].
  at::Tensor counts() const;
};

/// The plan of a routing. `every_slot`: the caller knows that no slot of `routing.experts` is -1.
/// Without that a device has to be waited for, as the host must learn how many rows there are.
DispatchPlan dispatch(const Routing& routing, bool every_slot = false);

}  // namespace graft::moe
