#include <ATen/ATen.h>
#include <graft/init/activation_svd.h>
#include <graft/io/safetensors.h>

#include <limits>

#include "tests/init/matrices.h"

namespace {

using namespace graft::testing;
using graft::init::ActivationSvd;
using graft::init::allocate_ranks;

// Rows around a mean that is far from zero.
at::Tensor rows(int64_t t, int64_t k, uint64_t seed) {
  return with_spectrum(
             t, k, [](double i) { return 3 / i; }, seed) +
         2.0 + 0.1 * gaussian(1, k, seed + 77);
}

at::Tensor centred(const at::Tensor& X) {
  return X - X.mean(0);
}

at::Tensor projector(const at::Tensor& directions) {
  return directions.t().mm(directions);
}

at::Tensor golden(const std::string& name) {
  return graft::io::SafetensorsFile::open(std::string(GRAFT_GOLDENS) + "/init/peft.safetensors")
      .tensor(name);
}

}  // namespace

TEST_CASE("with as many directions as inputs, batches give what all rows give", "[init][eva]") {
  const int64_t k = 18;
  ActivationSvd svd(k, 0.99);
  std::vector<at::Tensor> batches;
  for (const int64_t t : {40, 18, 25, 60}) {
    batches.push_back(rows(t, k, static_cast<uint64_t>(t)));
    REQUIRE(svd.update(batches.back()));
    const at::Tensor X = centred(at::cat(batches));
    const auto [U, S, Vt] = at::linalg_svd(X, false);
    CHECK(svd.rows() == X.size(0));
    CHECK(largest(svd.singular_values() - S) < 1e-12 * largest(S));
    CHECK(off_orthonormal(svd.directions().t()) < 1e-12);
    // Directions with their weights, whatever their signs.
    const at::Tensor scaled = svd.directions() * svd.singular_values().unsqueeze(1);
    CHECK(relative(projector(scaled), X.t().mm(X)) < 1e-12);
    CHECK(relative(projector(svd.directions().narrow(0, 0, 5)), projector(Vt.narrow(0, 0, 5))) <
          1e-11);
    CHECK(largest(svd.explained_ratio() - S.square() / X.square().sum()) < 1e-12);
    CHECK(std::abs(svd.explained_ratio().sum().item<double>() - 1.0) < 1e-12);
  }
}

TEST_CASE("a mean that dwarfs the inputs' differences leaves them their digits", "[init][eva]") {
  const int64_t k = 12;
  ActivationSvd svd(k, 0.99);
  std::vector<at::Tensor> batches;
  for (const uint64_t seed : {1, 2, 3}) {
    batches.push_back((rows(2000, k, seed) * 40 + 3e6).to(at::kFloat));
    REQUIRE(svd.update(batches.back()));
  }
  const at::Tensor X = centred(at::cat(batches).to(at::kDouble));
  const at::Tensor S = std::get<1>(at::linalg_svd(X, false));
  CHECK(relative(svd.singular_values(), S) < 2e-5);
  CHECK(relative(svd.explained_ratio(), S.square() / X.square().sum()) < 2e-5);
}

TEST_CASE("ratios do not depend on the inputs' size", "[init][eva]") {
  const at::Tensor X = rows(50, 12, 4).to(at::kFloat);
  ActivationSvd plain(3, 0.99);
  plain.update(X);
  for (const float size : {1e25f, 1e-25f}) {
    ActivationSvd svd(3, 0.99);
    svd.update(X * size);
    CHECK(relative(svd.explained_ratio(), plain.explained_ratio()) < 1e-5);
  }
}

TEST_CASE("incremental directions agree with PEFT's", "[init][eva]") {
  ActivationSvd svd(4, 0.99);
  for (int i = 0; i < 3; ++i) {
    INFO("batch " << i);
    svd.update(golden("pca.X" + std::to_string(i)));
    const std::string at = "pca." + std::to_string(i);
    CHECK(relative(svd.directions(), golden(at + ".components")) < 1e-4);  // signs too
    CHECK(relative(svd.singular_values(), golden(at + ".singular_values")) < 2e-6);
    CHECK(relative(svd.explained_ratio(), golden(at + ".ratio")) < 2e-6);
    CHECK(svd.directions().scalar_type() == at::kFloat);
  }
}

TEST_CASE("many inputs go through the randomised decomposition, to the same directions",
          "[init][eva]") {
  ActivationSvd svd(6, 0.99);
  const at::Tensor X = with_spectrum(300, 200, [](double i) { return std::pow(0.6, i); });
  at::Tensor all;
  for (int batch = 0; batch < 3; ++batch) {
    svd.update(X.narrow(0, 100 * batch, 100).to(at::kFloat));
    all = X.narrow(0, 0, 100 * (batch + 1));
  }
  const auto [U, S, Vt] = at::linalg_svd(centred(all), false);
  CHECK(relative(projector(svd.directions()), projector(Vt.narrow(0, 0, 6))) < 0.05);
  CHECK(relative(projector(svd.directions().narrow(0, 0, 2)), projector(Vt.narrow(0, 0, 2))) <
        1e-3);
  CHECK(relative(svd.singular_values(), S.narrow(0, 0, 6)) < 1e-3);
  ActivationSvd again(6, 0.99);
  for (int batch = 0; batch < 3; ++batch)
    again.update(X.narrow(0, 100 * batch, 100).to(at::kFloat));
  CHECK(at::equal(again.directions(), svd.directions()));
}

TEST_CASE("directions settle when they no longer turn", "[init][eva]") {
  ActivationSvd svd(3, 0.99);
  CHECK(svd.settled(0));
  CHECK_FALSE(svd.settled(1));
  const at::Tensor X = rows(50, 8, 1);
  svd.update(X);
  CHECK_FALSE(svd.settled(1));
  svd.update(X);
  CHECK(svd.settled(3));
  // A strong direction that was not there before pushes in at the third place.
  at::Tensor other = X.clone();
  const double third = svd.singular_values()[2].item<double>(),
               second = svd.singular_values()[1].item<double>();
  const at::Tensor fresh =
      std::get<0>(at::linalg_qr(at::cat({svd.directions(), gaussian(1, 8, 9)}).t())).select(1, 3);
  const double strength = std::sqrt(third * second / 50.0);
  other = X.mean(0) + at::cat({at::ones({25, 1}, at::kDouble), -at::ones({25, 1}, at::kDouble)}) *
                          strength * fresh;
  svd.update(other);
  CHECK(svd.settled(2));
  CHECK_FALSE(svd.settled(3));
  CHECK_FALSE(svd.update(rows(2, 8, 3)));  // skipped: what was settled stays so
  CHECK(svd.settled(2));
  CHECK(error_of([&] { svd.settled(4); }) == "[init] count must be in [0, 3]; got 4");
}

TEST_CASE("a flip of the fixed sign counts as a turn, as in PEFT", "[init][eva]") {
  // The direction's two largest entries are of opposite signs and nearly equal: which one leads,
  // and with it the sign, changes from batch to batch.
  const auto batch = [](double first, double second) {
    const at::Tensor direction = at::tensor({first, second}, at::kDouble);
    return at::linspace(-1, 1, 20, at::kDouble).unsqueeze(1) * direction;
  };
  ActivationSvd svd(1, 0.99);
  svd.update(batch(1.0, -0.999));
  const at::Tensor before = svd.directions();
  svd.update(batch(0.99, -1.01));
  CHECK((before * svd.directions()).sum().item<double>() < -0.99);
  CHECK_FALSE(svd.settled(1));
  svd.update(batch(0.99, -1.01));
  CHECK(svd.settled(1));
}

TEST_CASE("a batch with fewer rows than directions is skipped", "[init][eva]") {
  ActivationSvd svd(4, 0.99);
  CHECK_FALSE(svd.update(rows(3, 8, 1)));
  CHECK(svd.rows() == 0);
  CHECK_FALSE(svd.directions().defined());
  CHECK(svd.update(rows(4, 8, 1)));
  const at::Tensor before = svd.directions().clone();
  CHECK_FALSE(svd.update(rows(3, 8, 2)));
  CHECK(svd.rows() == 4);
  CHECK(at::equal(svd.directions(), before));
}

TEST_CASE("equal rows have no direction", "[init][eva]") {
  ActivationSvd svd(2, 0.99);
  svd.update(at::full({5, 4}, 3.0));
  CHECK(largest(svd.singular_values()) == 0.0);
  CHECK(largest(svd.explained_ratio()) == 0.0);
  CHECK(off_orthonormal(svd.directions().t()) < 1e-6);
  CHECK(svd.update(at::zeros({5, 4})));  // of another mean: one direction
  CHECK(std::abs(svd.explained_ratio()[0].item<double>() - 1.0) < 1e-6);
}

TEST_CASE("inputs are not written to, and half precision is taken to fp32", "[init][eva]") {
  const at::Tensor X = rows(20, 6, 1).to(at::kFloat), before = X.clone();
  ActivationSvd svd(2, 0.99), half(2, 0.99);
  svd.update(X);
  CHECK(at::equal(X, before));
  half.update(X.to(at::kBFloat16));
  CHECK(half.directions().scalar_type() == at::kFloat);
  CHECK(relative(projector(half.directions()), projector(svd.directions())) < 0.05);
}

TEST_CASE("inputs that do not fit are refused", "[init][eva]") {
  CHECK(error_of([] { ActivationSvd(0, 0.9); }) == "[init] components must be >= 1; got 0");
  CHECK(error_of([] { ActivationSvd(2, 1.5); }) ==
        "[init] the tolerance is a cosine in (0, 1]; got 1.5");
  ActivationSvd svd(4, 0.99);
  CHECK(error_of([&] { svd.explained_ratio(); }) == "[init] a ratio needs a batch first; got none");
  CHECK(error_of([&] {
          svd.update(at::ones({9, 3}));
        }) == "[init] components must be <= the inputs' width; got 4 for 3");
  CHECK(error_of([&] {
          svd.update(at::ones({2, 3, 4}));
        }) == "[init] inputs must be rows [t, k]; got [2, 3, 4]");
  CHECK(contains(error_of([&] { svd.update(at::ones({9, 5}) / 0); }), "the inputs must be finite"));
  svd.update(rows(9, 5, 1));
  CHECK(error_of([&] { svd.update(rows(9, 6, 1)); }) ==
        "[init] every batch must have the first one's width 5; got 6");
}

TEST_CASE("the largest ratios of all layers share the budget", "[init][eva]") {
  using Ranks = std::vector<int64_t>;
  const std::vector<std::vector<double>> ratios = {{0.5, 0.2, 0.1}, {0.4, 0.3, 0.25}, {0.05}};
  CHECK(allocate_ranks(ratios, 0) == Ranks{0, 0, 0});
  CHECK(allocate_ranks(ratios, 1) == Ranks{1, 0, 0});
  CHECK(allocate_ranks(ratios, 4) == Ranks{1, 3, 0});
  CHECK(allocate_ranks(ratios, 6) == Ranks{3, 3, 0});
  CHECK(allocate_ranks(ratios, 100) == Ranks{3, 3, 1});
  // Of equal ratios the earlier layer's go first.
  CHECK(allocate_ranks({{0.3, 0.1}, {0.3, 0.1}, {0.3, 0.1}}, 2) == Ranks{1, 1, 0});
  CHECK(allocate_ranks({{0.3, 0.3}, {0.3, 0.3}}, 3) == Ranks{2, 1});
  CHECK(allocate_ranks({}, 3).empty());
  CHECK(error_of([] { allocate_ranks({{0.1}}, -1); }) == "[init] the budget must be >= 0; got -1");
  CHECK(error_of([] {
          allocate_ranks({{0.1}, {0.1, 0.2}}, 1);
        }) == "[init] ratios must be finite and descending; got 0.2 at place 1 of layer 1");
  CHECK(contains(error_of([] { allocate_ranks({{std::numeric_limits<double>::quiet_NaN()}}, 1); }),
                 "got nan at place 0 of layer 0"));
}
