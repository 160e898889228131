#include <ATen/ATen.h>
#include <graft/train/clip_grad.h>

#include <cmath>
#include <limits>

#include "tests/ops/gradients.h"

namespace {

using graft::testing::contains;
using graft::testing::error_of;
using graft::train::clip_scale;
using graft::train::grad_norm;

at::Tensor with_gradient(const at::Tensor& gradient) {
  at::Tensor parameter = at::zeros_like(gradient).set_requires_grad(true);
  parameter.mutable_grad() = gradient;
  return parameter;
}

}  // namespace

TEST_CASE("grad_norm is the norm over all gradients, in every dtype and layout",
          "[train][clip_grad]") {
  at::manual_seed(20);
  const std::vector<at::Tensor> gradients = {
      at::randn({40000}),    at::randn({3, 5}, at::kDouble),    at::randn({7, 9}).to(at::kBFloat16),
      at::randn({5, 6}).t(), at::randn({5, 8}).narrow(1, 2, 3), at::randn({31}).to(at::kHalf)};
  std::vector<at::Tensor> parameters = {at::zeros({3}).set_requires_grad(true)};  // no gradient
  double squares = 0;
  for (const at::Tensor& gradient : gradients) {
    parameters.push_back(at::zeros_like(gradient).set_requires_grad(true));
    parameters.back().mutable_grad() = gradient;
    squares += gradient.to(at::kDouble).pow(2).sum().item<double>();
  }
  CHECK(std::abs(grad_norm(parameters) / std::sqrt(squares) - 1) < 1e-12);
  CHECK(grad_norm({}) == 0.0);
}

TEST_CASE("grad_norm does not overflow where float32 squares would", "[train][clip_grad]") {
  CHECK(std::abs(grad_norm({with_gradient(at::full({4}, 1e30f))}) / 2e30 - 1) < 1e-6);
}

TEST_CASE("grad_norm gives the same bits for every number of threads", "[train][clip_grad]") {
  at::manual_seed(21);
  const std::vector<at::Tensor> parameters = {with_gradient(at::randn({300001})),
                                              with_gradient(at::randn({77}))};
  graft::testing::check_threads([&] {
    return graft::testing::Tensors{at::scalar_tensor(grad_norm(parameters), at::kDouble)};
  });
}

TEST_CASE("grad_norm is not finite when one gradient is not", "[train][clip_grad]") {
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity(), -std::nanf("")}) {
    at::Tensor gradient = at::ones({20000});
    gradient[19999] = bad;
    const double norm = grad_norm({with_gradient(at::ones({3})), with_gradient(gradient)});
    CHECK_FALSE(std::isfinite(norm));
    CHECK(contains(error_of([&] { clip_scale(norm, 1.0); }), "the norm must be finite"));
  }
}

TEST_CASE("clip_scale shrinks long gradients only", "[train][clip_grad]") {
  CHECK(clip_scale(0.5, 1.0) == 1.0);
  CHECK(clip_scale(0.0, 1.0) == 1.0);
  CHECK(std::abs(clip_scale(4.0, 1.0) - 1.0 / (4.0 + 1e-6)) < 1e-15);
  CHECK(contains(error_of([] { clip_scale(1.0, 0.0); }), "max_norm must be > 0"));
}

TEST_CASE("grad_norm refuses gradients it cannot read", "[train][clip_grad]") {
  CHECK(contains(error_of([] { grad_norm({with_gradient(at::ones({2}).to(at::kComplexFloat))}); }),
                 "must be float32, float64, bfloat16 or float16; got ComplexFloat"));
}
