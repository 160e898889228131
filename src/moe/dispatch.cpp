#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/moe/dispatch.h>

#include <vector>

namespace graft::moe {
namespace {

at::Tensor integers(const std::vector<int64_t>& values) {
  return at::tensor(values, at::kLong);
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

DispatchPlan dispatch(const Routing& routing) {
  const at::Tensor experts = routing.experts.contiguous();
  GRAFT_CHECK(experts.is_cpu() && experts.scalar_type() == at::kLong && experts.dim() == 2,
              "dispatch", "experts must be int64 [tokens, slots] on the CPU; got ",
              experts.toString(), " of ", experts.sizes());
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
  return {{integers(offsets), integers(token), integers(pair), integers(token_offsets),
           integers(token_rows)},
          routing.sums_to_one};
}

}  // namespace graft::moe
