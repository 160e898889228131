#include <ATen/ATen.h>
#include <graft/init/low_rank_svd.h>

#include <limits>

#include "tests/init/matrices.h"

namespace {

using namespace graft::testing;
using graft::init::leading_svd;
using graft::init::randomized_svd;
using graft::init::Svd;

at::Tensor product(const Svd& svd) {
  return (svd.U * svd.S).mm(svd.V.t());
}

// How far M^T U = V S and M V = U S are off, over all columns.
double residual(const at::Tensor& M, const Svd& svd) {
  const at::Tensor W = M.to(at::kDouble), U = svd.U.to(at::kDouble), V = svd.V.to(at::kDouble),
                   S = svd.S.to(at::kDouble);
  return std::max(largest((W.t().mm(U) - V * S).norm(2, 0)), largest((W.mm(V) - U * S).norm(2, 0)));
}

void check_signs(const Svd& svd) {
  for (int64_t j = 0; j < svd.V.size(1); ++j) {
    const at::Tensor column = svd.V.select(1, j);
    CHECK(column[column.abs().argmax().item<int64_t>()].item<double>() > 0.0);
  }
}

struct Spectrum {
  const char* name;
  std::function<double(double)> value;
};

const std::vector<Spectrum>& spectra() {
  static const std::vector<Spectrum> all = {
      {"flat", [](double) { return 1.0; }},
      {"i^-1/2", [](double i) { return 1 / std::sqrt(i); }},
      {"i^-2", [](double i) { return 1 / (i * i); }},
      {"exp(-i/4)", [](double i) { return std::exp(-i / 4); }},
      {"rank 5", [](double i) { return i <= 5 ? 1 / i : 0.0; }},
      {"rank 1", [](double i) { return i <= 1 ? 3.0 : 0.0; }},
      {"equal values at the cut", [](double i) { return i <= 4    ? 10 / i
                                                        : i <= 40 ? 1.0
                                                                  : 0.1; }}};
  return all;
}

}  // namespace

TEST_CASE("leading triplets satisfy M^T u = s v to the precision of the type", "[init][svd]") {
  struct Size {
    int64_t n, k, q;
  };
  // Filtered, from all eigenvectors, whole; tall, wide and square.
  for (const auto& [n, k, q] : {Size{500, 400, 8},
                                {400, 500, 8},
                                {400, 400, 60},
                                {90, 300, 10},
                                {300, 90, 30},
                                {20, 24, 20},
                                {7, 1, 1},
                                {1, 7, 1}}) {
    for (const auto& spectrum : spectra()) {
      INFO(spectrum.name << ", " << n << " x " << k << ", q=" << q);
      const at::Tensor exact = with_spectrum(n, k, spectrum.value);
      for (const auto type : {at::kFloat, at::kDouble}) {
        if (type == at::kDouble && n * k > 100000) continue;  // LAPACK's at any size
        const at::Tensor M = exact.to(type);
        const double eps = type == at::kFloat ? std::numeric_limits<float>::epsilon()
                                              : std::numeric_limits<double>::epsilon();
        const Svd svd = leading_svd(M, q);
        REQUIRE(svd.U.sizes() == at::IntArrayRef({n, q}));
        REQUIRE(svd.S.sizes() == at::IntArrayRef({q}));
        REQUIRE(svd.V.sizes() == at::IntArrayRef({k, q}));
        CHECK((svd.U.scalar_type() == type && svd.S.scalar_type() == type &&
               svd.V.scalar_type() == type));
        const at::Tensor S = singular_values(M);
        const double unit = eps * largest(S);
        CHECK(residual(M, svd) / unit < (type == at::kFloat ? 20 : 100));  // LAPACK has the latter
        CHECK(largest(svd.S.to(at::kDouble) - S.narrow(0, 0, q)) < 40 * unit);
        CHECK(off_orthonormal(svd.U) < 100 * eps);
        CHECK(off_orthonormal(svd.V) < 100 * eps);
        check_signs(svd);
      }
    }
  }
}

TEST_CASE("leading triplets give the best approximation and its projectors", "[init][svd]") {
  const auto drop = [](double i) { return i <= 6 ? 2 - i / 10 : 0.5 / i; };
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{450, 400}, {400, 450}, {60, 50}}) {
    INFO(n << " x " << k);
    const at::Tensor M = with_spectrum(n, k, drop).to(at::kFloat);
    const Svd svd = leading_svd(M, 6);
    const auto [U, S, Vt] = at::linalg_svd(M.to(at::kDouble), false);
    CHECK(relative(product(svd), best(M, 6)) < 2e-6);
    CHECK(relative(svd.U.mm(svd.U.t()), U.narrow(1, 0, 6).mm(U.narrow(1, 0, 6).t())) < 2e-6);
    CHECK(relative(svd.V.mm(svd.V.t()), Vt.narrow(0, 0, 6).t().mm(Vt.narrow(0, 0, 6))) < 2e-6);
  }
}

TEST_CASE("few triplets of a large matrix come from the fast way", "[init][svd]") {
  // What is put right in fp64 is orthonormal to one rounding, LAPACK's decomposition in fp32 to
  // ten: were the fast way broken, it would hide behind that.
  for (const auto& [k, q] : {std::pair<int64_t, int64_t>{390, 8}, {200, 40}}) {
    INFO("q=" << q);
    const Svd svd = leading_svd(gaussian(400, k).to(at::kFloat), q);
    CHECK(off_orthonormal(svd.U) < 1.2e-7);
    CHECK(off_orthonormal(svd.V) < 1.2e-7);
  }
}

TEST_CASE("half-precision matrices are decomposed in fp32, strided ones as they are",
          "[init][svd]") {
  const at::Tensor M = gaussian(120, 100).to(at::kBFloat16);
  const Svd svd = leading_svd(M, 4);
  CHECK(svd.U.scalar_type() == at::kFloat);
  CHECK(relative(product(svd), best(M, 4)) < 1e-4);
  const at::Tensor strided = gaussian(100, 240).to(at::kFloat).slice(1, 0, 240, 2).t();
  CHECK(at::equal(leading_svd(strided, 4).V, leading_svd(strided.contiguous(), 4).V));
}

TEST_CASE("matrices whose squares leave fp32's range are decomposed, and NaN is refused",
          "[init][svd]") {
  for (const double size : {1e25, 1e-25}) {
    const at::Tensor M = (gaussian(90, 80) * size).to(at::kFloat);
    const Svd svd = randomized_svd(M, 80, 1, generator());
    CHECK(relative(product(svd) / size, M / size) < 1e-5);
    at::Tensor broken = M.clone();
    broken[3][4] = std::numeric_limits<double>::quiet_NaN();
    CHECK(contains(error_of([&] { randomized_svd(broken, 4, 1, generator()); }), "must be finite"));
  }
}

TEST_CASE("a decomposition has the same bits each time", "[init][svd]") {
  const at::Tensor M = gaussian(400, 390).to(at::kFloat);
  CHECK(at::equal(leading_svd(M, 8).U, leading_svd(M, 8).U));
  const Svd one = randomized_svd(M, 8, 2, generator(3)),
            same = randomized_svd(M, 8, 2, generator(3));
  CHECK(at::equal(one.U, same.U));
  CHECK_FALSE(at::equal(one.U, randomized_svd(M, 8, 2, generator(4)).U));
}

TEST_CASE("the randomised decomposition is exact up to its rank", "[init][svd]") {
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{80, 50}, {50, 80}, {50, 50}}) {
    INFO(n << " x " << k);
    const at::Tensor M =
        with_spectrum(n, k, [](double i) { return i <= 5 ? std::pow(10.0, 1 - i) : 0.0; });
    const Svd svd = randomized_svd(M, 8, 0, generator());
    CHECK(relative(product(svd), M) < 1e-13);
    CHECK(largest(svd.S - singular_values(M).narrow(0, 0, 8)) < 1e-13);
    CHECK(off_orthonormal(svd.U) < 1e-13);
    CHECK(off_orthonormal(svd.V) < 1e-13);
    check_signs(svd);
  }
}

TEST_CASE("each iteration brings the randomised decomposition nearer", "[init][svd]") {
  const at::Tensor M = with_spectrum(200, 150, [](double i) { return 1 / i; });
  const at::Tensor wanted = best(M, 8);
  double last = 1.0;
  for (const int64_t iterations : {0, 1, 2, 4}) {
    const Svd svd = randomized_svd(M, 16, iterations, generator());
    const double error = relative(
        (svd.U.narrow(1, 0, 8) * svd.S.narrow(0, 0, 8)).mm(svd.V.narrow(1, 0, 8).t()), wanted);
    INFO(iterations << " iterations: " << error);
    CHECK(error < 0.4 * last);
    last = error;
  }
  CHECK(last < 2e-4);
}

TEST_CASE("a matrix of zeros has zero singular values and orthonormal vectors", "[init][svd]") {
  for (const int64_t k : {40, 400}) {
    const at::Tensor M = at::zeros({400, k});
    for (const Svd& svd : {leading_svd(M, 3), randomized_svd(M, 3, 2, generator())}) {
      CHECK(largest(svd.S) == 0.0);
      CHECK(off_orthonormal(svd.U) < 1e-6);
      CHECK(off_orthonormal(svd.V) < 1e-6);
    }
  }
}

TEST_CASE("signs follow the largest entry of V, the first of equals", "[init][svd]") {
  Svd svd{at::tensor({1.0, 2.0, 3.0, 4.0}).view({2, 2}), at::ones({2}),
          at::tensor({-0.5, 0.1, 0.2, -0.1}).view({2, 2})};
  graft::init::fix_signs(svd);
  CHECK(at::equal(svd.V, at::tensor({0.5, 0.1, -0.2, -0.1}).view({2, 2})));
  CHECK(at::equal(svd.U, at::tensor({-1.0, 2.0, -3.0, 4.0}).view({2, 2})));
}

TEST_CASE("decompositions refuse what they cannot do, in words", "[init][svd]") {
  const at::Tensor M = at::ones({3, 5});
  CHECK(
      error_of([&] { leading_svd(M, 4); }) ==
      "[init] the number of singular triplets must be in [1, min(out, in)]; got 4 for a matrix of "
      "shape [3, 5]");
  CHECK(contains(error_of([&] { randomized_svd(M, 0, 1, generator()); }),
                 "[1, min(out, in)]; got 0"));
  CHECK(error_of([&] { randomized_svd(M, 1, -1, generator()); }) ==
        "[init] iterations must be >= 0; got -1");
  CHECK(error_of([&] { leading_svd(at::ones({3}), 1); }) ==
        "[init] the matrix must be a matrix that is not empty; got shape [3]");
  CHECK(error_of([&] { leading_svd(M / 0, 1); }) ==
        "[init] the matrix must be finite; got a NaN or an infinity");
  CHECK(contains(error_of([&] { leading_svd(M.to(at::kLong), 1); }),
                 "must be floating-point; got Long"));
  CHECK(contains(error_of([&] { leading_svd({}, 1); }), "got an undefined tensor"));
}
