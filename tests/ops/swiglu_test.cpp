#include <ATen/ATen.h>
#include <graft/ops/swiglu.h>

#include <cmath>
#include <limits>

#include "tests/ops/gradients.h"

namespace {

using graft::ops::swiglu;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::Tensors;

at::Tensor fused(const Tensors& in) {
  return swiglu(in[0], in[1]);
}
at::Tensor composed(const Tensors& in) {
  return at::silu(in[0]) * in[1];
}

Tensors inputs(at::IntArrayRef shape, at::ScalarType type) {
  at::manual_seed(5);
  return {4 * at::randn(shape, type), at::randn(shape, type)};
}

}  // namespace

TEST_CASE("swiglu has the gradients that central differences give", "[ops][swiglu]") {
  graft::testing::check_differences(fused, inputs({3, 5}, at::kDouble));
}

TEST_CASE("swiglu equals the formula for odd sizes and one element", "[ops][swiglu]") {
  for (const std::vector<int64_t>& shape :
       std::vector<std::vector<int64_t>>{{1}, {1, 31}, {7, 33}, {2, 3, 1537}}) {
    INFO("shape " << at::IntArrayRef(shape));
    graft::testing::check_against(fused, composed, inputs(shape, at::kDouble), 1e-12);
    graft::testing::check_against(fused, composed, inputs(shape, at::kFloat), 1e-5);
  }
}

TEST_CASE("swiglu is exact to a few units in the last place, far from zero too", "[ops][swiglu]") {
  const at::Tensor gate = at::linspace(-120, 120, 100001, at::kFloat);
  const at::Tensor y = swiglu(gate, at::ones_like(gate)).to(at::kDouble);
  const at::Tensor wide = gate.to(at::kDouble);
  const at::Tensor expected = wide * at::sigmoid(wide);
  // Below about -88 the sigmoid is 1 / infinity in float32: zero, like ATen's.
  const at::Tensor error = (y - expected).abs() / expected.abs().clamp_min(1e-30);
  CHECK(error.max().item<double>() < 5e-7);
}

TEST_CASE("swiglu passes infinities and NaN on as the formula does", "[ops][swiglu]") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const at::Tensor gate = at::tensor({inf, -1e30f, nan, 0.0f, 1.0f});
  const at::Tensor y = swiglu(gate, at::tensor({1.0f, 1.0f, 1.0f, 1.0f, nan}));
  CHECK(y[0].item<float>() == inf);
  CHECK(y[1].item<float>() == 0.0f);
  CHECK(std::isnan(y[2].item<float>()));
  CHECK(y[3].item<float>() == 0.0f);
  CHECK(std::isnan(y[4].item<float>()));
}

TEST_CASE("swiglu in bfloat16 and float16 rounds once, from float32", "[ops][swiglu]") {
  const auto type = GENERATE(at::kBFloat16, at::kHalf);
  const Tensors in = inputs({37, 65}, type);
  const Tensors wide = {in[0].to(at::kFloat), in[1].to(at::kFloat)};
  const at::Tensor y = fused(in);
  CHECK(y.scalar_type() == type);
  CHECK(y.ne(composed(wide).to(type)).sum().item<int64_t>() <= 2);
  const at::Tensor seed = graft::testing::seed_like(y);
  const Tensors found = graft::testing::gradients(fused, in, seed);
  const Tensors wanted = graft::testing::gradients(composed, wide, seed.to(at::kFloat));
  for (int i = 0; i < 2; ++i) {
    CHECK(found[i].scalar_type() == type);
    CHECK(graft::testing::largest_difference(found[i], wanted[i]) <
          (type == at::kHalf ? 0.005 : 0.04));
  }
}

TEST_CASE("swiglu reads the halves of one product and any other view", "[ops][swiglu]") {
  at::manual_seed(6);
  const at::Tensor both = at::randn({2, 5, 14}, at::kDouble);
  const at::Tensor transposed = at::randn({7, 5, 2}, at::kDouble).permute({2, 1, 0});
  const std::vector<Tensors> views = {{both.narrow(-1, 0, 7), both.narrow(-1, 7, 7)},
                                      {transposed, both.narrow(-1, 7, 7)}};
  for (const Tensors& view : views) {
    const at::Tensor gate = view[0].detach().set_requires_grad(true);
    const at::Tensor up = view[1].detach().set_requires_grad(true);
    const at::Tensor y = swiglu(gate, up);
    CHECK(graft::testing::largest_difference(y, composed(view)) < 1e-12);
    const at::Tensor seed = graft::testing::seed_like(y);
    y.backward(seed.transpose(0, 2).contiguous().transpose(0, 2));
    const Tensors wanted = graft::testing::gradients(composed, view, seed);
    CHECK(graft::testing::largest_difference(gate.grad(), wanted[0]) < 1e-12);
    CHECK(graft::testing::largest_difference(up.grad(), wanted[1]) < 1e-12);
  }
}

TEST_CASE("swiglu of nothing is empty", "[ops][swiglu]") {
  for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{{0, 5}, {5, 0}}) {
    const Tensors in = {at::empty(shape), at::empty(shape)};
    CHECK(fused(in).sizes() == at::IntArrayRef(shape));
    CHECK(graft::testing::gradients(fused, in)[1].sizes() == at::IntArrayRef(shape));
  }
}

TEST_CASE("swiglu gives the same bits for every number of threads", "[ops][swiglu]") {
  const Tensors in = inputs({101, 1537}, at::kFloat);
  graft::testing::check_threads([&] {
    Tensors all = graft::testing::gradients(fused, in, graft::testing::seed_like(in[0]));
    all.push_back(fused(in));
    return all;
  });
}

TEST_CASE("swiglu refuses bad input and a second derivative in words", "[ops][swiglu]") {
  const at::Tensor x = at::ones({2, 4});
  CHECK(contains(error_of([&] { swiglu(x, at::ones({4, 2})); }), "one shape"));
  CHECK(contains(error_of([&] { swiglu(x, x.to(at::kDouble)); }), "got Float and Double"));
  CHECK(contains(error_of([&] { swiglu(x, {}); }), "up must be defined"));
  CHECK(contains(error_of([&] { swiglu(x.to(at::kInt), x); }), "gate must be float32"));
  CHECK(contains(error_of([&] { swiglu(x.to(at::kHalf), x); }), "got Half and Float"));
  const at::Tensor leaf = x.clone().set_requires_grad(true);
  CHECK(
      contains(graft::testing::double_backward_error(swiglu(leaf, x), leaf), "second derivative"));
}
