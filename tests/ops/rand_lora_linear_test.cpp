#include <ATen/ATen.h>
#include <graft/ops/rand_lora_linear.h>

#include "tests/ops/gradients.h"

namespace {

using graft::ops::Dropout;
using graft::ops::rand_lora_delta;
using graft::ops::rand_lora_dense;
using graft::ops::rand_lora_linear;
using graft::ops::RandLoraPairing;
using graft::ops::RandLoraTerm;
using graft::testing::check_against;
using graft::testing::check_differences;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;
using graft::testing::Tensors;

at::Tensor random(at::IntArrayRef shape) {
  return at::randn(shape, at::kDouble);
}

// Two layers, one with more outputs and one with more inputs; r = 3 does not divide p = 5.
struct Case {
  int64_t out, in, rank;
};
const std::vector<Case> kCases = {{7, 5, 3}, {5, 7, 3}, {4, 4, 1}, {6, 3, 5}};

RandLoraTerm some_term(const Case& c, RandLoraPairing pairing) {
  at::manual_seed(1);
  const int64_t p = std::min(c.out, c.in), q = std::max(c.out, c.in);
  const int64_t bases = (p + c.rank - 1) / c.rank;
  RandLoraTerm term;
  term.A = random({c.rank, p + 2}).narrow(1, 0, p);
  term.B = random({q + 1, bases * c.rank + 2}).narrow(0, 0, q).narrow(1, 0, bases * c.rank);
  term.lambda = random({c.rank, bases});
  term.gamma = random({bases, p});
  term.scale = 0.7;
  term.pairing = pairing;
  return term;
}

// s dW element by element: the row (a, b) of the small basis meets the column that the pairing
// names.
at::Tensor literal_delta(const Case& c, const RandLoraTerm& term) {
  const int64_t rank = term.lambda.size(0), bases = term.lambda.size(1);
  const int64_t p = term.A.size(1), q = term.B.size(0);
  const auto A = term.A.accessor<double, 2>(), B = term.B.accessor<double, 2>(),
             lambda = term.lambda.accessor<double, 2>(), gamma = term.gamma.accessor<double, 2>();
  const at::Tensor D = at::zeros({q, p}, at::kDouble);
  for (int64_t i = 0; i < q; ++i)
    for (int64_t j = 0; j < p; ++j)
      for (int64_t a = 0; a < rank; ++a)
        for (int64_t b = 0; b < bases; ++b) {
          const int64_t column =
              term.pairing == RandLoraPairing::peft ? a * bases + b : b * rank + a;
          D[i][j] += term.scale * B[i][column] * lambda[a][b] * A[a][j] * gamma[b][j];
        }
  return c.out >= c.in ? D : D.t();
}

// The same by tensors, for autograd.
at::Tensor plain(const Tensors& in, const RandLoraTerm& term) {
  const at::Tensor &x = in[0], &weight = in[1], &bias = in[2], &lambda = in[3], &gamma = in[4];
  at::Tensor rows = lambda.unsqueeze(2) * term.A.unsqueeze(1) * gamma.unsqueeze(0);  // [r, N, p]
  if (term.pairing == RandLoraPairing::paper) rows = rows.transpose(0, 1);
  const at::Tensor D = term.B.mm(rows.reshape({-1, term.A.size(1)})) * term.scale;
  const at::Tensor dropped = graft::ops::dropout(x, term.dropout);
  return at::linear(x, weight, bias) + dropped.matmul(weight.size(0) >= weight.size(1) ? D.t() : D);
}

at::Tensor ours(const Tensors& in, RandLoraTerm term) {
  term.lambda = in[3];
  term.gamma = in[4];
  return rand_lora_linear(in[0], in[1], in[2], term);
}

}  // namespace

TEST_CASE("RandLoRA's update is the sum of its bases in either pairing", "[ops][randlora]") {
  for (const auto& c : kCases) {
    for (const auto pairing : {RandLoraPairing::peft, RandLoraPairing::paper}) {
      INFO(c.out << " by " << c.in << ", rank " << c.rank);
      const RandLoraTerm term = some_term(c, pairing);
      CHECK(largest_difference(rand_lora_delta(c.out, c.in, term), literal_delta(c, term)) < 1e-13);
    }
  }
  const Case c = kCases[0];
  CHECK(largest_difference(rand_lora_delta(c.out, c.in, some_term(c, RandLoraPairing::peft)),
                           rand_lora_delta(c.out, c.in, some_term(c, RandLoraPairing::paper))) >
        0.1);
}

TEST_CASE("the paper's pairing is the sum of B_b diag(lambda_b) A diag(gamma_b)",
          "[ops][randlora]") {
  const Case c = kCases[0];
  const RandLoraTerm term = some_term(c, RandLoraPairing::paper);
  at::Tensor sum = at::zeros({c.out, c.in}, at::kDouble);
  for (int64_t b = 0; b < term.lambda.size(1); ++b)
    sum += term.B.narrow(1, b * c.rank, c.rank)
               .mm(at::diag(term.lambda.select(1, b)))
               .mm(term.A)
               .mm(at::diag(term.gamma[b]));
  CHECK(largest_difference(rand_lora_delta(c.out, c.in, term), sum * term.scale) < 1e-13);
}

TEST_CASE("RandLoRA's output and gradients are those of the plain formula on either route",
          "[ops][randlora]") {
  for (const auto& c : kCases) {
    for (const auto pairing : {RandLoraPairing::peft, RandLoraPairing::paper}) {
      for (const int64_t tokens : {0, 1, 2, 60}) {  // 1 takes the thin route, 60 the dense one
        for (const double p : {0.0, 0.4}) {
          RandLoraTerm term = some_term(c, pairing);
          term.dropout = {p, {3, 4, 5}};
          const Tensors inputs = {random({tokens, c.in}), random({c.out, c.in}), random({c.out}),
                                  term.lambda, term.gamma};
          INFO(c.out << " by " << c.in << ", rank " << c.rank << ", " << tokens << " tokens");
          check_against([&](const Tensors& in) { return ours(in, term); },
                        [&](const Tensors& in) { return plain(in, term); }, inputs, 1e-11);
        }
      }
    }
  }
}

TEST_CASE("RandLoRA's gradients are those of central differences", "[ops][randlora]") {
  for (const auto& c : kCases) {
    for (const int64_t tokens : {1, 9}) {
      RandLoraTerm term = some_term(c, RandLoraPairing::peft);
      term.dropout = {tokens == 1 ? 0.3 : 0.0, {3, 4, 5}};
      check_differences(
          [&](const Tensors& in) { return ours(in, term); },
          {random({tokens, c.in}), random({c.out, c.in}), random({c.out}), term.lambda, term.gamma},
          1e-6);
    }
  }
}

TEST_CASE("RandLoRA counts the multiplications of its routes", "[ops][randlora]") {
  // One product with W + D: 64 * 64 * 64 against T * 64 * 128.
  CHECK_FALSE(rand_lora_dense(32, 64, 64, 64, false));
  CHECK(rand_lora_dense(33, 64, 64, 64, false));
  // A product beside the base's: 64 * 64 * (64 + T) against T * 64 * 128.
  CHECK_FALSE(rand_lora_dense(64, 64, 64, 64, true));
  CHECK(rand_lora_dense(65, 64, 64, 64, true));
  CHECK(rand_lora_dense(int64_t{1} << 40, int64_t{1} << 20, int64_t{1} << 20, 8, false));
}

TEST_CASE("RandLoRA without an update gives the base's bits", "[ops][randlora]") {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const int64_t tokens : {1, 200}) {
      RandLoraTerm term = some_term({40, 20, 4}, RandLoraPairing::peft);
      term.A = term.A.to(at::kFloat);
      term.B = term.B.to(at::kFloat);
      term.lambda = at::zeros({4, 5});
      term.gamma = at::ones({5, 20});
      const at::Tensor x = at::randn({tokens, 20}, type), weight = at::randn({40, 20}, type);
      RandLoraTerm other = term;
      other.lambda = at::ones({4, 5});
      CHECK(at::equal(rand_lora_linear(x, weight, {}, term), at::linear(x, weight)));
      CHECK_FALSE(at::equal(rand_lora_linear(x, weight, {}, other), at::linear(x, weight)));
    }
  }
}

TEST_CASE("RandLoRA on bf16 adds its update in fp32 and rounds once", "[ops][randlora]") {
  for (const int64_t tokens : {1, 50}) {
    RandLoraTerm term = some_term(kCases[0], RandLoraPairing::peft);
    const at::Tensor x = at::randn({tokens, 5}, at::kBFloat16),
                     weight = at::randn({7, 5}, at::kBFloat16);
    const at::Tensor delta = rand_lora_delta(7, 5, term).to(at::kFloat);
    for (at::Tensor* t : {&term.A, &term.B, &term.lambda, &term.gamma}) *t = t->to(at::kFloat);
    const at::Tensor expected =
        at::linear(x, weight).to(at::kFloat) + at::linear(x.to(at::kFloat), delta);
    const at::Tensor y = rand_lora_linear(x, weight, {}, term);
    CHECK(y.scalar_type() == at::kBFloat16);
    CHECK(largest_difference(y, expected) < 0.008 * expected.abs().max().item<double>());
  }
}

TEST_CASE("a small update survives beside large bf16 inputs and weights", "[ops][randlora]") {
  RandLoraTerm term = some_term(kCases[0], RandLoraPairing::peft);
  for (at::Tensor* t : {&term.A, &term.B, &term.lambda, &term.gamma}) *t = t->to(at::kFloat);
  const at::Tensor delta = rand_lora_delta(7, 5, term);
  for (const auto type : {at::kBFloat16, at::kFloat}) {
    for (const int64_t tokens : {1, 50}) {
      // The base's share cancels: 2048 - 2048. Rounded to bf16, 2048 + delta would be 2048.
      const at::Tensor x =
          at::tensor({1.0, -1.0, 0.0, 0.0, 0.0}).to(at::kBFloat16).repeat({tokens, 1});
      const at::Tensor y = rand_lora_linear(x, at::full({7, 5}, 2048.0, type), {}, term);
      const at::Tensor expected = (delta.select(1, 0) - delta.select(1, 1)).expand({tokens, 7});
      CHECK(largest_difference(y, expected) < 0.01 * expected.abs().max().item<double>());
    }
  }
}

TEST_CASE("RandLoRA's results do not depend on the number of threads", "[ops][randlora]") {
  const RandLoraTerm term = some_term({40, 60, 7}, RandLoraPairing::peft);
  const Tensors inputs = {random({33, 60}), random({40, 60}), random({40}), term.lambda,
                          term.gamma};
  graft::testing::check_threads([&] {
    Tensors results =
        graft::testing::gradients([&](const Tensors& in) { return ours(in, term); }, inputs);
    results.push_back(ours(inputs, term));
    return results;
  });
}

TEST_CASE("RandLoRA refuses what does not fit together", "[ops][randlora]") {
  const RandLoraTerm term = some_term(kCases[0], RandLoraPairing::peft);
  const at::Tensor x = random({2, 5}), weight = random({7, 5});
  const auto refusal = [&](auto change) {
    RandLoraTerm changed = term;
    change(changed);
    return error_of([&] { rand_lora_linear(x, weight, {}, changed); });
  };
  CHECK(contains(refusal([](auto& t) { t.gamma = t.gamma.t(); }),
                 "[randlora] A must be [r, p], B [q, N r], lambda [r, N] and gamma [N, p] for p=5, "
                 "q=7; got [3, 5], [7, 6], [3, 2] and [5, 2]"));
  CHECK(contains(refusal([](auto& t) { t.B = t.B.narrow(0, 0, 6); }), "A must be [r, p]"));
  CHECK(contains(refusal([](auto& t) { t.B = t.B.to(at::kFloat); }), "must have one type"));
  CHECK(contains(refusal([](auto& t) { t.dropout.p = 1.0; }), "dropout must be in [0, 1)"));
  CHECK(contains(refusal([](auto& t) { t.A = t.A.clone().set_requires_grad(true); }),
                 "the bases must be frozen"));
  CHECK(contains(error_of([&] {
                   rand_lora_linear(random({2, 4}), weight, {}, term);
                 }),
                 "the input's last dimension must match"));
  RandLoraTerm trained = term;
  trained.lambda = term.lambda.clone().set_requires_grad(true);
  CHECK(contains(graft::testing::double_backward_error(rand_lora_linear(x, weight, {}, trained),
                                                       trained.lambda),
                 "second derivative is not supported"));
}
