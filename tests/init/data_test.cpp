// LoRA-GA, CorDA and LoRA-SB.
#include <ATen/ATen.h>
#include <graft/init/start.h>
#include <graft/io/safetensors.h>

#include <limits>
#include <set>

#include "tests/init/matrices.h"

namespace {

using namespace graft::testing;
using graft::init::corda;
using graft::init::lora_ga;
using graft::init::lora_sb;
using graft::init::LoraGaOptions;
using graft::init::Start;

const std::vector<std::string> kDirections = {"ArB2r", "A2rBr", "ArBr", "random"};

at::Tensor golden(const std::string& name) {
  return graft::io::SafetensorsFile::open(std::string(GRAFT_GOLDENS) + "/init/peft.safetensors")
      .tensor(name);
}

// How W + s B A - s B0 A0 moves in one step of gradient descent on A and B, for the loss <G, W>.
at::Tensor first_step(const Start& start, const at::Tensor& G, double s, double rate) {
  const at::Tensor A = start.A - rate * s * start.B.t().mm(G);
  const at::Tensor B = start.B - rate * s * G.mm(start.A.t());
  return s * (B.mm(A) - start.B.mm(start.A));
}

at::Tensor covariance(int64_t k, uint64_t seed = 5) {
  const at::Tensor X = with_spectrum(
      3 * k, k, [](double i) { return 1 / i; }, seed);
  return X.t().mm(X) / static_cast<double>(3 * k);
}

}  // namespace

TEST_CASE("LoRA-GA's first step goes along the best rank-2r part of the gradient",
          "[init][lora_ga]") {
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{24, 18}, {18, 24}, {20, 20}}) {
    const at::Tensor G = gaussian(n, k), W = gaussian(n, k, 2);
    for (const auto& direction : kDirections) {
      for (const char* scale : {"stable", "unit", "gd_scale", "weight_svd"}) {
        INFO(n << " x " << k << ", " << direction << ", " << scale);
        const double s = 0.5, rate = 1e-6;
        const Start start =
            lora_ga(G, W, 4, s, {.direction = direction, .scale = scale}, generator());
        CHECK(start.subtract);
        const double c2 = (start.A.square().sum() / 4.0).item<double>();
        CHECK(relative(first_step(start, G, s, rate) / (-rate * s * s * c2), best(G, 8)) < 1e-4);
        CHECK(off_orthonormal(start.A.t(), c2) < 1e-12 * c2);
        CHECK(off_orthonormal(start.B, c2) < 1e-12 * c2);
        CHECK(largest(start.singular_values - singular_values(G).narrow(0, 0, 8)) < 1e-12);
        const double kept = (best(G, 8).square().sum() / G.square().sum()).item<double>();
        CHECK(std::abs(start.explained - kept) < 1e-12);
      }
    }
  }
}

TEST_CASE("LoRA-GA's first step in fp32: I10, I2 and I9", "[init][lora_ga]") {
  const at::Tensor G = with_spectrum(300, 280, [](double i) { return 1 / i; }).to(at::kFloat);
  const at::Tensor W = gaussian(300, 280, 2).to(at::kFloat);
  const Start start = lora_ga(G, W, 6, 2.0, {}, generator());
  CHECK(start.A.scalar_type() == at::kFloat);
  CHECK(cosine(first_step(start, G, 2.0, 1e-4).to(at::kDouble), -best(G, 12)) > 0.999);
  const double c2 = std::sqrt(300.0) / 16.0;
  CHECK(off_orthonormal(start.A.t(), c2) < 1e-4 * c2);
  const at::Tensor offset = 2.0 * start.B.mm(start.A);
  CHECK(largest((W - offset) + offset - W) < 1e-6 * std::max(largest(W), largest(offset)));
  CHECK(std::abs(offset.norm().item<double>() - 2.0 * c2 * std::sqrt(6.0)) < 1e-3);
}

TEST_CASE("LoRA-GA takes the vectors that its direction names", "[init][lora_ga]") {
  const at::Tensor G = gaussian(14, 12), W = gaussian(14, 12, 2);
  const auto [U, S, Vt] = at::linalg_svd(G, false);
  struct Case {
    const char* direction;
    std::vector<int64_t> of_A, of_B;
  };
  for (const auto& [direction, of_A, of_B] : {Case{"ArB2r", {0, 1, 2}, {3, 4, 5}},
                                              {"A2rBr", {3, 4, 5}, {0, 1, 2}},
                                              {"ArBr", {1, 3, 5}, {0, 2, 4}}}) {
    INFO(direction);
    const Start start =
        lora_ga(G, W, 3, 2.0, {.direction = direction, .scale = "unit"}, generator());
    for (int64_t i = 0; i < 3; ++i) {
      const auto at = static_cast<size_t>(i);
      CHECK(std::abs(start.A[i].dot(Vt[of_A[at]]).item<double>()) > 1 - 1e-12);
      CHECK(std::abs(start.B.select(1, i).dot(U.select(1, of_B[at])).item<double>()) > 1 - 1e-12);
    }
  }
  const auto drawn = [&](uint64_t seed) {
    const Start start = lora_ga(G, W, 3, 2.0, {.direction = "random"}, generator(seed));
    return Vt.narrow(0, 0, 6).mm(start.A.t()).abs().argmax(0);
  };
  CHECK(at::equal(drawn(1), drawn(1)));
  CHECK_FALSE(at::equal(drawn(1), drawn(2)));
}

TEST_CASE("LoRA-GA's scales are their formulas", "[init][lora_ga]") {
  const at::Tensor G = gaussian(16, 12), W = 3.0 * gaussian(16, 12, 2);
  const double s = 0.5;
  const auto factor = [&](LoraGaOptions options) {
    const Start start = lora_ga(G, W, 3, s, options, generator());
    const double a = start.A[0].norm().item<double>(),
                 b = start.B.select(1, 0).norm().item<double>();
    CHECK(std::abs(a - b) < 1e-12);
    return a;
  };
  CHECK(std::abs(factor({.scale = "stable"}) - 2.0 / 4.0) < 1e-12);
  CHECK(std::abs(factor({.scale = "stable", .gamma = 64.0}) - 2.0 / 8.0) < 1e-12);
  CHECK(std::abs(factor({.scale = "unit"}) - 1.0) < 1e-12);
  CHECK(std::abs(factor({.scale = "gd_scale"}) - 2.0) < 1e-12);
  const double mean = (singular_values(W).narrow(0, 0, 3) / s).sqrt().mean().item<double>();
  CHECK(std::abs(factor({.scale = "weight_svd"}) - mean) < 1e-12);
}

TEST_CASE("LoRA-GA as PEFT has it", "[init][lora_ga]") {
  const at::Tensor W = golden("W"), G = golden("G");
  for (const std::string choice : {"ArB2r_stable", "A2rBr_stable", "ArBr_stable",
                                   "ArB2r_weight_svd", "ArB2r_gd_scale", "ArB2r_unit"}) {
    INFO(choice);
    const auto line = choice.find('_');
    const LoraGaOptions options{.direction = choice.substr(0, line),
                                .scale = choice.substr(line + 1),
                                .peft_variant = true};
    const Start start = lora_ga(G, W, 4, 2.0, options, generator());
    const at::Tensor A = golden("lora_ga_" + choice + ".A"), B = golden("lora_ga_" + choice + ".B");
    // PEFT finds the largest singular value of W by a randomised decomposition of r triplets.
    const double tolerance = options.scale == "weight_svd" ? 2e-3 : 2e-5;
    CHECK(relative(start.A.t().mm(start.A), A.t().mm(A)) < tolerance);
    CHECK(relative(start.B.mm(start.B.t()), B.mm(B.t())) < tolerance);
    // Row by row too, for signs are all that is free.
    CHECK(relative(start.A.mm(A.t()).abs().diagonal(), A.square().sum(1)) < tolerance);
    CHECK(relative(start.B.t().mm(B).abs().diagonal(), B.square().sum(0)) < tolerance);
  }
  // A and B get the same vectors.
  const Start both = lora_ga(
      G, W, 4, 2.0, {.direction = "random", .scale = "unit", .peft_variant = true}, generator());
  const auto [U, S, Vt] = at::linalg_svd(G, false);
  const at::Tensor of_A = Vt.narrow(0, 0, 8).mm(both.A.t()).abs().argmax(0);
  CHECK(at::equal(of_A, U.narrow(1, 0, 8).t().mm(both.B).abs().argmax(0)));
  CHECK(cosine(first_step(both, G, 2.0, 1e-4).to(at::kDouble), -best(G, 8)) < 0.99);
}

TEST_CASE("LoRA-GA has half the smaller side as its largest rank", "[init][lora_ga]") {
  const at::Tensor G = gaussian(7, 20), W = gaussian(7, 20, 2);
  for (const int64_t r : {3, 4, 7}) {
    const Start start = lora_ga(G, W, r, 1.0, {}, generator());
    CHECK(start.A.sizes() == at::IntArrayRef({3, 20}));
    CHECK(start.B.sizes() == at::IntArrayRef({7, 3}));
  }
  CHECK(error_of([&] {
          lora_ga(at::ones({1, 5}), {}, 1, 1.0, {}, generator());
        }) ==
        "[init] LoRA-GA needs a gradient with at least two rows and columns; got shape [1, 5]");
  // Rank 1: the second direction is arbitrary, but orthonormal.
  const at::Tensor one = gaussian(9, 1).mm(gaussian(1, 8));
  const Start start = lora_ga(one, {}, 2, 1.0, {.scale = "unit"}, generator());
  CHECK(off_orthonormal(start.A.t()) < 1e-12);
  CHECK(off_orthonormal(start.B) < 1e-12);
  CHECK(cosine(first_step(start, one, 1.0, 1e-6), -one) > 1 - 1e-9);
}

TEST_CASE("LoRA-GA's randomised decomposition of a gradient", "[init][lora_ga]") {
  const at::Tensor left = std::get<0>(at::linalg_qr(gaussian(200, 40))),
                   right = std::get<0>(at::linalg_qr(gaussian(160, 40, 2)));
  const at::Tensor S = 1.0 / at::arange(1, 41, at::kDouble);
  const at::Tensor G = (left * S).mm(right.t()).to(at::kFloat);
  const Start start = lora_ga(G, {}, 4, 1.0, {}, generator());
  const at::Tensor wanted = (left * S).narrow(1, 0, 8).mm(right.narrow(1, 0, 8).t());
  CHECK(cosine(first_step(start, G, 1.0, 1e-4).to(at::kDouble), -wanted) > 0.999);
  CHECK(at::equal(start.A, lora_ga(G, {}, 4, 1.0, {}, generator()).A));
}

TEST_CASE("CorDA is its literal formula", "[init][corda]") {
  for (const auto& [n, k, r] :
       {std::tuple<int64_t, int64_t, int64_t>{24, 18, 4}, {10, 18, 10}, {18, 18, 1}}) {
    const at::Tensor W = gaussian(n, k), C = covariance(k);
    const at::Tensor damped = C + 0.01 * C.diagonal().mean() * at::eye(k, at::kDouble);
    const auto [U, S, Vt] = at::linalg_svd(W.mm(damped), false);
    const at::Tensor V = Vt.mm(at::linalg_inv(damped));
    for (const char* mode : {"ipm", "kpm"}) {
      INFO(n << " x " << k << ", r=" << r << ", " << mode);
      const double s = 2.0;
      const int64_t first = std::string(mode) == "ipm" ? 0 : std::min(n, k) - r;
      const at::Tensor root = (S.narrow(0, first, r) / s).sqrt();
      const at::Tensor A = root.unsqueeze(1) * V.narrow(0, first, r),
                       B = U.narrow(1, first, r) * root;
      const Start start = corda(W, C, r, s, mode);
      CHECK(start.subtract);
      CHECK(relative(start.B.mm(start.A), B.mm(A)) < 1e-9);
      CHECK(relative(start.A.t().mm(start.A), A.t().mm(A)) < 1e-9);
      CHECK(relative(start.B.mm(start.B.t()), B.mm(B.t())) < 1e-9);
      CHECK(relative(start.singular_values, S.narrow(0, first, r)) < 1e-9);
      const double kept = (S.narrow(0, first, r).square().sum() / S.square().sum()).item<double>();
      CHECK(std::abs(start.explained - kept) < 1e-9 * kept);
      // All triplets are all of W.
      if (r == std::min(n, k)) CHECK(relative(s * start.B.mm(start.A), W) < 1e-9);
    }
  }
}

TEST_CASE("CorDA agrees with PEFT; inputs of one kind leave the rest to the damping",
          "[init][corda]") {
  const at::Tensor W = golden("W"), C = golden("C");
  for (const std::string mode : {"ipm", "kpm"}) {
    INFO(mode);
    const Start start = corda(W, C, 4, 2.0, mode);
    CHECK(start.A.scalar_type() == at::kFloat);
    const double tolerance = mode == "ipm" ? 5e-5 : 1e-3;  // PEFT's smallest triplets are fp32's
    CHECK(relative(start.B.mm(start.A),
                   golden("corda_" + mode + ".B").mm(golden("corda_" + mode + ".A"))) < tolerance);
    CHECK(relative(start.B.mm(start.B.t()),
                   golden("corda_" + mode + ".B").mm(golden("corda_" + mode + ".B").t())) <
          tolerance);
    CHECK(relative(W - 2.0 * start.B.mm(start.A), golden("corda_" + mode + ".base")) < tolerance);
  }
  const at::Tensor x = gaussian(1, 12), one = x.t().mm(x);
  const at::Tensor weight = gaussian(10, 12);
  const Start start = corda(weight, one, 1, 1.0, "ipm");
  // The leading direction of W x x^T is W x.
  CHECK(std::abs(cosine(start.B.select(1, 0), weight.mv(x[0]))) > 0.999);
  // The smallest triplets of an fp32 weight are those of the same numbers in fp64.
  const Start last = corda(W, C, 4, 2.0, "kpm"),
              exact = corda(W.to(at::kDouble), C.to(at::kDouble), 4, 2.0, "kpm");
  CHECK(relative(last.B.mm(last.A), exact.B.mm(exact.A)) < 1e-6);
  CHECK(relative(last.singular_values, exact.singular_values) < 1e-6);
  // Singular values that are exactly zero leave rows of zeros.
  at::Tensor single = at::zeros({6, 5}, at::kDouble);
  single[0][0] = 1.0;
  const Start lone = corda(single, at::eye(5, at::kDouble), 3, 1.0, "ipm");
  CHECK(relative(lone.B.mm(lone.A), single) < 1e-12);
  // A weight of rank 1 has rows of zeros past the first.
  const at::Tensor thin = gaussian(10, 1).mm(gaussian(1, 12));
  const Start poor = corda(thin, covariance(12), 3, 1.0, "ipm");
  CHECK(poor.A.isfinite().all().item<bool>());
  CHECK(relative(poor.B.mm(poor.A), thin) < 1e-9);
  CHECK(largest(poor.A.narrow(0, 1, 2)) < 1e-5);
}

TEST_CASE("LoRA-SB starts at the best rank-r part of Adam's first step", "[init][lora_sb]") {
  for (const auto& [n, k, r] :
       {std::tuple<int64_t, int64_t, int64_t>{24, 18, 4}, {18, 24, 18}, {5, 9, 1}}) {
    INFO(n << " x " << k << ", r=" << r);
    at::Tensor G = gaussian(n, k);
    G[0][0] = 0.0;  // whose sign is 0
    const double s = 0.5, step = 3e-3;
    const at::Tensor change = -step * G.sign();
    const Start start = lora_sb(G, r, s, step);
    CHECK_FALSE(start.subtract);
    CHECK(relative(s * start.B.mm(start.core).mm(start.A), best(change, r)) < 1e-12);
    CHECK(off_orthonormal(start.A.t()) < 1e-12);
    CHECK(off_orthonormal(start.B) < 1e-12);
    CHECK(relative(start.core, at::diag(singular_values(change).narrow(0, 0, r) / s)) < 1e-12);
    CHECK(std::abs(start.explained -
                   (best(change, r).square().sum() / change.square().sum()).item<double>()) <
          1e-12);
    // Only the gradient's signs count.
    const Start other = lora_sb(1e3 * G, r, s, step);
    CHECK(at::equal(other.A, start.A));
    CHECK(at::equal(other.core, start.core));
  }
  const at::Tensor G = gaussian(300, 290).to(at::kFloat);  // a flat spectrum
  const Start start = lora_sb(G, 8, 1.0, 1.0);
  CHECK(relative(start.B.mm(start.core).mm(start.A), best(-G.sign(), 8)) < 1e-4);
}

TEST_CASE("gradients and covariances that nothing can be found in are refused",
          "[init][lora_ga][corda][lora_sb]") {
  const at::Tensor G = gaussian(6, 4), W = gaussian(6, 4, 2), C = covariance(4);
  const auto ga = [&](const LoraGaOptions& options) {
    lora_ga(G, W, 2, 1.0, options, generator());
  };
  CHECK(error_of([&] { ga({.direction = "AB"}); }) ==
        "[init] LoRA-GA's direction must be ArB2r, A2rBr, ArBr or random; got 'AB'");
  CHECK(error_of([&] { ga({.scale = "gd"}); }) ==
        "[init] LoRA-GA's scale must be stable, unit, gd_scale or weight_svd; got 'gd'");
  CHECK(error_of([&] { ga({.gamma = 0.0}); }) == "[init] LoRA-GA's gamma must be > 0; got 0");
  CHECK(error_of([&] { lora_ga(G, W.t(), 2, 1.0, {.scale = "weight_svd"}, generator()); }) ==
        "[init] weight and gradient must have one shape; got [4, 6] and [6, 4]");
  CHECK(error_of([&] { lora_ga(G, W, 5, 1.0, {}, generator()); }) ==
        "[init] rank must be in [1, min(out, in)]; got rank=5 for a matrix of shape [6, 4]");
  CHECK(error_of([&] { lora_ga(G, W, 2, -2.0, {}, generator()); }) ==
        "[init] the scale must be > 0; got -2");
  CHECK(error_of([&] {
          lora_ga(at::zeros({6, 4}), W, 2, 1.0, {}, generator());
        }) == "[init] the gradient must not be all zero; got zeros of shape [6, 4]");
  CHECK(error_of([&] { corda(W, C, 2, 1.0, "kpn"); }) ==
        "[init] CorDA's mode must be ipm or kpm; got 'kpn'");
  CHECK(error_of([&] { corda(W, covariance(5), 2, 1.0, "ipm"); }) ==
        "[init] the covariance must be [in, in] for the weight [6, 4]; got [5, 5]");
  CHECK(contains(error_of([&] { corda(W, -C, 2, 1.0, "ipm"); }),
                 "[init] a covariance has no negative entry on its diagonal; got -"));
  CHECK(contains(error_of([&] { corda(W, 0 * C, 2, 1.0, "ipm"); }),
                 "the covariance must not be all zero"));
  CHECK(contains(error_of([&] { lora_sb(G / 0, 2, 1.0, 1.0); }), "the gradient must be finite"));
  CHECK(error_of([&] { lora_sb(G, 2, 1.0, 0.0); }) == "[init] the step must be > 0; got 0");
  CHECK(contains(error_of([&] { lora_sb(G, 9, 1.0, 1.0); }), "got rank=9"));
}
