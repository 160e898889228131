#include <ATen/ATen.h>
#include <graft/train/lora_pro.h>

#include <cmath>
#include <optional>

#include "tests/ops/gradients.h"

namespace {

using graft::testing::largest_difference;
using graft::train::lora_pro_direction;
using graft::train::LoraPair;
using graft::train::LoraPro;
using graft::train::LoraProDirection;
using graft::train::LoraProForm;
using graft::train::LoraProOptions;

constexpr double kTiny = 1e-15;  // damping that does not show in float64

at::Tensor leaf(const at::Tensor& values) {
  return values.detach().clone().set_requires_grad(true);
}

// A layer [n, k] of rank r with a full gradient G; the factors' gradients follow from it.
struct Problem {
  at::Tensor A, B, G;
  double s = 1.7;

  explicit Problem(int64_t n = 24, int64_t k = 18, int64_t r = 4) {
    at::manual_seed(0);
    A = at::randn({r, k}, at::kDouble);
    B = at::randn({n, r}, at::kDouble);
    G = at::randn({n, k}, at::kDouble);
  }
  at::Tensor grad_A() const { return B.t().matmul(G) * s; }
  at::Tensor grad_B() const { return G.matmul(A.t()) * s; }
  LoraProDirection direction() const {
    return lora_pro_direction(A, B, grad_A(), grad_B(), s, kTiny);
  }
  at::Tensor equivalent(const at::Tensor& hA, const at::Tensor& hB) const {
    return (B.matmul(hA) + hB.matmul(A)) * s;
  }
  at::Tensor equivalent() const {
    const LoraProDirection h = direction();
    return equivalent(h.A, h.B);
  }
  // The projections on B's columns and A's rows.
  at::Tensor P_B() const { return B.matmul(at::linalg_inv(B.t().matmul(B))).matmul(B.t()); }
  at::Tensor P_A() const { return A.t().matmul(at::linalg_inv(A.matmul(A.t()))).matmul(A); }
};

// at::kron cannot view its own result for some layouts.
at::Tensor kronecker(const at::Tensor& a, const at::Tensor& b) {
  return at::einsum("ij,kl->ikjl", {a, b}).reshape({a.size(0) * b.size(0), a.size(1) * b.size(1)});
}

// The member of {s (B hA + hB A)} nearest to G, by least squares over all entries of hA and hB.
at::Tensor least_squares(const Problem& p) {
  const int64_t n = p.B.size(0), r = p.A.size(0), k = p.A.size(1);
  const at::Tensor columns = at::cat({kronecker(p.B, at::eye(k, at::kDouble)),
                                      kronecker(at::eye(n, at::kDouble), p.A.t())},
                                     1) *
                             p.s;
  REQUIRE(columns.sizes() == at::IntArrayRef({n * k, r * k + n * r}));
  const auto solution =
      std::get<0>(at::linalg_lstsq(columns, p.G.reshape({n * k, 1}), std::nullopt, "gelsd"));
  return columns.matmul(solution).view({n, k});
}

// Pairs of leaves with the gradients of step t, of a loss <G_t, s B A>.
struct Run {
  std::vector<LoraPair> pairs;
  std::vector<at::Tensor> full;  // G of the last set_gradients

  explicit Run(at::ScalarType type = at::kDouble) {
    at::manual_seed(7);
    const auto values = [&](at::IntArrayRef shape) { return leaf(at::randn(shape, type)); };
    pairs = {{"first", values({3, 10}), values({12, 3}), 2.0},
             {"conv", values({2, 4, 3, 3}), values({6, 2, 1, 1}), 0.5},
             {"tall", values({2, 5}), values({40, 2}), -1.5}};
  }
  void set_gradients(int64_t t) {
    at::manual_seed(100 + t);
    full.clear();
    for (const LoraPair& pair : pairs) {
      const at::Tensor A = matrix(pair.A), B = matrix(pair.B);
      full.push_back(at::randn({B.size(0), A.size(1)}, at::kDouble));
      pair.A.mutable_grad() =
          (B.t().matmul(full.back()) * pair.scale).view(pair.A.sizes()).to(pair.A.scalar_type());
      pair.B.mutable_grad() =
          (full.back().matmul(A.t()) * pair.scale).view(pair.B.sizes()).to(pair.B.scalar_type());
    }
  }
  static at::Tensor matrix(const at::Tensor& factor) {
    return factor.detach().reshape({factor.size(0), -1}).to(at::kDouble);
  }
};

// One pair stepped literally: dense n x n projections, an explicit Kronecker system for X.
struct DensePair {
  at::Tensor A, B, M, V;
  double s;

  void step(const at::Tensor& G, int64_t t, double lr, double decay) {
    const auto eye = [](int64_t n) { return at::eye(n, at::kDouble); };
    const int64_t n = B.size(0), k = A.size(1), r = A.size(0);
    const auto inverse = [](const at::Tensor& gram) { return at::linalg_inv(gram); };
    const at::Tensor iB = inverse(B.t().matmul(B)), iA = inverse(A.matmul(A.t()));
    const at::Tensor P_B = B.matmul(iB).matmul(B.t()), P_A = A.t().matmul(iA).matmul(A);
    const at::Tensor Gt = G - (eye(n) - P_B).matmul(G).matmul(eye(k) - P_A);
    if (!M.defined()) M = at::zeros_like(Gt), V = at::zeros_like(Gt);
    M = 0.8 * M + 0.2 * Gt;
    V = 0.9 * V + 0.1 * Gt * Gt;
    const at::Tensor D = M / (1 - std::pow(0.8, t)) / ((V / (1 - std::pow(0.9, t))).sqrt() + 1e-3);
    const at::Tensor gA = s * B.t().matmul(D), gB = s * D.matmul(A.t());
    const at::Tensor hA = iB.matmul(gA) / (s * s),
                     hB = (eye(n) - P_B).matmul(gB).matmul(iA) / (s * s);
    const at::Tensor system =
        kronecker(B.t().matmul(B), eye(r)) + kronecker(eye(r), A.matmul(A.t()));
    const at::Tensor X = at::linalg_solve(system, -hA.matmul(A.t()).reshape({r * r})).view({r, r});
    const at::Tensor next_A = A * std::sqrt(1 - lr * decay) - lr * (hA + X.matmul(A));
    B = B * std::sqrt(1 - lr * decay) - lr * (hB - B.matmul(X));
    A = next_A;
  }
};

constexpr LoraProOptions kDenseOptions = {
    .beta1 = 0.8, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.3, .damping = kTiny};

double check_against_dense(at::ScalarType type) {
  Run run(type);
  std::vector<DensePair> dense;
  for (const LoraPair& pair : run.pairs)
    dense.push_back({Run::matrix(pair.A).clone(), Run::matrix(pair.B).clone(), {}, {}, pair.scale});
  LoraPro optimizer(run.pairs, kDenseOptions);
  for (int64_t t = 1; t <= 6; ++t) {
    run.set_gradients(t);
    optimizer.step(0.02);
    for (size_t i = 0; i < dense.size(); ++i) dense[i].step(run.full[i], t, 0.02, 0.3);
  }
  CHECK(optimizer.step_count() == 6);
  double worst = 0.0;
  for (size_t i = 0; i < dense.size(); ++i) {
    worst = std::max(worst, largest_difference(Run::matrix(run.pairs[i].A), dense[i].A));
    worst = std::max(worst, largest_difference(Run::matrix(run.pairs[i].B), dense[i].B));
  }
  return worst;
}

}  // namespace

TEST_CASE("LoRA-Pro's equivalent gradient is the least-squares one", "[train][lora_pro]") {
  for (const auto& p : {Problem(), Problem(7, 15, 3), Problem(9, 6, 1)}) {
    const at::Tensor Gt = p.equivalent();
    CHECK(largest_difference(Gt, least_squares(p)) < 1e-11);
    const auto eye = [](int64_t n) { return at::eye(n, at::kDouble); };
    const at::Tensor left = eye(p.B.size(0)) - p.P_B(), right = eye(p.A.size(1)) - p.P_A();
    CHECK(largest_difference(Gt, p.G - left.matmul(p.G).matmul(right)) < 1e-11);
    // Plain LoRA's own equivalent gradient, at its best length, is further away.
    const at::Tensor plain = p.equivalent(p.grad_A(), p.grad_B());
    const at::Tensor best = plain * ((plain * p.G).sum() / (plain * plain).sum());
    CHECK((Gt - p.G).norm().item<double>() < (best - p.G).norm().item<double>());
  }
}

TEST_CASE("LoRA-Pro's X leaves the equivalent gradient alone and is the closest to the gradients",
          "[train][lora_pro]") {
  const Problem p;
  const LoraProDirection h = p.direction();
  const at::Tensor hA = h.A - h.X.matmul(p.A), hB = h.B + p.B.matmul(h.X);
  const auto distance = [&](const at::Tensor& X) {
    return ((hA + X.matmul(p.A) - p.grad_A()).square().sum() +
            (hB - p.B.matmul(X) - p.grad_B()).square().sum())
        .item<double>();
  };
  at::manual_seed(3);
  const double best = distance(h.X);
  for (int trial = 0; trial < 20; ++trial) {
    const at::Tensor change = at::randn_like(h.X) * (trial < 10 ? 1e-3 : 1.0);
    const at::Tensor X = h.X + change;
    CHECK(largest_difference(p.equivalent(hA + X.matmul(p.A), hB - p.B.matmul(X)),
                             p.equivalent(h.A, h.B)) < 1e-11);
    CHECK(distance(X) > best);
    // At a minimum the two sides differ by what is of second order.
    CHECK(std::abs(distance(h.X + change) - distance(h.X - change)) <
          1e-9 * best * std::max(1.0, change.norm().item<double>()));
  }
  const at::Tensor inverse = at::linalg_inv(p.B.t().matmul(p.B));
  const at::Tensor residual = p.B.t().matmul(p.B).matmul(h.X) + h.X.matmul(p.A).matmul(p.A.t()) +
                              inverse.matmul(p.grad_A()).matmul(p.A.t()) / (p.s * p.s);
  CHECK(residual.abs().max().item<double>() < 1e-11);
}

TEST_CASE("LoRA-Pro's equivalent gradient does not depend on the scale", "[train][lora_pro]") {
  Problem p;
  const at::Tensor expected = p.equivalent();
  for (const double scale : {0.01, 1.0, -3.0, 500.0}) {
    p.s = scale;
    CHECK(largest_difference(p.equivalent(), expected) < 1e-10);
  }
}

TEST_CASE("LoRA-Pro's equivalent gradient is the full gradient at full rank", "[train][lora_pro]") {
  for (const auto& p : {Problem(5, 9, 5), Problem(9, 5, 5), Problem(6, 6, 6)})
    CHECK(largest_difference(p.equivalent(), p.G) < 1e-9);
}

TEST_CASE("LoRA-Pro's first step with B = 0 moves B alone, against the gradient on A's rows",
          "[train][lora_pro]") {
  Problem p;
  p.B.zero_();
  const LoraPair pair = {"q", leaf(p.A), leaf(p.B), p.s};
  LoraPro optimizer({pair}, {.form = LoraProForm::sgd, .damping = kTiny});
  pair.A.mutable_grad() = p.grad_A();
  pair.B.mutable_grad() = p.grad_B();
  optimizer.step(0.1);
  CHECK(at::equal(pair.A, p.A));
  const at::Tensor moved = pair.B.detach().matmul(p.A) * p.s;
  CHECK(largest_difference(moved, p.G.matmul(p.P_A()) * -0.1) < 1e-12);
}

TEST_CASE("LoRA-Pro's first step with A = 0 moves A alone, and both zero moves nothing",
          "[train][lora_pro]") {
  Problem p;
  p.A.zero_();
  const LoraProDirection h = p.direction();
  CHECK(largest_difference(p.equivalent(h.A, h.B), p.P_B().matmul(p.G)) < 1e-11);
  CHECK(h.B.abs().max().item<double>() == 0.0);
  p.B.zero_();
  const LoraProDirection none = p.direction();
  CHECK(none.A.abs().max().item<double>() == 0.0);
  CHECK(none.B.abs().max().item<double>() == 0.0);
}

TEST_CASE("LoRA-Pro stays finite on factors that are rank-deficient or tiny", "[train][lora_pro]") {
  Problem p;
  p.B.select(1, 2).zero_();
  p.A.select(0, 1).copy_(p.A.select(0, 0));
  const double d = LoraProOptions().damping;
  LoraProDirection h = lora_pro_direction(p.A, p.B, p.grad_A(), p.grad_B(), p.s, d);
  // Still the nearest that these factors allow, up to the damping.
  CHECK(largest_difference(p.equivalent(h.A, h.B), least_squares(p)) < 1e-5);
  // The damping follows the size of B, so that even a tiny B has a direction.
  Problem tiny;
  tiny.B.mul_(1e-9);
  h = lora_pro_direction(tiny.A, tiny.B, tiny.grad_A(), tiny.grad_B(), tiny.s, d);
  CHECK(largest_difference(tiny.equivalent(h.A, h.B), Problem().equivalent()) < 1e-6);
}

TEST_CASE("LoRA-Pro's SGD form steps both factors against their directions", "[train][lora_pro]") {
  Run run;
  const double lr = 1e-6, decay = 0.5;
  LoraPro optimizer(run.pairs, {.form = LoraProForm::sgd, .weight_decay = decay, .damping = kTiny});
  run.set_gradients(0);
  std::vector<at::Tensor> before, expected;
  for (const LoraPair& pair : run.pairs) {
    const at::Tensor A = Run::matrix(pair.A), B = Run::matrix(pair.B);
    const LoraProDirection h = lora_pro_direction(A, B, Run::matrix(pair.A.grad()),
                                                  Run::matrix(pair.B.grad()), pair.scale, kTiny);
    const at::Tensor update = B.matmul(A) * pair.scale;
    before.push_back(update.clone());
    expected.push_back((B.matmul(h.A) + h.B.matmul(A)) * pair.scale * -0.5 - update * decay);
  }
  optimizer.step(lr, 0.5);
  for (size_t i = 0; i < run.pairs.size(); ++i) {
    const LoraPair& pair = run.pairs[i];
    const at::Tensor moved =
        (Run::matrix(pair.B).matmul(Run::matrix(pair.A)) * pair.scale - before[i]) / lr;
    CHECK(largest_difference(moved, expected[i]) < 1e-4);
  }
}

TEST_CASE("LoRA-Pro's AdamW form is the literal dense algorithm", "[train][lora_pro]") {
  CHECK(check_against_dense(at::kDouble) < 1e-9);
  CHECK(check_against_dense(at::kFloat) < 1e-4);
}

TEST_CASE("LoRA-Pro goes through large layers by blocks and finds the same", "[train][lora_pro]") {
  const Problem p(300, 500, 3);  // more than one block of rows
  const LoraPair pair = {"q", leaf(p.A), leaf(p.B), p.s};
  DensePair dense = {p.A, p.B, {}, {}, p.s};
  LoraPro optimizer({pair}, kDenseOptions);
  pair.A.mutable_grad() = p.grad_A();
  pair.B.mutable_grad() = p.grad_B();
  optimizer.step(0.01);
  dense.step(p.G, 1, 0.01, 0.3);
  CHECK(largest_difference(pair.A, dense.A) < 1e-9);
  CHECK(largest_difference(pair.B, dense.B) < 1e-9);
}
