#include <ATen/ATen.h>
#include <graft/ops/frozen_product.h>

#include "tests/ops/gradients.h"

namespace {

using graft::ops::frozen_linear;
using graft::ops::frozen_product;
using graft::ops::frozen_product_backward;
using graft::ops::ProductLibrary;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;

// Chooses a library for one test and puts the choice back.
class WithLibrary {
 public:
  explicit WithLibrary(ProductLibrary library) : previous_(graft::ops::product_library()) {
    graft::ops::set_product_library(library);
  }
  ~WithLibrary() { graft::ops::set_product_library(previous_); }

 private:
  ProductLibrary previous_;
};

// Those that this machine has.
std::vector<ProductLibrary> libraries() {
  std::vector<ProductLibrary> found;
  const WithLibrary restored(graft::ops::product_library());
  for (const auto library : {ProductLibrary::mkl, ProductLibrary::onednn, ProductLibrary::graft}) {
    try {
      graft::ops::set_product_library(library);
      found.push_back(library);
    } catch (const graft::Error&) {
    }
  }
  return found;
}

double relative(const at::Tensor& a, const at::Tensor& b) {
  return largest_difference(a, b) / b.abs().max().item<double>();
}

}  // namespace

TEST_CASE("every library gives the products, their gradients and the low-rank term",
          "[ops][products]") {
  at::manual_seed(1);
  // Whole and broken tiles of 6 rows and 16 columns, whole and broken blocks of the depth.
  for (const auto& [m, k, n] : {std::tuple(1, 300, 400),
                                {65, 127, 65},
                                {130, 64, 257},
                                {33, 643, 16},
                                {96, 320, 96},
                                {200, 40, 31},
                                {37, 8, 1000}}) {
    const at::Tensor x = at::randn({m, k}), weight = at::randn({n, k}), bias = at::randn({n});
    const at::Tensor dy = at::randn({m, n});
    for (const auto library : libraries()) {
      const WithLibrary chosen(library);
      const at::Tensor wide = x.to(at::kDouble), wide_weight = weight.to(at::kDouble);
      CHECK(relative(frozen_product(x, weight), wide.mm(wide_weight.t())) < 1e-5);
      CHECK(relative(frozen_product(x, weight, bias), wide.mm(wide_weight.t()) + bias) < 1e-5);
      const at::Tensor wide_dx = dy.to(at::kDouble).mm(wide_weight);
      CHECK(relative(frozen_product_backward(dy, weight), wide_dx) < 1e-5);
      for (const int64_t rank : {1, 8, 400}) {
        const at::Tensor left = at::randn({m, rank}), B = at::randn({n, rank}),
                         A = at::randn({rank, k});
        const at::Tensor up = left.to(at::kDouble).mm(B.t().to(at::kDouble)),
                         down = left.to(at::kDouble).mm(A.to(at::kDouble));
        CHECK(relative(frozen_product(x, weight, bias, {left, B.t()}),
                       wide.mm(wide_weight.t()) + bias + up) < 1e-5);
        CHECK(relative(frozen_product_backward(dy, weight, {left, A}), wide_dx + down) < 1e-5);
      }
    }
  }
}

TEST_CASE("products of other types and of small or empty matrices are served", "[ops][products]") {
  at::manual_seed(2);
  for (const auto library : libraries()) {
    const WithLibrary chosen(library);
    const at::Tensor x = at::randn({70, 40}, at::kDouble), w = at::randn({50, 40}, at::kDouble);
    CHECK(at::equal(frozen_product(x, w), x.mm(w.t())));
    CHECK(frozen_product(x.to(at::kFloat), w).scalar_type() == at::kFloat);
    const at::Tensor half = x.to(at::kBFloat16);
    CHECK(frozen_product(half, w.to(at::kBFloat16)).scalar_type() == at::kBFloat16);
    CHECK(frozen_product(x.slice(0, 0, 0), w).sizes() == at::IntArrayRef({0, 50}));
    CHECK(frozen_product_backward(at::zeros({0, 50}), w).sizes() == at::IntArrayRef({0, 40}));
    CHECK(frozen_product(at::ones({2, 0}), at::ones({3, 0})).abs().sum().item<double>() == 0);
    const at::Tensor strided = at::randn({300, 128}).t(), weight = at::randn({64, 300});
    CHECK(relative(frozen_product(strided, weight), strided.mm(weight.t())) < 1e-5);
  }
}

TEST_CASE("graft's product gives the same bits for any number of threads", "[ops][products]") {
  const auto all = libraries();
  if (std::find(all.begin(), all.end(), ProductLibrary::graft) == all.end()) return;
  const WithLibrary chosen(ProductLibrary::graft);
  at::manual_seed(4);
  const at::Tensor x = at::randn({100, 700}), weight = at::randn({333, 700}),
                   bias = at::randn({333}), left = at::randn({100, 3}), right = at::randn({3, 333});
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const at::Tensor alone = frozen_product(x, weight, bias, {left, right});
  for (const int count : {2, 3, 7}) {
    at::set_num_threads(count);
    CHECK(at::equal(frozen_product(x, weight, bias, {left, right}), alone));
  }
  at::set_num_threads(threads);
}

TEST_CASE("a low-rank term that does not fit is refused", "[ops][products]") {
  const at::Tensor x = at::ones({4, 5}), weight = at::ones({3, 5});
  const auto refusal = [&](const at::Tensor& left, const at::Tensor& right) {
    return error_of([&] { frozen_product(x, weight, {}, {left, right}); });
  };
  CHECK(contains(refusal(at::ones({3, 2}), at::ones({2, 3})), "a term must be [4, r] and [r, 3]"));
  CHECK(contains(refusal(at::ones({4, 2}), at::ones({1, 3})), "a term must be [4, r] and [r, 3]"));
  CHECK(contains(refusal(at::ones({4, 2}), at::ones({2, 5})), "a term must be [4, r] and [r, 3]"));
}

TEST_CASE("a set library is the one in use, and says so", "[ops][products]") {
  {
    const WithLibrary chosen(ProductLibrary::mkl);
    CHECK(graft::ops::product_library() == ProductLibrary::mkl);
    CHECK(graft::ops::describe_product_library() == "mkl (set by the program)");
  }
  const WithLibrary chosen(ProductLibrary::onednn);
  CHECK(graft::ops::product_library() == ProductLibrary::onednn);
  CHECK(graft::ops::describe_product_library() == "onednn (set by the program)");
}

TEST_CASE("a library is known by name and nothing else is taken for one", "[ops][products]") {
  CHECK(graft::ops::parse_product_library("mkl") == ProductLibrary::mkl);
  CHECK(graft::ops::parse_product_library("onednn") == ProductLibrary::onednn);
  CHECK(graft::ops::parse_product_library("graft") == ProductLibrary::graft);
  for (const char* name : {"", "MKL", "openblas"})
    CHECK(error_of([&] { graft::ops::parse_product_library(name); }) ==
          std::string("[products] library must be mkl, onednn or graft; got '") + name + "'");
}

TEST_CASE("frozen_linear is differentiable in x alone", "[ops][products]") {
  at::manual_seed(3);
  const at::Tensor weight = at::randn({4, 6}, at::kDouble), bias = at::randn({4}, at::kDouble);
  const at::Tensor x = at::randn({2, 3, 6}, at::kDouble);
  const auto f = [&](const graft::testing::Tensors& in) {
    return frozen_linear(in[0], weight, bias);
  };
  CHECK(largest_difference(f({x}), at::linear(x, weight, bias)) < 1e-13);
  graft::testing::check_differences(f, {x});
  const at::Tensor vector = at::randn({6}, at::kDouble);
  CHECK(largest_difference(frozen_linear(vector, weight), weight.mv(vector)) < 1e-13);
}

TEST_CASE("frozen_linear's result may be changed in place", "[ops][products]") {
  const at::Tensor x = at::ones({2, 3}).set_requires_grad(true);
  at::Tensor y = frozen_linear(x, at::ones({2, 3}));
  y.add_(1.0).sum().backward();
  CHECK(at::equal(x.grad(), at::full({2, 3}, 2.0)));
}

TEST_CASE("products of shapes that do not fit are refused", "[ops][products]") {
  CHECK(contains(error_of([] {
                   frozen_product(at::ones({2, 3}), at::ones({4, 5}));
                 }),
                 "[products] x [m, k] and weight [n, k] must agree in k"));
  CHECK(contains(error_of([] {
                   frozen_product_backward(at::ones({2, 3}), at::ones({4, 3}));
                 }),
                 "must agree in n"));
  CHECK(contains(error_of([] {
                   frozen_linear(at::ones({2, 3}), at::ones({4, 5}));
                 }),
                 "last dimension must be 5"));
}

TEST_CASE("thin products of strided operands equal the plain product", "[ops][products]") {
  at::manual_seed(3);
  for (const auto type : {at::kFloat, at::kDouble}) {
    const at::Tensor x = at::randn({300, 40}, type), y = at::randn({300, 24}, type),
                     a = at::randn({5, 40}, type);
    const auto difference = [](const at::Tensor& got, const at::Tensor& expected) {
      return ((got - expected).abs().max() / expected.abs().max()).item<double>();
    };
    CHECK(difference(graft::ops::thin_product(x, a), x.mm(a.t())) < 1e-5);
    CHECK(difference(graft::ops::thin_product(x.t(), y.t()), x.t().mm(y)) < 1e-5);
    CHECK(difference(graft::ops::thin_product(y, y.narrow(0, 0, 7)), y.mm(y.narrow(0, 0, 7).t())) <
          1e-5);
  }
}
