#include <ATen/ATen.h>
#include <graft/ops/frozen_product.h>
#include <graft/ops/lora_linear.h>

#include "tests/ops/gradients.h"
#include "tests/support/live_bytes.h"

namespace {

using graft::ops::Dropout;
using graft::ops::lora_linear;
using graft::ops::LoraTerm;
using graft::testing::check_differences;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;
using graft::testing::LiveBytes;
using graft::testing::Tensors;

constexpr double kScale = 1.7;
const Dropout kDropout{0.4, {5, 6, 7}};

// x [tokens, in], weight [out, in], bias [out], A [r, in], B [out, r], c [out]
Tensors inputs(at::IntArrayRef x_shape, int64_t out, int64_t rank, at::ScalarType type) {
  at::manual_seed(7);
  const int64_t in = x_shape.back();
  return {at::randn(x_shape, type),    at::randn({out, in}, type),   at::randn({out}, type),
          at::randn({rank, in}, type), at::randn({out, rank}, type), at::randn({out}, type)};
}

at::Tensor fused(const Tensors& in, const Dropout& dropout = {}) {
  return lora_linear(in[0], in[1], in[2], {in[3], in[4], in[5], kScale, dropout});
}

at::Tensor composed(const Tensors& in, const Dropout& dropout = {}) {
  const at::Tensor branch = at::linear(graft::ops::dropout(in[0], dropout), in[3]);
  return at::linear(in[0], in[1], in[2]) + kScale * (at::linear(branch, in[4]) + in[5]);
}

}  // namespace

TEST_CASE("lora_linear equals the composed formula, value and every gradient", "[ops][lora]") {
  for (const auto& dropout : {Dropout{}, kDropout}) {
    const auto f = [&](const Tensors& in) { return fused(in, dropout); };
    const auto plain = [&](const Tensors& in) { return composed(in, dropout); };
    for (const auto& [shape, out, rank] :
         {std::tuple(std::vector<int64_t>{7, 5}, 6, 2), {{2, 3, 9}, 4, 4}, {{4}, 3, 1}}) {
      INFO("x " << at::IntArrayRef(shape) << ", p " << dropout.p);
      graft::testing::check_against(f, plain, inputs(shape, out, rank, at::kDouble), 1e-12);
      graft::testing::check_against(f, plain, inputs(shape, out, rank, at::kFloat), 2e-5);
    }
  }
}

TEST_CASE("lora_linear has the gradients that central differences give", "[ops][lora]") {
  const Tensors in = inputs({3, 4}, 5, 2, at::kDouble);
  check_differences([](const Tensors& t) { return fused(t); }, in);
  check_differences([](const Tensors& t) { return fused(t, kDropout); }, in);
}

TEST_CASE("lora_linear with a gate and output factors equals the composed formula", "[ops][lora]") {
  for (const auto& dropout : {Dropout{}, kDropout}) {
    // x, weight, A, B, gate, factor
    Tensors in = inputs({7, 5}, 6, 3, at::kDouble);
    in = {in[0], in[1], in[3], in[4], at::randn({3}, at::kDouble), in[5]};
    const auto f = [&](const Tensors& t) {
      return lora_linear(t[0], t[1], {}, {t[2], t[3], {}, kScale, dropout, t[4], t[5]});
    };
    const auto plain = [&](const Tensors& t) {
      const at::Tensor hidden = at::linear(graft::ops::dropout(t[0], dropout), t[2]) * t[4];
      return at::linear(t[0], t[1]) + kScale * at::linear(hidden, t[3]) * t[5];
    };
    graft::testing::check_against(f, plain, in, 1e-12);
    check_differences(f, in);
  }
}

TEST_CASE("lora_linear keeps no x when A is frozen", "[ops][lora]") {
  Tensors in = inputs({64, 32}, 8, 4, at::kFloat);
  in[4].set_requires_grad(true);
  const at::Tensor x = in[0].clone();
  const auto references = x.use_count();
  in[0] = x;
  const at::Tensor y = fused(in);
  CHECK(x.use_count() == references + 1);  // the list's own
  y.sum().backward();
  CHECK(in[4].grad().defined());
  CHECK_FALSE(in[3].grad().defined());
}

TEST_CASE("lora_linear works without either bias", "[ops][lora]") {
  const Tensors all = inputs({3, 4}, 5, 2, at::kDouble);
  const auto f = [](const Tensors& t) {
    return lora_linear(t[0], t[1], {}, {t[2], t[3], {}, kScale});
  };
  const auto plain = [](const Tensors& t) {
    return at::linear(t[0], t[1]) + kScale * at::linear(at::linear(t[0], t[2]), t[3]);
  };
  graft::testing::check_against(f, plain, {all[0], all[1], all[3], all[4]}, 1e-12);
}

TEST_CASE("a frozen base gets no gradient from lora_linear", "[ops][lora]") {
  Tensors in = inputs({3, 4}, 5, 2, at::kFloat);
  for (const size_t trained : {3, 4}) in[trained].set_requires_grad(true);
  fused(in).sum().backward();
  for (const size_t frozen : {0, 1, 2, 5}) CHECK_FALSE(in[frozen].grad().defined());
  CHECK(in[3].grad().defined());
  CHECK(in[4].grad().defined());
}

TEST_CASE("a bf16 base keeps its type while the low-rank part runs in fp32", "[ops][lora]") {
  Tensors in = inputs({6, 16}, 8, 2, at::kFloat);
  for (const size_t base : {0, 1, 2}) in[base] = in[base].to(at::kBFloat16);
  in[0].set_requires_grad(true);
  for (const size_t trained : {3, 4, 5}) in[trained].set_requires_grad(true);
  const at::Tensor y = fused(in, kDropout);
  CHECK(y.scalar_type() == at::kBFloat16);
  y.backward(at::ones_like(y));
  CHECK(in[0].grad().scalar_type() == at::kBFloat16);

  Tensors wide;
  for (const auto& tensor : in) {
    wide.push_back(tensor.detach().to(at::kDouble));
    wide.back().set_requires_grad(true);
  }
  const at::Tensor expected = composed(wide, kDropout);
  expected.sum().backward();
  const double unit = 1.0 / 128;  // two roundings to bf16
  CHECK(largest_difference(y, expected) < unit * expected.abs().max().item<double>());
  for (const size_t trained : {3, 4, 5}) {
    CHECK(in[trained].grad().scalar_type() == at::kFloat);
    CHECK(largest_difference(in[trained].grad(), wide[trained].grad()) <
          1e-4 * wide[trained].grad().abs().max().item<double>());
  }
  CHECK(largest_difference(in[0].grad(), wide[0].grad()) <
        unit * wide[0].grad().abs().max().item<double>());
}

TEST_CASE("lora_linear takes no tokens and inputs that are not contiguous", "[ops][lora]") {
  Tensors in = inputs({0, 4}, 5, 2, at::kFloat);
  for (auto& tensor : in) tensor.set_requires_grad(true);
  const at::Tensor y = fused(in, kDropout);
  CHECK(y.sizes() == at::IntArrayRef({0, 5}));
  y.sum().backward();
  CHECK(in[0].grad().sizes() == at::IntArrayRef({0, 4}));
  for (const size_t trained : {1, 2, 3, 4, 5})
    CHECK(in[trained].grad().abs().sum().item<double>() == 0);

  const Tensors dense = inputs({2, 3, 4}, 5, 2, at::kDouble);
  Tensors strided = dense;
  strided[0] = dense[0].transpose(0, 1).contiguous().transpose(0, 1);
  strided[1] = dense[1].t().contiguous().t();
  CHECK(largest_difference(fused(strided, kDropout), fused(dense, kDropout)) < 1e-13);
}

TEST_CASE("lora_linear's result may be changed in place", "[ops][lora]") {
  Tensors in = inputs({2, 3, 4}, 5, 2, at::kDouble);
  in[3].set_requires_grad(true);
  fused(in).sum().backward();
  const at::Tensor expected = in[3].grad().clone();
  in[3].mutable_grad().zero_();
  at::Tensor y = fused(in);
  y += at::ones({5}, at::kDouble);
  y.sum().backward();
  CHECK(largest_difference(in[3].grad(), expected) < 1e-12);
}

TEST_CASE("lora_linear keeps x and the rank-wide product alone for backward", "[ops][lora]") {
  constexpr int64_t kTokens = 64, kIn = 32, kOut = 48, kRank = 4;
  Tensors in = inputs({kTokens, kIn}, kOut, kRank, at::kFloat);
  for (const size_t trained : {0, 3, 4}) in[trained].set_requires_grad(true);
  fused(in, kDropout);  // whatever is made once
  for (const auto& dropout : {Dropout{}, kDropout}) {
    const auto bytes = std::make_shared<LiveBytes>();
    at::Tensor y;
    {
      const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, bytes);
      y = fused(in, dropout);
    }
    // x is a reference to the caller's; what is new and alive is the output and S.
    CHECK(bytes->count == int64_t{sizeof(float)} * kTokens * (kOut + kRank));
  }
}

TEST_CASE("lora_linear refuses shapes that do not fit", "[ops][lora]") {
  const Tensors in = inputs({3, 4}, 5, 2, at::kFloat);
  const auto with = [&](size_t which, const at::Tensor& tensor) {
    Tensors changed = in;
    changed[which] = tensor;
    return error_of([&] { fused(changed); });
  };
  CHECK(contains(with(0, at::ones({3, 5})), "[lora] the input's last dimension must match"));
  CHECK(contains(with(3, at::ones({2, 5})), "A must be [r, in] and B [out, r]"));
  CHECK(contains(with(4, at::ones({4, 2})), "A must be [r, in] and B [out, r]"));
  CHECK(contains(with(4, at::ones({5, 3})), "A must be [r, in] and B [out, r]"));
  CHECK(contains(error_of([&] { fused(in, Dropout{1.5, {}}); }), "[lora] dropout must be in"));
  const auto gated = [&](const at::Tensor& gate, const at::Tensor& factor) {
    return error_of([&] {
      lora_linear(in[0], in[1], {}, {in[3], in[4], {}, 1.0, {}, gate, factor});
    });
  };
  CHECK(contains(gated(at::ones({3}), {}), "gate must hold one number a hidden unit: [2]"));
  CHECK(contains(gated({}, at::ones({4})), "factor must hold one number an output: [5]"));
}

TEST_CASE("a second derivative is refused, not silently wrong", "[ops][lora]") {
  Tensors in = inputs({3, 5}, 4, 2, at::kDouble);
  in[0].set_requires_grad(true);
  CHECK(contains(graft::testing::double_backward_error(fused(in), in[0]),
                 "[lora] a second derivative"));
  CHECK(contains(
      graft::testing::double_backward_error(graft::ops::frozen_linear(in[0], in[1]), in[0]),
      "[products] a second derivative"));
  CHECK(contains(graft::testing::double_backward_error(graft::ops::dropout(in[0], kDropout), in[0]),
                 "[dropout] a second derivative"));
}
