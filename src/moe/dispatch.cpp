#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/moe/dispatch.h>

#include <vector>

#include "../ops/cuda_dispatch.h"
#include "../ops/expert_device.h"

namespace graft::moe {
namespace {

at::Tensor integers(const std::vector<int64_t>& values) {
  return at::tensor(values, at::kLong);
}

DispatchPlan dispatch_on_device(const Routing& routing, bool every_slot) {
  const at::Tensor& experts = routing.experts;
  const int64_t tokens = experts.size(0), slots = experts.size(1), E = routing.expert_count();
  // Tokens without an expert come as expert E, by their first slot; E + 1 is nobody's.
  at::Tensor groups = experts;
  if (!every_slot) {
    groups = experts.masked_fill(experts < 0, E + 1);
    groups.select(1, 0).masked_fill_((experts < 0).all(1), E);
  }
  const ops::SlotOrder order = ops::device::slot_order(groups.reshape({-1}), E + 1);
  const at::Tensor offsets = order.offsets.narrow(0, 0, E + 1);
  if (every_slot) {
    const int64_t rows = tokens * slots;
    return {{offsets, order.slots.floor_divide(slots), order.slots,
             at::arange(tokens + 1, experts.options()) * slots, order.places, slots, rows},
            routing.sums_to_one};
  }
  const at::Tensor counts = order.offsets.narrow(0, E, 2).cpu();
  const int64_t routed = counts.const_data_ptr<int64_t>()[0],
                rows = counts.const_data_ptr<int64_t>()[1];
  const at::Tensor pair = order.slots.narrow(0, 0, rows);
  const at::Tensor token_offsets = at::zeros({tokens + 1}, experts.options());
  token_offsets.slice(0, 1).copy_((groups <= E).sum(1).cumsum(0));
  return {{offsets, pair.floor_divide(slots), pair, token_offsets,
           order.places.index_select(0, std::get<0>(at::sort(pair))), slots, routed},
          routing.sums_to_one};
}

}  // namespace

at::Tensor DispatchPlan::row_weights(const at::Tensor& weights) const {
  const int64_t routed = rows.routed();
  const at::Tensor selected = weights.reshape({-1}).index_select(0, rows.pair.narrow(0, 0, routed));
  if (routed == rows.rows()) return selected;
  return at::cat({selected, at::ones({rows.rows() - routed}, weights.options())});
}

at::Tensor DispatchPlan::counts() const {
  return rows.offsets.slice(0, 1) - rows.offsets.slice(0, 0, -1);
}

DispatchPlan dispatch(const Routing& routing, bool every_slot) {
  GRAFT_CHECK(routing.experts.scalar_type() == at::kLong && routing.experts.dim() == 2, "dispatch",
              "experts must be int64 [tokens, slots]; got ", routing.experts.toString(), " of ",
              routing.experts.sizes());
  if (ops::on_device(routing.experts)) return dispatch_on_device(routing, every_slot);
  const at::Tensor experts = routing.experts.contiguous();
  const int64_t tokens = experts.size(0), slots = experts.size(1), E = routing.expert_count();
  const int64_t* expert = experts.const_data_ptr<int64_t>();

  // Counting sort: by expert, then by token and slot; tokens without an expert come as expert E.
  std::vector<int64_t> offsets(E + 2, 0), token_offsets(tokens + 1, 0);
  std::vector<bool> alone(tokens, true);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t e = expert[t * slots + slot];
      if (e < 0) continue;
      GRAFT_CHECK(e < E, "dispatch", "an expert must be below ", E, "; got ", e, " (token ", t,
                  ")");
      alone[t] = false;
      ++offsets[e + 1];
      ++token_offsets[t + 1];
    }
    if (!alone[t]) continue;
    ++offsets[E + 1];
    ++token_offsets[t + 1];
  }
  for (int64_t e = 0; e <= E; ++e) offsets[e + 1] += offsets[e];
  for (int64_t t = 0; t < tokens; ++t) token_offsets[t + 1] += token_offsets[t];

  const int64_t rows = offsets[E + 1];
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1), token(rows), pair(rows),
      token_rows(rows);
  int64_t filled = 0;
  const auto place = [&](int64_t t, int64_t slot, int64_t e) {
    const int64_t row = next[e]++;
    token[row] = t;
    pair[row] = t * slots + slot;
    token_rows[filled++] = row;
  };
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t slot = 0; slot < slots; ++slot)
      if (expert[t * slots + slot] >= 0) place(t, slot, expert[t * slots + slot]);
    if (alone[t]) place(t, 0, E);
  }
  offsets.pop_back();
  const int64_t routed = offsets.back();
  return {{integers(offsets), integers(token), integers(pair), integers(token_offsets),
           integers(token_rows), slots, routed},
          routing.sums_to_one};
}

}  // namespace graft::moe
