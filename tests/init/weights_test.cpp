// PiSSA, OLoRA and the Nyström start.
#include <ATen/ATen.h>
#include <graft/init/start.h>
#include <graft/io/safetensors.h>

#include <limits>

#include "tests/init/matrices.h"

namespace {

using namespace graft::testing;
using graft::init::nystrom;
using graft::init::NystromOptions;
using graft::init::olora;
using graft::init::pissa;
using graft::init::Start;

struct Size {
  int64_t n, k, r;
};
const std::vector<Size> kSizes = {{24, 18, 4}, {18, 24, 4}, {18, 18, 18},
                                  {20, 10, 1}, {1, 6, 1},   {6, 1, 1}};

at::Tensor update(const Start& start, double scale) {
  return scale * (start.core.defined() ? start.B.mm(start.core).mm(start.A) : start.B.mm(start.A));
}

at::Tensor golden(const std::string& name) {
  return graft::io::SafetensorsFile::open(std::string(GRAFT_GOLDENS) + "/init/peft.safetensors")
      .tensor(name);
}

}  // namespace

TEST_CASE("PiSSA's product is the best rank-r part of W, in balanced factors", "[init][pissa]") {
  for (const auto& [n, k, r] : kSizes) {
    for (const double s : {1.0, 0.25, 3.0}) {
      INFO(n << " x " << k << ", r=" << r << ", s=" << s);
      const at::Tensor W = gaussian(n, k), S = singular_values(W);
      const Start start = pissa(W, r, s, -1, generator());
      CHECK(start.subtract);
      CHECK_FALSE(start.core.defined());
      CHECK(relative(update(start, s), best(W, r)) < 1e-12);
      const at::Tensor balanced = at::diag(S.narrow(0, 0, r) / s);
      CHECK(relative(start.B.t().mm(start.B), balanced) < 1e-12);
      CHECK(relative(start.A.mm(start.A.t()), balanced) < 1e-12);
      CHECK(largest(start.singular_values - S.narrow(0, 0, r)) < 1e-12);
      const double kept = S.narrow(0, 0, r).square().sum().item<double>(),
                   all = S.square().sum().item<double>();
      CHECK(std::abs(start.explained - kept / all) < 1e-12);
      if (r == std::min(n, k)) continue;
      const at::Tensor rest = W - update(start, s);
      CHECK(std::abs(singular_values(rest)[0].item<double>() - S[r].item<double>()) < 1e-12);
      CHECK(std::abs(rest.square().sum().item<double>() - (all - kept)) < 1e-11);
      CHECK(largest(rest + update(start, s) - W) < 1e-14 * largest(W) * 10);
    }
  }
}

TEST_CASE("PiSSA in fp32: I2 and I9", "[init][pissa]") {
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{400, 390}, {96, 300}}) {
    const at::Tensor W = gaussian(n, k).to(at::kFloat);
    const Start start = pissa(W, 8, 2.0, -1, generator());
    CHECK(start.A.scalar_type() == at::kFloat);
    CHECK((start.A.is_contiguous() && start.B.is_contiguous()));
    const at::Tensor residual = W - update(start, 2.0);
    CHECK(largest(residual + update(start, 2.0) - W) < 1e-6 * largest(W));
    const double next = singular_values(W)[8].item<double>();
    CHECK(std::abs(singular_values(residual)[0].item<double>() - next) < 1e-4 * next);
  }
}

TEST_CASE("PiSSA's randomised decomposition nears the exact one", "[init][pissa]") {
  const at::Tensor W = with_spectrum(120, 100, [](double i) { return 1 / i; });
  const at::Tensor exact = update(pissa(W, 6, 1.0, -1, generator()), 1.0);
  const double four = relative(update(pissa(W, 6, 1.0, 4, generator()), 1.0), exact);
  CHECK(four < 5e-4);
  CHECK(four > 1e-12);  // it is another way
  // Twice the triplets are found, which matters most without iterations.
  CHECK(relative(update(pissa(W, 6, 1.0, 0, generator()), 1.0), exact) < 0.4);
  CHECK(pissa(W, 100, 1.0, 0, generator()).A.size(0) == 100);  // twice that there is not
  CHECK(at::equal(pissa(W, 6, 1.0, 4, generator()).A, pissa(W, 6, 1.0, 4, generator()).A));
}

TEST_CASE("PiSSA and OLoRA agree with PEFT", "[init][pissa][olora]") {
  const at::Tensor W = golden("W");
  const double s = 2.0;
  const Start p = pissa(W, 4, s, -1, generator()), o = olora(W, 4);
  CHECK(relative(W - update(p, s), golden("pissa.base")) < 1e-6);
  CHECK(relative(p.B.mm(p.A), golden("pissa.B").mm(golden("pissa.A"))) < 5e-6);
  CHECK(relative(p.A.t().mm(p.A), golden("pissa.A").t().mm(golden("pissa.A"))) < 5e-6);
  CHECK(relative(p.B.mm(p.B.t()), golden("pissa.B").mm(golden("pissa.B").t())) < 5e-6);
  // Householder's signs are fixed, so here the factors themselves agree.
  CHECK(relative(o.A, golden("olora.A")) < 2e-6);
  CHECK(relative(o.B, golden("olora.B")) < 2e-6);
  CHECK(relative(W - update(o, s), golden("olora.base")) < 2e-6);
}

TEST_CASE("OLoRA holds the first r columns of W, from orthonormal ones", "[init][olora]") {
  for (const auto& [n, k, r] : kSizes) {
    INFO(n << " x " << k << ", r=" << r);
    const at::Tensor W = gaussian(n, k);
    const Start start = olora(W, r);
    CHECK(start.subtract);
    CHECK(off_orthonormal(start.B) < 1e-13);
    CHECK(relative(start.B.mm(start.A).narrow(1, 0, r), W.narrow(1, 0, r)) < 1e-13);
    CHECK(relative(start.A, start.B.t().mm(W)) < 1e-13);
    CHECK(at::equal(start.A.narrow(1, 0, r), start.A.narrow(1, 0, r).triu()));
    const auto [Q, R] = at::linalg_qr(W);
    CHECK(relative(start.B, Q.narrow(1, 0, r)) < 1e-13);
    CHECK(relative(start.A, R.narrow(0, 0, r)) < 1e-13);
    CHECK(std::abs(start.explained - (start.A.square().sum() / W.square().sum()).item<double>()) <
          1e-13);
  }
  // Fewer independent columns than r: still orthonormal, still a projection of W.
  const at::Tensor thin = gaussian(12, 2).mm(gaussian(2, 9));
  CHECK(off_orthonormal(olora(thin, 4).B) < 1e-13);
  CHECK(relative(update(olora(thin, 4), 1.0), thin) < 1e-12);
}

TEST_CASE("Nystrom cores pinv and cur give W itself up to its rank", "[init][nystrom]") {
  for (const double s : {1.0, 0.5}) {
    for (const auto type : {at::kDouble, at::kFloat}) {
      const at::Tensor exact = gaussian(24, 3).mm(gaussian(3, 18, 2)), W = exact.to(type);
      for (const int64_t r : {3, 5}) {
        INFO("r=" << r << ", s=" << s << ", " << W.scalar_type());
        const double tolerance = type == at::kDouble ? 1e-11 : 1e-4;
        CHECK(relative(update(nystrom(W, r, s, {.core = "cur"}), s), W) < tolerance);
        CHECK(relative(update(nystrom(W, r, s, {.core = "pinv", .rcond = 1e-5}), s), W) <
              tolerance);
      }
      CHECK(nystrom(W, 3, s, {}).explained > 0.9999);
    }
  }
}

TEST_CASE("Nystrom factors are W's rows and columns; each core is its formula", "[init][nystrom]") {
  for (const auto& [n, k, r] : kSizes) {
    INFO(n << " x " << k << ", r=" << r);
    const at::Tensor W = gaussian(n, k);
    const at::Tensor rows = W.narrow(0, 0, r), columns = W.narrow(1, 0, r),
                     block = rows.narrow(1, 0, r);
    for (const char* core : {"block", "pinv", "cur"}) {
      const Start start = nystrom(W, r, 2.0, {.core = core});
      CHECK(at::equal(start.A, rows));
      CHECK(at::equal(start.B, columns));
      CHECK(start.subtract);
    }
    CHECK(at::equal(nystrom(W, r, 2.0, {.core = "block"}).core, block));
    const Start whole = nystrom(W, r, 2.0, {.core = "pinv", .rcond = 0.0});
    CHECK(relative(whole.core, at::linalg_pinv(block) / 2.0) < 1e-9);
    CHECK(relative(update(whole, 2.0).narrow(0, 0, r), rows) < 1e-9);
    CHECK(relative(update(whole, 2.0).narrow(1, 0, r), columns) < 1e-9);
    CHECK(relative(nystrom(W, r, 2.0, {.core = "pinv"}).core, at::linalg_pinv(block, 0.1) / 2.0) <
          1e-9);
    const Start cur = nystrom(W, r, 2.0, {});
    const at::Tensor P_B = columns.mm(at::linalg_pinv(columns)),
                     P_A = at::linalg_pinv(rows).mm(rows);
    const at::Tensor wanted = P_B.mm(W).mm(P_A);
    CHECK(relative(update(cur, 2.0), wanted) < 1e-10);
    CHECK(std::abs(cur.explained - (wanted.square().sum() / W.square().sum()).item<double>()) <
          1e-10);
    CHECK_FALSE(nystrom(W, r, 2.0, {.core = "block", .subtract = false}).subtract);
  }
}

TEST_CASE("the Nystrom product of pinv without a residual is refused", "[init][nystrom]") {
  // A nearly singular leading block: the Nyström product is far larger than the weight.
  at::Tensor W = gaussian(40, 30);
  W.narrow(0, 0, 4).narrow(1, 0, 4).mul_(1e-3);
  const Start start = nystrom(W, 4, 1.0, {.core = "pinv"});
  CHECK((update(start, 1.0).norm() / W.norm()).item<double>() > 50.0);
  CHECK(start.explained == 0.0);
  CHECK((update(nystrom(W, 4, 1.0, {.core = "cur"}), 1.0).norm() / W.norm()).item<double>() <= 1.0);
  CHECK(
      error_of([&] { nystrom(W, 4, 1.0, {.core = "pinv", .subtract = false}); }) ==
      "[init] the core 'pinv' needs subtract, since its product can be many times the weight; got "
      "subtract=false");
  CHECK(error_of([&] { nystrom(W, 4, 1.0, {.core = "svd"}); }) ==
        "[init] the Nystrom core must be block, pinv or cur; got 'svd'");
  CHECK(error_of([&] { nystrom(W, 4, 1.0, {.core = "pinv", .rcond = 1.0}); }) ==
        "[init] rcond must be in [0, 1); got 1");
}

TEST_CASE("weights that nothing can be found in are refused, and W is left alone",
          "[init][pissa][olora][nystrom]") {
  const at::Tensor W = gaussian(6, 4).to(at::kHalf), before = W.clone();
  for (const auto& start : {pissa(W, 2, 1.0, -1, generator()), pissa(W, 2, 1.0, 1, generator()),
                            olora(W, 2), nystrom(W, 2, 1.0, {})}) {
    CHECK(start.A.scalar_type() == at::kFloat);
    CHECK(start.B.scalar_type() == at::kFloat);
  }
  const at::Tensor single = W.to(at::kFloat), copy = single.clone();
  for (auto start : {olora(single, 2), nystrom(single, 2, 1.0, {})}) {
    start.A.zero_();
    start.B.zero_();
  }
  CHECK(at::equal(W, before));
  CHECK(at::equal(single, copy));

  const std::vector<std::function<void(const at::Tensor&, int64_t)>> all = {
      [](const at::Tensor& M, int64_t r) { pissa(M, r, 1.0, -1, generator()); },
      [](const at::Tensor& M, int64_t r) { olora(M, r); },
      [](const at::Tensor& M, int64_t r) { nystrom(M, r, 1.0, {}); }};
  for (const auto& method : all) {
    CHECK(error_of([&] { method(W, 5); }) ==
          "[init] rank must be in [1, min(out, in)]; got rank=5 for a matrix of shape [6, 4]");
    CHECK(contains(error_of([&] { method(W, 0); }), "got rank=0"));
    CHECK(error_of([&] {
            method(at::zeros({3, 2}), 1);
          }) == "[init] the weight must not be all zero; got zeros of shape [3, 2]");
    CHECK(contains(error_of([&] { method(W * std::numeric_limits<double>::quiet_NaN(), 1); }),
                   "[init] the weight must be finite"));
    CHECK(contains(error_of([&] { method(at::ones({2, 2, 2}), 1); }), "got shape [2, 2, 2]"));
  }
  CHECK(error_of([&] { pissa(W, 2, 0.0, -1, generator()); }) ==
        "[init] the scale must be > 0; got 0");
  CHECK(error_of([&] { nystrom(W, 2, -1.0, {}); }) == "[init] the scale must be > 0; got -1");
}
