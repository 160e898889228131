// The gates of mixtures: lora_linear with one number of g for each token and expert.
#include <ATen/ATen.h>
#include <graft/ops/lora_linear.h>

#include "tests/ops/gradients.h"
#include "tests/support/live_bytes.h"

namespace {

using graft::ops::Dropout;
using graft::ops::lora_linear;
using graft::testing::check_against;
using graft::testing::check_differences;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;
using graft::testing::LiveBytes;
using graft::testing::Tensors;
using Ranks = std::vector<int64_t>;

constexpr double kScale = 1.7;
const Dropout kDropout{0.4, {5, 6, 7}};

int64_t sum(const Ranks& ranks) {
  int64_t total = 0;
  for (const int64_t rank : ranks) total += rank;
  return total;
}

// x [leading..., in], weight [out, in], bias [out], A [sum r, in], B [out, sum r], gates
// [leading..., E] or, without a gate of each token's own, [E]
Tensors inputs(std::vector<int64_t> leading, const Ranks& ranks, bool by_token,
               at::ScalarType type = at::kDouble) {
  at::manual_seed(17);
  const int64_t in = 6, out = 5, r = sum(ranks), E = static_cast<int64_t>(ranks.size());
  std::vector<int64_t> gates = leading;
  if (!by_token) gates.clear();
  leading.push_back(in);
  gates.push_back(E);
  return {at::randn(leading, type), at::randn({out, in}, type), at::randn({out}, type),
          at::randn({r, in}, type), at::randn({out, r}, type),  at::randn(gates, type)};
}

at::Tensor fused(const Tensors& in, const Ranks& ranks, const Dropout& dropout = {}) {
  return lora_linear(in[0], in[1], in[2], {in[3], in[4], {}, kScale, dropout, in[5], {}, ranks});
}

// W x + b + sum_e g_e s B_e A_e drop(x), expert by expert.
at::Tensor literal(const Tensors& in, const Ranks& ranks, const Dropout& dropout = {}) {
  at::Tensor y = at::linear(in[0], in[1], in[2]);
  const at::Tensor x = graft::ops::dropout(in[0], dropout);
  int64_t first = 0;
  for (size_t e = 0; e < ranks.size(); first += ranks[e++]) {
    const at::Tensor A = in[3].narrow(0, first, ranks[e]), B = in[4].narrow(1, first, ranks[e]);
    y = y + kScale * in[5].narrow(-1, static_cast<int64_t>(e), 1) * at::linear(at::linear(x, A), B);
  }
  return y;
}

const std::vector<Ranks> kRanks = {{2, 2, 2}, {1, 3, 2}, {4}, {1, 1, 1, 1, 1}};

}  // namespace

TEST_CASE("T1, T2 experts side by side equal the sum over experts, value and every gradient",
          "[ops][lora][moe]") {
  for (const auto& ranks : kRanks) {
    for (const bool by_token : {true, false}) {
      for (const auto& dropout : {Dropout{}, kDropout}) {
        INFO("ranks " << at::IntArrayRef(ranks) << ", by token " << by_token << ", p "
                      << dropout.p);
        const auto f = [&](const Tensors& t) { return fused(t, ranks, dropout); };
        const auto plain = [&](const Tensors& t) { return literal(t, ranks, dropout); };
        check_against(f, plain, inputs({7}, ranks, by_token), 1e-12);
        check_against(f, plain, inputs({2, 3}, ranks, by_token), 1e-12);
        check_against(f, plain, inputs({}, ranks, by_token), 1e-12);
        check_against(f, plain, inputs({7}, ranks, by_token, at::kFloat), 3e-5);
      }
    }
  }
}

TEST_CASE("gates of experts have the gradients that central differences give", "[ops][lora][moe]") {
  for (const bool by_token : {true, false}) {
    const Ranks ranks = {1, 3, 2};
    const Tensors in = inputs({2, 2}, ranks, by_token);
    check_differences([&](const Tensors& t) { return fused(t, ranks); }, in);
    check_differences([&](const Tensors& t) { return fused(t, ranks, kDropout); }, in);
  }
}

TEST_CASE("each hidden unit may have a gate of each token's own", "[ops][lora][moe]") {
  const Ranks ones(5, 1);
  const Tensors in = inputs({4}, ones, true);
  const auto f = [&](const Tensors& t) { return fused(t, {}); };
  check_against(
      f, [&](const Tensors& t) { return literal(t, ones); }, in, 1e-12);
  CHECK(at::equal(f(in), fused(in, ones)));
}

TEST_CASE("a gate of one expert alone is that expert's plain LoRA, bit for bit",
          "[ops][lora][moe]") {
  const Ranks ranks = {2, 3, 1};
  Tensors in = inputs({6}, ranks, true);
  int64_t first = 0;
  for (int64_t e = 0; e < 3; first += ranks[e++]) {
    in[5].zero_();
    in[5].select(1, e).fill_(1);
    const at::Tensor A = in[3].narrow(0, first, ranks[e]), B = in[4].narrow(1, first, ranks[e]);
    CHECK(largest_difference(fused(in, ranks),
                             lora_linear(in[0], in[1], in[2], {A, B, {}, kScale})) < 1e-13);
  }
  // One expert with g = 1.
  const Tensors one = inputs({6}, {4}, true);
  one[5].fill_(1);
  CHECK(at::equal(fused(one, {4}),
                  lora_linear(one[0], one[1], one[2], {one[3], one[4], {}, kScale})));
}

TEST_CASE("no expert at work leaves the base's bits", "[ops][lora][moe]") {
  const Ranks ranks = {2, 2};
  Tensors in = inputs({6}, ranks, true);
  in[5].zero_();
  Tensors off = in;
  off[4] = at::zeros_like(in[4]);
  CHECK(at::equal(fused(in, ranks), fused(off, ranks)));
}

TEST_CASE("under a bf16 base the experts and their gates run in fp32", "[ops][lora][moe]") {
  const Ranks ranks = {1, 3, 2};
  Tensors in = inputs({8}, ranks, true, at::kFloat);
  for (const size_t base : {0, 1, 2}) in[base] = in[base].to(at::kBFloat16);
  in[0].set_requires_grad(true);
  for (const size_t trained : {3, 4, 5}) in[trained].set_requires_grad(true);
  const at::Tensor y = fused(in, ranks, kDropout);
  CHECK(y.scalar_type() == at::kBFloat16);
  y.backward(at::ones_like(y));
  CHECK(in[0].grad().scalar_type() == at::kBFloat16);
  Tensors wide;
  for (const auto& tensor : in)
    wide.push_back(tensor.detach().to(at::kDouble).set_requires_grad(true));
  const at::Tensor expected = literal(wide, ranks, kDropout);
  expected.sum().backward();
  const double unit = 1.0 / 128;  // two roundings to bf16
  CHECK(largest_difference(y, expected) < unit * expected.abs().max().item<double>());
  for (const size_t trained : {3, 4, 5}) {
    CHECK(in[trained].grad().scalar_type() == at::kFloat);
    CHECK(largest_difference(in[trained].grad(), wide[trained].grad()) <
          1e-4 * wide[trained].grad().abs().max().item<double>());
  }
  CHECK(largest_difference(in[0].grad(), wide[0].grad()) <
        unit * wide[0].grad().abs().max().item<double>());
}

TEST_CASE("frozen experts behind a trained gate keep no x and get no gradient",
          "[ops][lora][moe]") {
  const Ranks ranks = {2, 2};
  Tensors in = inputs({16}, ranks, true, at::kFloat);
  in[5].set_requires_grad(true);
  const auto references = in[0].use_count();
  const at::Tensor y = fused(in, ranks);
  CHECK(in[0].use_count() == references);
  y.sum().backward();
  CHECK(in[5].grad().defined());
  for (const size_t frozen : {0, 1, 2, 3, 4}) CHECK_FALSE(in[frozen].grad().defined());
}

TEST_CASE("a mixture keeps x, the gates and the rank-wide product alone for backward",
          "[ops][lora][moe]") {
  const Ranks ranks = {4, 4, 4};
  Tensors in = inputs({64}, ranks, true, at::kFloat);
  for (const size_t trained : {0, 3, 4, 5}) in[trained].set_requires_grad(true);
  fused(in, ranks, kDropout);  // whatever is made once
  const auto bytes = std::make_shared<LiveBytes>();
  at::Tensor y;
  {
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, bytes);
    y = fused(in, ranks, kDropout);
  }
  // x and the gates are references to the caller's; what is new and alive is the output and H.
  CHECK(bytes->count == int64_t{sizeof(float)} * 64 * (5 + 12));
}

TEST_CASE("a mixture takes no tokens at all", "[ops][lora][moe]") {
  const Ranks ranks = {1, 2};
  Tensors in = inputs({0}, ranks, true);
  for (auto& tensor : in) tensor.set_requires_grad(true);
  const at::Tensor y = fused(in, ranks, kDropout);
  CHECK(y.sizes() == at::IntArrayRef({0, 5}));
  y.sum().backward();
  CHECK(in[5].grad().sizes() == at::IntArrayRef({0, 2}));
}

TEST_CASE("gates and ranks that do not fit are refused", "[ops][lora][moe]") {
  const Tensors in = inputs({4}, {1, 2}, true);
  const auto with = [&](const at::Tensor& gate, const Ranks& ranks) {
    Tensors changed = in;
    changed[5] = gate;
    return error_of([&] { fused(changed, ranks); });
  };
  CHECK(contains(with(in[5], {1, 3}), "[lora] the ranks of the groups must sum to A's rows"));
  CHECK(contains(with(in[5], {3, 0}), "the rank of every group must be at least 1; got 0"));
  CHECK(contains(with({}, {1, 2}), "without a gate"));
  CHECK(contains(with(in[5], {}), "gate must hold one number a hidden unit: [3]"));
  CHECK(contains(with(in[5].narrow(0, 0, 3), {1, 2}), "each of 4 tokens; got [3, 2]"));
  CHECK(contains(with(in[5].to(at::kFloat), {1, 2}), "gate must have A's dtype"));
}
