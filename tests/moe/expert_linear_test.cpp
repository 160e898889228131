#include <ATen/ATen.h>
#include <graft/moe/dispatch.h>
#include <graft/ops/expert_linear.h>
#include <graft/ops/lora_linear.h>

#include "tests/ops/gradients.h"
#include "tests/support/live_bytes.h"

namespace {

using namespace graft::moe;
using namespace graft::ops;
using namespace graft::testing;

constexpr double kScale = 1.7;
constexpr int64_t kSlots = 2, kExperts = 4, kIn = 5, kOut = 6, kRank = 2;
const Dropout kDropout{0.4, {5, 6, 7}};

// Expert 3 has no token, token 2 has no expert, token 1 has one.
Routing routing_by_hand() {
  Routing routing;
  routing.experts =
      at::tensor({2, 0, 1, -1, -1, -1, 0, 2, 2, 1, 0, 1}, at::kLong).view({6, kSlots});
  routing.logits = at::zeros({6, kExperts}, at::kDouble);
  return routing;
}

// x, A, B, w (of the pairs); weight and bias besides.
struct Case {
  explicit Case(at::ScalarType type) : plan(dispatch(routing_by_hand())) {
    at::manual_seed(7);
    weight = at::randn({kOut, kIn}, at::kDouble).to(type);
    bias = at::randn({kOut}, at::kDouble).to(type);
    for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{
             {6, kIn}, {kExperts, kRank, kIn}, {kExperts, kOut, kRank}, {6, kSlots}})
      by_token.push_back(at::randn(shape, at::kDouble).to(type));
    by_row = by_token;
    by_row[0] = at::randn({plan.rows.rows(), kIn}, at::kDouble).to(type);
  }
  ExpertTerm term(const Tensors& in, const Dropout& dropout) const {
    return {in[1], in[2], kScale, dropout};
  }
  DispatchPlan plan;
  at::Tensor weight, bias;
  Tensors by_token, by_row;
};

// The rows' outputs as the formula says, from x by row.
at::Tensor plain_rows(const Case& c, const at::Tensor& x, const Tensors& in, const Dropout& drop) {
  const ExpertRows& rows = c.plan.rows;
  // Row `pair` of the mask.
  const at::Tensor wide = at::zeros({6 * kSlots, kIn}, x.options()).index_copy(0, rows.pair, x);
  const at::Tensor dropped = dropout(wide, drop).index_select(0, rows.pair);
  std::vector<at::Tensor> outputs;
  for (int64_t m = 0; m < rows.rows(); ++m) {
    at::Tensor y = c.weight.mv(x[m]) + c.bias;
    for (int64_t e = 0; e < kExperts; ++e)
      if (rows.offsets[e].item<int64_t>() <= m && m < rows.offsets[e + 1].item<int64_t>())
        y = y + kScale * in[2][e].mv(in[1][e].mv(dropped[m]));
    outputs.push_back(y);
  }
  return at::stack(outputs);
}

}  // namespace

TEST_CASE("expert_linear equals the formula row by row, value and every gradient",
          "[moe][experts]") {
  for (const auto type : {at::kDouble, at::kFloat}) {
    const Case c(type);
    const double tolerance = type == at::kDouble ? 1e-12 : 3e-5;
    for (const auto& drop : {Dropout{}, kDropout}) {
      INFO("p " << drop.p);
      const auto unused = [](const Tensors& in) { return in[3].sum() * 0; };
      check_against(
          [&](const Tensors& in) {
            return expert_linear(in[0], c.weight, c.bias, c.term(in, drop), c.plan.rows) +
                   unused(in);
          },
          [&](const Tensors& in) {
            return plain_rows(c, in[0].index_select(0, c.plan.rows.token), in, drop) + unused(in);
          },
          c.by_token, tolerance);
      check_against(
          [&](const Tensors& in) {
            return expert_row_linear(in[0], c.weight, c.bias, c.term(in, drop), c.plan.rows) +
                   unused(in);
          },
          [&](const Tensors& in) { return plain_rows(c, in[0], in, drop) + unused(in); }, c.by_row,
          tolerance);
    }
  }
}

TEST_CASE("the experts' operations have the gradients that central differences give",
          "[moe][experts]") {
  const Case c(at::kDouble);
  for (const auto& drop : {Dropout{}, kDropout}) {
    check_differences(
        [&](const Tensors& in) {
          return expert_linear(in[0], c.weight, c.bias, c.term(in, drop), c.plan.rows) +
                 in[3].sum() * 0;
        },
        c.by_token);
  }
}

TEST_CASE("T6 an expert without rows has zero gradients, no tokens have no output",
          "[moe][experts]") {
  const Case c(at::kDouble);
  const Tensors leaves = graft::testing::leaves_of(c.by_token);
  expert_linear(leaves[0], c.weight, c.bias, c.term(leaves, {}), c.plan.rows).sum().backward();
  for (const int i : {1, 2}) {
    CHECK(leaves[i].grad()[3].abs().max().item<double>() == 0.0);
    CHECK(leaves[i].grad()[0].abs().max().item<double>() > 0.0);
  }

  Routing none = routing_by_hand();
  none.experts = none.experts.slice(0, 0, 0);
  const DispatchPlan plan = dispatch(none);
  const Tensors empty =
      graft::testing::leaves_of({c.by_row[0].slice(0, 0, 0), c.by_row[1], c.by_row[2]});
  const at::Tensor y = expert_linear(empty[0], c.weight, c.bias, c.term(empty, {}), plan.rows);
  CHECK(y.sizes() == at::IntArrayRef({0, kOut}));
  y.sum().backward();
  CHECK(empty[1].grad().abs().max().item<double>() == 0.0);
}

TEST_CASE("T8 one expert on every token is lora_linear bit for bit", "[moe][experts]") {
  Routing routing;
  routing.experts = at::ones({70, 1}, at::kLong);
  routing.logits = at::zeros({70, 2});
  const DispatchPlan plan = dispatch(routing);
  CHECK(plan.rows.only_expert() == 1);
  at::manual_seed(3);
  const Tensors in = {at::randn({70, 64}), at::randn({2, 4, 64}), at::randn({2, 48, 4})};
  const at::Tensor weight = at::randn({48, 64}), bias = at::randn({48}), seed = at::randn({70, 48});
  const auto experts = [&](const Tensors& t) {
    return expert_linear(t[0], weight, bias, {t[1], t[2], kScale, kDropout}, plan.rows);
  };
  const auto lora = [&](const Tensors& t) {
    return lora_linear(t[0], weight, bias, {t[1][1], t[2][1], {}, kScale, kDropout});
  };
  const Tensors expected = graft::testing::gradients(lora, in, seed);
  CHECK(at::equal(experts(in), lora(in)));
  const Tensors found = graft::testing::gradients(experts, in, seed);
  for (size_t i = 0; i < in.size(); ++i) CHECK(at::equal(found[i], expected[i]));
}

TEST_CASE("the experts' operations give the same bits whatever the number of threads",
          "[moe][experts]") {
  at::manual_seed(3);
  const Routing routing = route({.experts = 4, .top_k = 2}, at::randn({90, 4}));
  const DispatchPlan plan = dispatch(routing);
  const Tensors in = {at::randn({90, 64}), at::randn({4, 4, 64}), at::randn({4, 48, 4}),
                      at::randn({4, 4, 48}), at::randn({4, 40, 4})};
  const at::Tensor weight = at::randn({48, 64}), down = at::randn({40, 48});
  graft::testing::check_threads([&] {
    const Tensors t = graft::testing::leaves_of(in);
    const at::Tensor z = expert_linear(t[0], weight, {}, {t[1], t[2], kScale, kDropout}, plan.rows);
    const at::Tensor y = expert_row_linear(z, down, {}, {t[3], t[4], kScale, kDropout}, plan.rows);
    y.backward(graft::testing::seed_like(y));
    Tensors result = {y.detach()};
    for (const at::Tensor& leaf : t) result.push_back(leaf.grad());
    return result;
  });
}

TEST_CASE("expert_linear keeps S and no mask, no copy of x", "[moe][experts]") {
  at::manual_seed(3);
  const DispatchPlan plan = dispatch(route({.experts = 4, .top_k = 2}, at::randn({256, 4})));
  const at::Tensor x = at::randn({256, 128}), weight = at::randn({32, 128});
  at::Tensor A = at::randn({4, 2, 128}), B = at::randn({4, 32, 2});
  A.set_requires_grad(true);
  B.set_requires_grad(true);
  const int64_t kept = graft::testing::bytes_kept_by([&] {
    return expert_linear(x, weight, {}, {A, B, kScale, kDropout}, plan.rows);
  });
  const int64_t rows = 512 * 4;
  CHECK(kept >= rows * (32 + 2));
  CHECK(kept < rows * (32 + 2) + 2048);
}

TEST_CASE("the experts' operations refuse what does not fit", "[moe][experts]") {
  const Case c(at::kDouble);
  const Tensors& in = c.by_token;
  CHECK(contains(error_of([&] {
                   expert_linear(in[0].slice(0, 1), c.weight, {}, c.term(in, {}), c.plan.rows);
                 }),
                 "[experts] the input must be [6, in]"));
  CHECK(contains(error_of([&] {
                   expert_linear(in[0], c.weight, {}, {in[1].slice(0, 1), in[2]}, c.plan.rows);
                 }),
                 "A must be [4, r, in] and B [4, out, r]"));
  CHECK(contains(error_of([&] {
                   expert_linear(in[0], c.weight, {}, {in[1], in[2].slice(2, 1)}, c.plan.rows);
                 }),
                 "A must be [4, r, in] and B [4, out, r]"));
  CHECK(contains(error_of([&] {
                   expert_linear(in[0], c.weight, {},
                                 {in[1].to(at::kBFloat16), in[2].to(at::kBFloat16)}, c.plan.rows);
                 }),
                 "A and B must be float32 or float64 both; got "));
  const at::Tensor trained = c.weight.clone().set_requires_grad(true);
  CHECK(contains(error_of([&] { expert_linear(in[0], trained, {}, c.term(in, {}), c.plan.rows); }),
                 "the base must be frozen"));
  const Tensors leaves = graft::testing::leaves_of(in);
  CHECK(contains(
      graft::testing::double_backward_error(
          expert_linear(leaves[0], c.weight, {}, c.term(leaves, {}), c.plan.rows), leaves[0]),
      "a second derivative is not supported"));
}
