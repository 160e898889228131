#include <ATen/ATen.h>
#include <graft/moe/dispatch.h>

#include "tests/ops/gradients.h"

namespace {

using namespace graft::moe;
using graft::ops::combine_rows;
using graft::ops::gather_tokens;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;
using graft::testing::Tensors;

// A routing by hand.  experts: [tokens][slots].
Routing routing_of(const std::vector<std::vector<int64_t>>& experts, int64_t count, int64_t slots) {
  Routing routing;
  const auto tokens = static_cast<int64_t>(experts.size());
  routing.experts = at::zeros({tokens, slots}, at::kLong);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t slot = 0; slot < slots; ++slot) routing.experts[t][slot] = experts[t][slot];
  routing.chosen = routing.experts;
  routing.logits = routing.probabilities = at::zeros({tokens, count}, at::kDouble);
  routing.weights = at::ones({tokens, slots}, at::kDouble).masked_fill(routing.experts < 0, 0);
  return routing;
}

Routing random_routing(int64_t tokens, int64_t experts, int64_t k) {
  at::manual_seed(tokens + experts);
  return route({.experts = experts, .top_k = k}, at::randn({tokens, experts}, at::kDouble));
}

// What every plan must be.
void check_plan(const Routing& routing) {
  const DispatchPlan plan = dispatch(routing);
  const int64_t routed = (routing.experts >= 0).sum().item<int64_t>();
  CHECK(plan.rows.routed() == routed);
  CHECK(at::equal(plan.counts(), expert_counts(routing)));
  CHECK(plan.counts().sum().item<int64_t>() == routed);
  const int64_t slots = routing.experts.size(1);
  const auto *offsets = plan.rows.offsets.const_data_ptr<int64_t>(),
             *pair = plan.rows.pair.const_data_ptr<int64_t>(),
             *token = plan.rows.token.const_data_ptr<int64_t>();
  const at::Tensor flat = routing.experts.reshape({-1});
  for (int64_t e = 0; e < plan.rows.experts(); ++e)
    for (int64_t m = offsets[e]; m < offsets[e + 1]; ++m) {
      CHECK(flat[pair[m]].item<int64_t>() == e);
      CHECK(token[m] == pair[m] / slots);
      if (m > offsets[e]) CHECK(pair[m] > pair[m - 1]);
    }
  // Every row belongs to one token, in rising order of pairs.
  CHECK(at::equal(std::get<0>(plan.rows.token_rows.sort()), at::arange(plan.rows.rows())));
  const at::Tensor ordered = plan.rows.pair.index({plan.rows.token_rows});
  CHECK(at::equal(std::get<0>(ordered.sort()), ordered));
}

}  // namespace

TEST_CASE("T6 a plan holds each pair once: empty experts, all to one, none, one, all",
          "[moe][dispatch]") {
  check_plan(routing_of({{2, 0}, {2, 4}, {0, 2}}, 5, 2));
  check_plan(routing_of({{1, 3}, {1, 3}, {1, 3}}, 4, 2));
  check_plan(routing_of({}, 4, 2));
  check_plan(routing_of({{3, 1}}, 4, 2));
  check_plan(random_routing(20, 3, 3));
  check_plan(random_routing(50, 8, 2));
  check_plan(routing_of({{-1}, {0}, {-1}, {1}, {0}}, 2, 1));
  const DispatchPlan plan = dispatch(routing_of({{-1, -1}, {1, -1}, {-1, 0}}, 3, 2));
  CHECK(at::equal(plan.rows.token, at::tensor({2, 1, 0})));
  CHECK(at::equal(plan.rows.offsets, at::tensor({0, 1, 2, 2})));
}

TEST_CASE("T5 identity experts give K times the tokens, or the tokens", "[moe][dispatch]") {
  const Routing routing = random_routing(40, 8, 3);
  const DispatchPlan plan = dispatch(routing);
  at::manual_seed(1);
  const at::Tensor x = at::randn({40, 7}, at::kDouble), rows = gather_tokens(x, plan.rows);
  // Sums of three equal numbers, added one by one.
  CHECK(at::equal(combine_rows(rows, at::ones({120}, at::kDouble), plan.rows), x + x + x));
  const at::Tensor y = combine_rows(rows, plan.row_weights(routing.weights), plan.rows);
  CHECK(((y - x) / x).abs().max().item<double>() < 3 * 2.3e-16);
}

TEST_CASE("a token without expert has one row of weight 1", "[moe][dispatch]") {
  const Routing routing = routing_of({{-1, -1}, {1, 0}}, 2, 2);
  const DispatchPlan plan = dispatch(routing);
  const at::Tensor x = at::tensor({3.0, 5.0}, at::kDouble).view({2, 1});
  const at::Tensor weights = at::tensor({0.0, 0.0, 0.25, 0.5}, at::kDouble).view({2, 2});
  const at::Tensor y =
      combine_rows(gather_tokens(x, plan.rows), plan.row_weights(weights), plan.rows);
  CHECK(at::equal(y, at::tensor({3.0, 3.75}, at::kDouble).view({2, 1})));
}

TEST_CASE("gathering and combining have the gradients of central differences", "[moe][dispatch]") {
  const Routing routing = routing_of({{2, 0}, {2, -1}, {-1, -1}, {0, 2}}, 4, 2);
  const DispatchPlan plan = dispatch(routing);
  at::manual_seed(1);
  graft::testing::check_differences(
      [&](const Tensors& in) {
        const at::Tensor rows = gather_tokens(in[0], plan.rows);
        return combine_rows(rows * rows, plan.row_weights(in[1]), plan.rows);
      },
      {at::randn({4, 3}, at::kDouble), at::randn({4, 2}, at::kDouble)});
}

TEST_CASE("sums over rows do not depend on the number of threads", "[moe][dispatch]") {
  const Routing routing = random_routing(300, 8, 4);
  const DispatchPlan plan = dispatch(routing);
  at::manual_seed(2);
  const at::Tensor x = at::randn({300, 513}), weights = routing.weights.to(at::kFloat);
  graft::testing::check_threads([&] {
    const at::Tensor leaf = x.clone().set_requires_grad(true),
                     w = weights.detach().clone().set_requires_grad(true);
    const at::Tensor y =
        combine_rows(gather_tokens(leaf, plan.rows), plan.row_weights(w), plan.rows);
    y.backward(graft::testing::seed_like(y));
    return Tensors{y.detach(), leaf.grad(), w.grad()};
  });
}

TEST_CASE("a dispatch refuses experts that do not exist", "[moe][dispatch]") {
  Routing routing = routing_of({{0, 4}}, 4, 2);
  CHECK(
      contains(error_of([&] { dispatch(routing); }), "an expert must be below 4; got 4 (token 0)"));
}
