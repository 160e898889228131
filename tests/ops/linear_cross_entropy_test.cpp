#include <ATen/ATen.h>
#include <graft/ops/linear_cross_entropy.h>

#include <cmath>
#include <limits>

#include "tests/ops/gradients.h"

namespace {

using graft::ops::linear_cross_entropy;
using graft::ops::LinearCrossEntropyOptions;
using graft::ops::LossReduction;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;
using graft::testing::Tensors;

constexpr int64_t kIgnored = -100;

struct Problem {
  at::Tensor hidden, weight, targets, low_hidden, low_weight;
};

// Every third row is ignored, the first one included.
Problem problem(int64_t n, int64_t k, int64_t vocabulary, at::ScalarType type, bool ignore = true) {
  at::manual_seed(14);
  Problem p;
  p.hidden = at::randn({n, k}, type);
  p.weight = at::randn({vocabulary, k}, type);
  p.targets = at::randint(0, vocabulary, {n}, at::kLong);
  if (ignore) p.targets.masked_fill_(at::arange(n).remainder(3) == 0, kIgnored);
  p.low_hidden = at::randn({n, 3}, type);
  p.low_weight = 0.5 * at::randn({vocabulary, 3}, type);
  return p;
}

// The whole matrix of logits and ATen's loss. in: hidden, or hidden and the low-rank part's
// tensors.
at::Tensor plain(const Problem& p, const Tensors& in, double normalizer) {
  at::Tensor logits = in[0].mm(p.weight.t());
  if (in.size() > 1) logits = logits + in[1].mm(in[2].t());
  return at::cross_entropy_loss(logits, p.targets, {}, at::Reduction::Sum, kIgnored) / normalizer;
}

at::Tensor fused(const Problem& p, const Tensors& in, const LinearCrossEntropyOptions& options) {
  if (in.size() == 1) return linear_cross_entropy(in[0], p.weight, p.targets, options);
  return linear_cross_entropy(in[0], p.weight, p.targets, options, {in[1], in[2]});
}

double counted(const Problem& p) {
  return p.targets.ne(kIgnored).sum().item<double>();
}

}  // namespace

TEST_CASE("linear_cross_entropy has the gradients that central differences give",
          "[ops][linear_cross_entropy]") {
  const Problem p = problem(7, 4, 6, at::kDouble);
  graft::testing::check_differences(
      [&](const Tensors& in) { return fused(p, in, {.chunk_rows = 2}); },
      {p.hidden, p.low_hidden, p.low_weight});
}

TEST_CASE("linear_cross_entropy equals the formula for every size of chunk",
          "[ops][linear_cross_entropy]") {
  for (const bool ignore : {true, false}) {
    const Problem p = problem(11, 5, 37, at::kDouble, ignore);
    for (const int64_t chunk : {0, 1, 3, 11, 100}) {
      INFO("chunk " << chunk << ", ignored rows " << ignore);
      const auto f = [&](const Tensors& in) { return fused(p, in, {.chunk_rows = chunk}); };
      const auto formula = [&](const Tensors& in) { return plain(p, in, counted(p)); };
      graft::testing::check_against(f, formula, {p.hidden}, 1e-12);
      graft::testing::check_against(f, formula, {p.hidden, p.low_hidden, p.low_weight}, 1e-12);
    }
  }
}

TEST_CASE("linear_cross_entropy in float32 agrees at the size of a vocabulary",
          "[ops][linear_cross_entropy]") {
  const Problem p = problem(23, 64, 4999, at::kFloat);
  const auto f = [&](const Tensors& in) { return fused(p, in, {.logits_bytes = 4999 * 4 * 7}); };
  const auto formula = [&](const Tensors& in) { return plain(p, in, counted(p)); };
  graft::testing::check_against(f, formula, {p.hidden, p.low_hidden, p.low_weight}, 2e-5);
}

TEST_CASE("linear_cross_entropy sums, averages and divides by a given number",
          "[ops][linear_cross_entropy]") {
  const Problem p = problem(10, 4, 9, at::kDouble);
  const auto loss = [&](const LinearCrossEntropyOptions& options) {
    return fused(p, {p.hidden}, options).item<double>();
  };
  const double sum = plain(p, {p.hidden}, 1.0).item<double>();
  CHECK(std::abs(loss({.reduction = LossReduction::sum}) - sum) < 1e-12);
  CHECK(std::abs(loss({}) - sum / 6) < 1e-12);
  CHECK(std::abs(loss({.normalizer = 50.0}) - sum / 50) < 1e-12);
  CHECK(std::abs(loss({.reduction = LossReduction::sum, .normalizer = 50.0}) - sum / 50) < 1e-12);
}

TEST_CASE("linear_cross_entropy of micro-batches adds up to the batch under one normalizer",
          "[ops][linear_cross_entropy]") {
  const Problem p = problem(12, 4, 9, at::kDouble);
  const Tensors whole =
      graft::testing::gradients([&](const Tensors& in) { return fused(p, in, {}); }, {p.hidden});
  for (const int64_t begin : {0, 4, 8}) {
    Problem part = p;
    part.targets = p.targets.narrow(0, begin, 4);
    const Tensors found = graft::testing::gradients(
        [&](const Tensors& in) { return fused(part, in, {.normalizer = counted(p)}); },
        {p.hidden.narrow(0, begin, 4)});
    CHECK(largest_difference(found[0], whole[0].narrow(0, begin, 4)) < 1e-12);
  }
}

TEST_CASE("linear_cross_entropy scales its gradient by the incoming one",
          "[ops][linear_cross_entropy]") {
  const Problem p = problem(5, 4, 9, at::kDouble);
  const auto f = [&](const Tensors& in) { return fused(p, in, {}); };
  const Tensors once = graft::testing::gradients(f, {p.hidden});
  const Tensors scaled =
      graft::testing::gradients(f, {p.hidden}, at::scalar_tensor(2.5, at::kDouble));
  CHECK(largest_difference(scaled[0], 2.5 * once[0]) < 1e-12);
}

TEST_CASE("linear_cross_entropy leaves ignored rows out: what they hold does not matter",
          "[ops][linear_cross_entropy]") {
  const Problem p = problem(9, 4, 8, at::kDouble);
  Problem poisoned = p;
  poisoned.hidden = p.hidden.clone();
  poisoned.hidden.masked_fill_(p.targets.eq(kIgnored).unsqueeze(1),
                               std::numeric_limits<double>::quiet_NaN());
  const at::Tensor leaf = poisoned.hidden.clone().set_requires_grad(true);
  const at::Tensor loss = fused(poisoned, {leaf}, {});
  CHECK(loss.item<double>() == fused(p, {p.hidden}, {}).item<double>());
  loss.backward();
  const at::Tensor ignored = leaf.grad().index({p.targets.eq(kIgnored)});
  CHECK(at::equal(ignored, at::zeros_like(ignored)));
  CHECK(leaf.grad().abs().sum().item<double>() > 0.1);
}

TEST_CASE("linear_cross_entropy obeys another ignore_index", "[ops][linear_cross_entropy]") {
  const Problem p = problem(6, 4, 5, at::kDouble, /*ignore=*/false);
  const at::Tensor targets = at::tensor({0, 1, 0, 2, 4, 0}, at::kLong);
  const at::Tensor loss = linear_cross_entropy(p.hidden, p.weight, targets, {.ignore_index = 0});
  const at::Tensor expected =
      at::cross_entropy_loss(p.hidden.mm(p.weight.t()), targets, {}, at::Reduction::Mean, 0);
  CHECK(std::abs((loss - expected).item<double>()) < 1e-12);
}

TEST_CASE("linear_cross_entropy with nothing to count is an error for a mean, else zero",
          "[ops][linear_cross_entropy]") {
  Problem p = problem(3, 4, 5, at::kFloat);
  p.targets.fill_(kIgnored);
  CHECK(contains(error_of([&] { fused(p, {p.hidden}, {}); }), "a mean needs a counted target"));
  for (const int64_t n : {int64_t{3}, int64_t{0}}) {
    const at::Tensor leaf = p.hidden.narrow(0, 0, n).clone().set_requires_grad(true);
    const at::Tensor loss =
        linear_cross_entropy(leaf, p.weight, p.targets.narrow(0, 0, n), {.normalizer = 4.0});
    CHECK(loss.item<float>() == 0.0f);
    loss.backward();
    CHECK(at::equal(leaf.grad(), at::zeros({n, 4})));
  }
}

TEST_CASE("linear_cross_entropy is stable for huge logits and reports a NaN",
          "[ops][linear_cross_entropy]") {
  const at::Tensor weight = at::tensor({1000.0f, -1000.0f, 999.0f}).view({3, 1});
  const at::Tensor hidden = at::ones({1, 1}).set_requires_grad(true);
  const auto loss_of = [&](int64_t target) {
    return linear_cross_entropy(hidden, weight, at::full({1}, target, at::kLong));
  };
  CHECK(std::abs(loss_of(0).item<float>() - std::log1p(std::exp(-1.0f))) < 1e-5f);
  const at::Tensor far = loss_of(1);
  CHECK(std::abs(far.item<float>() - 2000.3133f) < 1e-2f);
  far.backward();
  CHECK(hidden.grad().isfinite().all().item<bool>());
  const at::Tensor nan = at::full({1, 1}, std::nanf(""));
  CHECK(std::isnan(linear_cross_entropy(nan, weight, at::zeros({1}, at::kLong)).item<float>()));
}

TEST_CASE("linear_cross_entropy gives the same loss with and without a gradient",
          "[ops][linear_cross_entropy]") {
  const Problem p = problem(13, 8, 301, at::kFloat);
  const at::Tensor leaf = p.hidden.clone().set_requires_grad(true);
  const at::Tensor with = fused(p, {leaf}, {});
  CHECK(with.requires_grad());
  CHECK(with.dim() == 0);
  const at::Tensor without = fused(p, {p.hidden}, {});
  CHECK_FALSE(without.requires_grad());
  CHECK(at::equal(with, without));
  const at::NoGradGuard no_grad;
  CHECK_FALSE(fused(p, {leaf}, {}).requires_grad());
}

TEST_CASE("linear_cross_entropy trains the low-rank part alone", "[ops][linear_cross_entropy]") {
  const Problem p = problem(13, 8, 31, at::kDouble);
  const auto with_frozen_hidden = [&](bool plainly) {
    return graft::testing::gradients(
        [&, plainly](const Tensors& in) {
          const Tensors all = {p.hidden, p.low_hidden, in[0]};
          return plainly ? plain(p, all, counted(p)) : fused(p, all, {.chunk_rows = 4});
        },
        {p.low_weight})[0];
  };
  CHECK(largest_difference(with_frozen_hidden(false), with_frozen_hidden(true)) < 1e-12);
}

TEST_CASE("linear_cross_entropy in bfloat16 and float16 keeps softmax and loss in float32",
          "[ops][linear_cross_entropy]") {
  const auto type = GENERATE(at::kBFloat16, at::kHalf);
  const Problem wide = problem(16, 32, 257, at::kFloat);
  Problem p = wide;
  p.hidden = (0.2 * wide.hidden).to(type);
  p.weight = wide.weight.to(type);
  const Tensors in = {p.hidden, p.low_hidden.to(type), p.low_weight};
  const at::Tensor loss = fused(p, in, {});
  CHECK(loss.scalar_type() == at::kFloat);
  Problem exact = p;
  exact.weight = p.weight.to(at::kDouble);
  const Tensors exact_in = {in[0].to(at::kDouble), in[1].to(at::kDouble), in[2].to(at::kDouble)};
  CHECK(std::abs(loss.item<double>() - plain(exact, exact_in, counted(p)).item<double>()) < 0.02);
  const Tensors found =
      graft::testing::gradients([&](const Tensors& t) { return fused(p, t, {}); }, in);
  const Tensors wanted = graft::testing::gradients(
      [&](const Tensors& t) { return plain(exact, t, counted(p)); }, exact_in);
  for (size_t i = 0; i < found.size(); ++i) {
    INFO("gradient " << i);
    CHECK(found[i].scalar_type() == in[i].scalar_type());
    CHECK(largest_difference(found[i], wanted[i]) < 0.02 * wanted[i].abs().max().item<double>());
  }
}

TEST_CASE("a loss scale in the normalizer keeps float16 gradients that a later factor has lost",
          "[ops][linear_cross_entropy]") {
  const Problem wide = problem(4, 32, 257, at::kFloat);
  Problem p = wide;
  p.hidden = (0.2 * wide.hidden).to(at::kHalf);
  p.weight = (1e-3 * wide.weight).to(at::kHalf);
  const auto gradient = [&](double normalizer, double factor) {
    return graft::testing::gradients(
               [&](const Tensors& in) { return fused(p, in, {.normalizer = normalizer}) * factor; },
               {p.hidden})[0]
        .to(at::kDouble);
  };
  Problem exact = p;
  exact.weight = p.weight.to(at::kDouble);
  const at::Tensor wanted =
      graft::testing::gradients([&](const Tensors& in) { return plain(exact, in, 1e6) * 32768.0; },
                                {p.hidden.to(at::kDouble)})[0];
  const double size = wanted.abs().max().item<double>();
  CHECK(largest_difference(gradient(1e6 / 32768.0, 1.0), wanted) < 0.01 * size);
  CHECK(largest_difference(gradient(1e6, 32768.0), wanted) > 0.5 * size);
}

TEST_CASE("linear_cross_entropy reads views", "[ops][linear_cross_entropy]") {
  const Problem p = problem(9, 4, 8, at::kDouble);
  const at::Tensor expected = fused(p, {p.hidden}, {});
  Problem views = p;
  views.weight = p.weight.t().contiguous().t();
  views.targets = at::stack({p.targets, p.targets}, 1).select(1, 0);
  const at::Tensor hidden = p.hidden.t().contiguous().t();
  CHECK(largest_difference(fused(views, {hidden}, {}), expected) < 1e-12);
  const at::Tensor leaf = hidden.detach().set_requires_grad(true);
  fused(views, {leaf}, {}).backward();
  const Tensors wanted =
      graft::testing::gradients([&](const Tensors& in) { return fused(p, in, {}); }, {p.hidden});
  CHECK(largest_difference(leaf.grad(), wanted[0]) < 1e-12);
}

TEST_CASE("linear_cross_entropy gives the same bits for every number of threads",
          "[ops][linear_cross_entropy]") {
  // Logits are small whole numbers and each column of the weight has one entry, so that the matrix
  // products are exact and leave the fixed order of the rest to be seen.
  Problem p = problem(53, 16, 1001, at::kFloat);
  p.hidden = at::randint(-3, 4, {53, 16}, at::kFloat);
  p.weight = at::zeros({1001, 16});
  for (int64_t i = 0; i < 16; ++i) p.weight[60 * i][i] = 2.0f;
  p.low_hidden = at::randint(-2, 3, {53, 3}, at::kFloat);
  p.low_weight = at::randint(-2, 3, {1001, 3}, at::kFloat);
  const auto f = [&](const Tensors& in) {
    return fused(p, {in[0], p.low_hidden, p.low_weight}, {.chunk_rows = 16});
  };
  graft::testing::check_threads([&] {
    return Tensors{f({p.hidden}), graft::testing::gradients(f, {p.hidden})[0]};
  });
}

TEST_CASE("linear_cross_entropy refuses bad input and a second derivative in words",
          "[ops][linear_cross_entropy]") {
  const Problem p = problem(4, 3, 5, at::kFloat);
  const auto error = [&](const Problem& bad, const LinearCrossEntropyOptions& options = {}) {
    return error_of([&] { fused(bad, {bad.hidden, bad.low_hidden, bad.low_weight}, options); });
  };
  Problem bad = p;
  bad.weight = p.weight.clone().set_requires_grad(true);
  CHECK(contains(error(bad), "weight must be frozen"));
  bad.weight = at::ones({5, 2});
  CHECK(contains(error(bad), "hidden must be [n, k] and weight [V, k]"));
  bad = p;
  bad.targets = at::tensor({0, 1, 5, 2}, at::kLong);
  CHECK(contains(error(bad), "targets must be in [0, 5) or ignore_index=-100; got 5 (row 2)"));
  bad.targets = at::tensor({0, 1, -1, 2}, at::kLong);
  CHECK(contains(error(bad), "got -1 (row 2)"));
  bad.targets = at::ones({4});
  CHECK(contains(error(bad), "targets must be int64 [n]"));
  bad.targets = at::ones({3}, at::kLong);
  CHECK(contains(error(bad), "targets must be int64 [n]; got [3]"));
  bad = p;
  bad.low_weight = at::ones({5, 2});
  CHECK(contains(error(bad), "hidden [n, r] and weight [V, r]"));
  bad.low_weight = at::Tensor();
  CHECK(contains(error(bad), "both hidden and weight or neither"));
  CHECK(contains(error(p, {.normalizer = 0.0}), "normalizer must be > 0; got 0"));
  CHECK(contains(error(p, {.chunk_rows = -1}), "chunk_rows must be >= 0"));
  CHECK(contains(error(p, {.logits_bytes = 0}), "logits_bytes must be > 0"));
  const at::Tensor leaf = p.hidden.clone().set_requires_grad(true);
  CHECK(contains(graft::testing::double_backward_error(fused(p, {leaf}, {}), leaf),
                 "second derivative"));
}
