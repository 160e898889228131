#include <ATen/ATen.h>
#include <graft/ops/rms_norm.h>

#include "tests/ops/gradients.h"

namespace {

using graft::ops::rms_norm;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::Tensors;

// The formula in ATen operations, in Hugging Face's order.
at::Tensor plain(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const auto compute = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor wide = x.to(compute);
  const at::Tensor mean = wide.pow(2).mean(-1, /*keepdim=*/true);
  return (wide * at::rsqrt(mean + eps)).to(x.scalar_type()) * weight.to(x.scalar_type());
}

Tensors inputs(at::IntArrayRef shape, at::ScalarType type) {
  at::manual_seed(3);
  return {at::randn(shape, type), 1 + 0.3 * at::randn({shape.back()}, type)};
}

at::Tensor fused(const Tensors& in) {
  return rms_norm(in[0], in[1], 1e-5);
}
at::Tensor composed(const Tensors& in) {
  return plain(in[0], in[1], 1e-5);
}

}  // namespace

TEST_CASE("rms_norm has the gradients that central differences give", "[ops][rms_norm]") {
  graft::testing::check_differences(fused, inputs({3, 7}, at::kDouble));
}

TEST_CASE("rms_norm equals the formula for odd sizes, one row and several dimensions",
          "[ops][rms_norm]") {
  for (const std::vector<int64_t>& shape :
       std::vector<std::vector<int64_t>>{{1, 1}, {1, 17}, {5, 33}, {2, 3, 576}, {9}}) {
    INFO("shape " << at::IntArrayRef(shape));
    graft::testing::check_against(fused, composed, inputs(shape, at::kDouble), 1e-12);
    graft::testing::check_against(fused, composed, inputs(shape, at::kFloat), 1e-5);
  }
}

TEST_CASE("rms_norm in bfloat16 and float16 rounds where Hugging Face rounds", "[ops][rms_norm]") {
  const auto type = GENERATE(at::kBFloat16, at::kHalf);
  const Tensors in = inputs({40, 96}, type);
  const at::Tensor y = fused(in);
  CHECK(y.scalar_type() == type);
  // Sums in another order may move a value across a rounding boundary, but hardly ever.
  CHECK(y.ne(composed(in)).sum().item<int64_t>() <= 4);

  const at::Tensor seed = graft::testing::seed_like(y);
  const Tensors found = graft::testing::gradients(fused, in, seed);
  const Tensors wanted = graft::testing::gradients(
      composed, {in[0].to(at::kDouble), in[1].to(at::kDouble)}, seed.to(at::kDouble));
  CHECK(found[0].scalar_type() == type);
  CHECK(graft::testing::largest_difference(found[0], wanted[0]) < 0.02);
  CHECK(graft::testing::largest_difference(found[1], wanted[1]) < 0.1);
}

TEST_CASE("rms_norm reads strided rows in place and any other view", "[ops][rms_norm]") {
  at::manual_seed(4);
  const at::Tensor weight = at::rand({6}, at::kDouble);
  const at::Tensor wide = at::randn({5, 4, 12}, at::kDouble);
  for (const at::Tensor& x : Tensors{wide.narrow(-1, 3, 6), wide.narrow(2, 0, 6).transpose(0, 1),
                                     at::randn({6, 5}, at::kDouble).t()}) {
    const at::Tensor leaf = x.detach().set_requires_grad(true);
    const at::Tensor y = rms_norm(leaf, weight, 1e-6);
    CHECK(y.is_contiguous());
    CHECK(graft::testing::largest_difference(y, plain(x, weight, 1e-6)) < 1e-12);
    const at::Tensor seed = graft::testing::seed_like(y);
    y.backward(seed.transpose(0, 1).contiguous().transpose(0, 1));
    const Tensors wanted = graft::testing::gradients(
        [&](const Tensors& in) { return plain(in[0], weight, 1e-6); }, {x}, seed);
    CHECK(graft::testing::largest_difference(leaf.grad(), wanted[0]) < 1e-12);
  }
}

TEST_CASE("rms_norm of no rows is empty and its gradients are zero", "[ops][rms_norm]") {
  const Tensors in = {at::empty({0, 5}), at::ones({5})};
  CHECK(fused(in).sizes() == at::IntArrayRef({0, 5}));
  const Tensors found = graft::testing::gradients(fused, in);
  CHECK(found[0].sizes() == at::IntArrayRef({0, 5}));
  CHECK(at::equal(found[1], at::zeros({5})));
}

TEST_CASE("rms_norm computes a gradient for the weight only when it is wanted", "[ops][rms_norm]") {
  const Tensors in = inputs({4, 8}, at::kFloat);
  const at::Tensor x = in[0].set_requires_grad(true);
  fused({x, in[1]}).sum().backward();
  CHECK(x.grad().defined());
  CHECK_FALSE(in[1].grad().defined());

  const at::Tensor weight = in[1].clone().set_requires_grad(true);
  const at::Tensor frozen = in[0].detach();
  fused({frozen, weight}).sum().backward();
  CHECK(weight.grad().defined());
  CHECK_FALSE(frozen.grad().defined());
}

TEST_CASE("rms_norm takes a weight of another dtype and answers in its dtype", "[ops][rms_norm]") {
  const Tensors in = inputs({4, 8}, at::kFloat);
  const at::Tensor weight = in[1].to(at::kBFloat16);
  const at::Tensor y = rms_norm(in[0], weight, 1e-5);
  CHECK(y.scalar_type() == at::kFloat);
  CHECK(graft::testing::largest_difference(y, plain(in[0], weight, 1e-5)) < 1e-5);
  const Tensors found = graft::testing::gradients(fused, {in[0], weight});
  CHECK(found[1].scalar_type() == at::kBFloat16);
}

TEST_CASE("rms_norm gives the same bits for every number of threads", "[ops][rms_norm]") {
  const Tensors in = inputs({301, 577}, at::kFloat);
  graft::testing::check_threads([&] {
    Tensors all = graft::testing::gradients(fused, in, graft::testing::seed_like(in[0]));
    all.push_back(fused(in));
    return all;
  });
}

TEST_CASE("rms_norm refuses bad input and a second derivative in words", "[ops][rms_norm]") {
  const at::Tensor x = at::ones({2, 4}), weight = at::ones({4});
  CHECK(contains(error_of([&] { rms_norm(x, at::ones({5}), 1e-5); }), "weight [n]"));
  CHECK(contains(error_of([&] { rms_norm(at::ones({2, 0}), at::ones({0}), 1e-5); }), "n >= 1"));
  CHECK(contains(error_of([&] { rms_norm(at::ones({}), weight, 1e-5); }), "x must be [..., n]"));
  CHECK(contains(error_of([&] { rms_norm(x, weight, -1.0); }), "eps must be >= 0; got -1"));
  CHECK(contains(error_of([&] { rms_norm(x.to(at::kLong), weight, 1e-5); }), "got Long"));
  CHECK(contains(error_of([&] { rms_norm({}, weight, 1e-5); }), "x must be defined"));
  const at::Tensor leaf = x.clone().set_requires_grad(true);
  CHECK(contains(graft::testing::double_backward_error(rms_norm(leaf, weight, 1e-5), leaf),
                 "second derivative"));
}
