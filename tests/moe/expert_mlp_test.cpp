// A block's experts combined before the down projection, held to the formula row by row.
#include <ATen/ATen.h>
#include <graft/moe/dispatch.h>
#include <graft/ops/expert_mlp.h>

#include "tests/ops/gradients.h"
#include "tests/support/live_bytes.h"

namespace {

using namespace graft::moe;
using namespace graft::ops;
using namespace graft::testing;

constexpr double kScale = 1.7;
constexpr int64_t kSlots = 2, kExperts = 4;

// Expert 3 has no token; every seventh token has no expert, another one only.
Routing routing_of(int64_t tokens) {
  Routing routing;
  routing.experts = at::empty({tokens, kSlots}, at::kLong);
  for (int64_t t = 0; t < tokens; ++t) {
    routing.experts[t][0] = t % 7 == 2 ? -1 : (t * t) % 3;
    routing.experts[t][1] = t % 7 == 2 || t % 7 == 5 ? -1 : (t * t + 1) % 3;
  }
  routing.logits = at::zeros({tokens, kExperts}, at::kDouble);
  return routing;
}

// The differentiable inputs, in this order: x, weights of the pairs, A and B of gate, up and down.
struct Case {
  Case(at::ScalarType type, int64_t tokens, int64_t hidden, int64_t f, int64_t rank, double p = 0)
      : plan(dispatch(routing_of(tokens))) {
    at::manual_seed(7);
    const auto random = [&](at::IntArrayRef shape) {
      return (at::randn(shape, at::kDouble) * (shape.size() == 3 ? 0.4 : 1.0)).to(type);
    };
    in = {random({tokens, hidden}), random({tokens, kSlots})};
    for (int layer = 0; layer < 3; ++layer) {
      const int64_t from = layer == 2 ? f : hidden, to = layer == 2 ? hidden : f;
      weights.push_back((at::randn({to, from}, at::kDouble) / std::sqrt(from)).to(type));
      biases.push_back(random({to}));
      in.push_back(random({kExperts, rank, from}));
      in.push_back(random({kExperts, to, rank}));
      drops.push_back(p == 0 ? Dropout{} : Dropout{p, {5, static_cast<uint32_t>(layer), 7}});
    }
  }
  ExpertLayer layer(int which, const Tensors& t) const {
    return {
        weights[which], biases[which], {t[2 + 2 * which], t[3 + 2 * which], kScale, drops[which]}};
  }
  ExpertMlp block(const Tensors& t) const { return {layer(0, t), layer(1, t), layer(2, t)}; }
  at::Tensor run(const Tensors& t, bool sum_to_one = false) const {
    return expert_mlp(t[0], plan.row_weights(t[1]), block(t), plan.rows, sum_to_one);
  }
  // One layer on rows, as the formula says.
  at::Tensor plain_layer(int which, const at::Tensor& x, const Tensors& t) const {
    const ExpertLayer l = layer(which, t);
    const ExpertRows& rows = plan.rows;
    const at::Tensor by_pair =
        at::zeros({rows.tokens() * kSlots, x.size(1)}, x.options()).index_copy(0, rows.pair, x);
    const at::Tensor dropped = dropout(by_pair, drops[which]).index_select(0, rows.pair);
    std::vector<at::Tensor> terms;
    for (int64_t e = 0; e <= kExperts; ++e) {
      const int64_t first = e < kExperts ? rows.offsets[e].item<int64_t>() : rows.routed(),
                    end = e < kExperts ? rows.offsets[e + 1].item<int64_t>() : rows.rows();
      const at::Tensor part = dropped.slice(0, first, end);
      terms.push_back(e < kExperts ? kScale * part.mm(l.term.A[e].t()).mm(l.term.B[e].t())
                                   : at::zeros({end - first, l.weight.size(0)}, x.options()));
    }
    return x.mm(l.weight.t()) + l.bias + at::cat(terms);
  }
  at::Tensor plain(const Tensors& t) const {
    const at::Tensor x = t[0].index_select(0, plan.rows.token);
    const at::Tensor z = at::silu(plain_layer(0, x, t)) * plain_layer(1, x, t);
    const at::Tensor y = plain_layer(2, z, t) * plan.row_weights(t[1]).unsqueeze(1);
    return at::zeros({plan.rows.tokens(), y.size(1)}, y.options()).index_add(0, plan.rows.token, y);
  }
  DispatchPlan plan;
  Tensors weights, biases, in;
  std::vector<Dropout> drops;
};

}  // namespace

TEST_CASE("expert_mlp equals the formula row by row, value and every gradient", "[moe][experts]") {
  // One tile and several with a part of one, groups of four rows and what is left, ranks that fill
  // the kernels' steps or not.
  for (const int64_t f : {5, 128, 300})
    for (const int64_t rank : {1, 3, 4, 11})
      for (const double p : {0.0, 0.4}) {
        INFO("f " << f << ", rank " << rank << ", p " << p);
        const Case c(at::kDouble, 29, 12, f, rank, p);
        check_against([&](const Tensors& t) { return c.run(t); },
                      [&](const Tensors& t) { return c.plain(t); }, c.in, 1e-11);
      }
  // Tokens of several stretches, the last one short, and several tiles.
  const Case tall(at::kDouble, 300, 12, 530, 3, 0.4);
  check_against([&](const Tensors& t) { return tall.run(t); },
                [&](const Tensors& t) { return tall.plain(t); }, tall.in, 1e-11);
  // More columns of x than a tile has.
  const Case wide(at::kDouble, 13, 150, 40, 3, 0.4);
  check_against([&](const Tensors& t) { return wide.run(t); },
                [&](const Tensors& t) { return wide.plain(t); }, wide.in, 1e-11);
  for (const double p : {0.0, 0.4}) {
    const Case c(at::kFloat, 29, 12, 300, 8, p);
    check_against([&](const Tensors& t) { return c.run(t); },
                  [&](const Tensors& t) { return c.plain(t); }, c.in, 2e-3);
  }
}

TEST_CASE("expert_mlp has the gradients that central differences give", "[moe][experts]") {
  for (const double p : {0.0, 0.4}) {
    const Case c(at::kDouble, 8, 3, 4, 2, p);
    check_differences([&](const Tensors& t) { return c.run(t); }, c.in);
  }
}

TEST_CASE("T10 with weights that sum to 1 the block's last bias is added as it is",
          "[moe][experts]") {
  const Case c(at::kDouble, 12, 6, 10, 2);
  Tensors in = c.in;
  in[1] = at::softmax(in[1].masked_fill(routing_of(12).experts < 0, -1e9), -1);
  CHECK(largest_difference(c.run(in, true), c.run(in, false)) < 1e-13);
  // The bias then tells the weights nothing.
  const auto weights_gradient = [&](const Case& of) {
    return graft::testing::gradients([&](const Tensors& t) { return of.run(t, true); }, in)[1];
  };
  Case without = c;
  without.biases[2] = at::Tensor();
  CHECK(at::equal(weights_gradient(c), weights_gradient(without)));
}

TEST_CASE("T6 expert_mlp: an expert without rows has zero gradients, no tokens have no output",
          "[moe][experts]") {
  const Case c(at::kDouble, 12, 6, 10, 2, 0.3);
  const Tensors found = graft::testing::gradients([&](const Tensors& t) { return c.run(t); }, c.in);
  for (size_t i = 2; i < found.size(); ++i) {
    CHECK(found[i][3].abs().max().item<double>() == 0.0);
    CHECK(found[i][0].abs().max().item<double>() > 0.0);
  }
  const Case none(at::kDouble, 0, 6, 10, 2, 0.3);
  CHECK(none.run(none.in).sizes() == at::IntArrayRef({0, 6}));
  const Tensors zero =
      graft::testing::gradients([&](const Tensors& t) { return none.run(t); }, none.in);
  for (size_t i = 2; i < zero.size(); ++i) CHECK(zero[i].abs().max().item<double>() == 0.0);
}

TEST_CASE("expert_mlp gives the same bits whatever the number of threads", "[moe][experts]") {
  for (const double p : {0.0, 0.4}) {
    const Case c(at::kFloat, 150, 64, 700, 8, p);
    graft::testing::check_threads([&] {
      const Tensors leaves = graft::testing::leaves_of(c.in);
      const at::Tensor y = c.run(leaves);
      y.backward(graft::testing::seed_like(y));
      Tensors result = {y.detach()};
      for (const at::Tensor& leaf : leaves) result.push_back(leaf.grad());
      return result;
    });
  }
}

TEST_CASE(
    "expert_mlp keeps two products of the tokens, and of the rows no more than their narrow S",
    "[moe][experts]") {
  const int64_t tokens = 200, f = 256, rank = 2;
  const Case c(at::kFloat, tokens, 32, f, rank, 0.4);
  const Tensors leaves = graft::testing::leaves_of(c.in);
  const at::Tensor w = c.plan.row_weights(leaves[1]);
  const int64_t kept = graft::testing::bytes_kept_by(
      [&] { return expert_mlp(leaves[0], w, c.block(leaves), c.plan.rows, false); });
  const int64_t rows = c.plan.rows.rows();
  const int64_t expected = 4 * (2 * tokens * f + 3 * rows * rank + tokens * 32);
  CHECK(kept >= expected);
  CHECK(kept < expected + 4096);
}

TEST_CASE("expert_mlp on a bfloat16 base keeps its type and sums in float32", "[moe][experts]") {
  const Case c(at::kFloat, 40, 16, 200, 4, 0.3);
  Case low = c;
  for (Tensors* list : {&low.weights, &low.biases})
    for (at::Tensor& t : *list) t = t.to(at::kBFloat16);
  low.in[0] = low.in[0].to(at::kBFloat16);
  Case rounded = low;  // the same numbers in float32
  for (Tensors* list : {&rounded.weights, &rounded.biases})
    for (at::Tensor& t : *list) t = t.to(at::kFloat);
  rounded.in[0] = rounded.in[0].to(at::kFloat);
  const at::Tensor y = low.run(low.in), expected = rounded.run(rounded.in);
  CHECK(y.scalar_type() == at::kBFloat16);
  CHECK(largest_difference(y, expected) < 0.03 * expected.abs().max().item<double>());
  const Tensors found =
                    graft::testing::gradients([&](const Tensors&t) { return low.run(t); }, low.in),
                wanted = graft::testing::gradients([&](const Tensors&t) { return rounded.run(t); },
                                                   rounded.in);
  for (size_t i = 0; i < found.size(); ++i) {
    INFO("input " << i);
    CHECK(found[i].scalar_type() == low.in[i].scalar_type());
    CHECK(largest_difference(found[i], wanted[i]) < 0.03 * wanted[i].abs().max().item<double>());
  }
}

TEST_CASE("expert_mlp refuses what does not fit", "[moe][experts]") {
  const Case c(at::kDouble, 12, 6, 10, 2);
  const auto refusal = [&](const std::function<void(Case&)>& change) {
    Case changed = c;
    change(changed);
    return error_of([&] { changed.run(changed.in); });
  };
  CHECK(contains(refusal([](Case& x) { x.in[0] = x.in[0].slice(1, 1); }),
                 "[experts] the input must be [12, 6]; got [12, 5]"));
  CHECK(contains(refusal([](Case& x) { x.in[0] = x.in[0].slice(0, 1); }),
                 "[experts] the input must be [12, 6]; got [11, 6]"));
  CHECK(contains(refusal([](Case& x) { x.weights[1] = x.weights[1].slice(0, 1); }),
                 "gate and up must be [f, hidden] and down [hidden, f]"));
  CHECK(contains(refusal([](Case& x) { x.in[4] = x.in[4].slice(0, 1); }),
                 "A must be [4, r, in] and B [4, out, r]"));
  CHECK(contains(refusal([](Case& x) {
                   x.in[6] = x.in[6].to(at::kFloat);
                   x.in[7] = x.in[7].to(at::kFloat);
                 }),
                 "the factors of all layers must have one dtype; got Double and"));
  CHECK(contains(refusal([](Case& x) { x.in[1] = x.in[1].to(at::kFloat); }),
                 "weights must be [21] of A's dtype"));
  CHECK(contains(
      refusal([](Case& x) { x.weights[2] = x.weights[2].clone().set_requires_grad(true); }),
      "the base must be frozen"));
  const Tensors leaves = graft::testing::leaves_of(c.in);
  CHECK(contains(graft::testing::double_backward_error(c.run(leaves), leaves[0]),
                 "a second derivative is not supported"));
}
