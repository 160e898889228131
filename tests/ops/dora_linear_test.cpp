#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <graft/ops/dora_linear.h>
#include <graft/ops/frozen_product.h>

#include "tests/ops/gradients.h"
#include "tests/support/live_bytes.h"

namespace {

using graft::ops::dora_linear;
using graft::ops::dora_norm;
using graft::ops::Dropout;
using graft::ops::row_squares;
using graft::testing::check_against;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;
using graft::testing::LiveBytes;
using graft::testing::Tensors;

constexpr double kScale = 1.7;
const Dropout kDropout{0.4, {5, 6, 7}};

enum Which { kX, kWeight, kBias, kA, kB, kM };

// x [tokens, in], weight [out, in], bias [out], A [r, in], B [out, r], m [out]
Tensors inputs(at::IntArrayRef x_shape, int64_t out, int64_t rank, at::ScalarType type) {
  at::manual_seed(7);
  const int64_t in = x_shape.back();
  return {at::randn(x_shape, type),    at::randn({out, in}, type),   at::randn({out}, type),
          at::randn({rank, in}, type), at::randn({out, rank}, type), at::rand({out}, type) + 0.5};
}

at::Tensor literal_norm(const Tensors& t) {
  return (t[kWeight] + kScale * t[kB].mm(t[kA])).norm(2, 1).detach();
}

at::Tensor norm_of(const Tensors& t) {
  return dora_norm(t[kWeight], row_squares(t[kWeight]), t[kA], t[kB], kScale);
}

at::Tensor fused(const Tensors& t, const Dropout& dropout = {}, bool on_base = false) {
  return dora_linear(t[kX], t[kWeight], t[kBias],
                     {t[kA], t[kB], t[kM], norm_of(t), kScale, dropout, on_base});
}

// The formula as it is written down, gradients by autograd.
at::Tensor literal(const Tensors& t, const Dropout& dropout = {}, bool on_base = false) {
  const at::Tensor c = t[kM] / literal_norm(t), dropped = graft::ops::dropout(t[kX], dropout);
  const at::Tensor low = kScale * at::linear(at::linear(dropped, t[kA]), t[kB]);
  if (on_base) {
    return at::linear(t[kX], t[kWeight], t[kBias]) + (c - 1) * at::linear(dropped, t[kWeight]) +
           c * low;
  }
  return c * (at::linear(t[kX], t[kWeight]) + low) + t[kBias];
}

}  // namespace

TEST_CASE("dora_linear equals the formula with a constant norm, value and every gradient",
          "[ops][dora]") {
  for (const bool on_base : {false, true}) {
    for (const auto& dropout : {Dropout{}, kDropout}) {
      const auto f = [&](const Tensors& t) { return fused(t, dropout, on_base); };
      const auto plain = [&](const Tensors& t) { return literal(t, dropout, on_base); };
      for (const auto& [shape, out, rank] : {std::tuple(std::vector<int64_t>{7, 5}, 6, 2),
                                             {{2, 3, 9}, 4, 4},
                                             {{4}, 3, 1},
                                             {{150, 5}, 7, 3},
                                             {{130, 9}, 1100, 7}}) {
        INFO("x " << at::IntArrayRef(shape) << ", p " << dropout.p << ", on base " << on_base);
        check_against(f, plain, inputs(shape, out, rank, at::kDouble), 2e-12);
        check_against(f, plain, inputs(shape, out, rank, at::kFloat), 2e-4);
      }
    }
  }
}

TEST_CASE("dora_linear has the gradients that central differences give at a fixed norm",
          "[ops][dora]") {
  const Tensors in = inputs({3, 4}, 5, 2, at::kDouble);
  const at::Tensor norm = norm_of(in);
  for (const bool on_base : {false, true}) {
    graft::testing::check_differences(
        [&](const Tensors& t) {
          return dora_linear(t[kX], t[kWeight], t[kBias],
                             {t[kA], t[kB], t[kM], norm, kScale, kDropout, on_base});
        },
        in);
  }
}

TEST_CASE("dora_linear works without a bias", "[ops][dora]") {
  Tensors in = inputs({3, 4}, 5, 2, at::kDouble);
  const Tensors zero_bias = {in[kX], in[kWeight], at::zeros({5}, at::kDouble),
                             in[kA], in[kB],      in[kM]};
  in[kBias] = at::Tensor();
  const at::Tensor y = fused(in);
  CHECK(largest_difference(y, literal(zero_bias)) < 1e-13);
  in[kM].set_requires_grad(true);
  fused(in).sum().backward();
  const at::Tensor found = in[kM].grad().clone();
  in[kM].mutable_grad().zero_();
  literal(zero_bias).sum().backward();
  CHECK(largest_difference(found, in[kM].grad()) < 1e-12);
}

TEST_CASE("dora_linear starts as the base, bit for bit, under every form of dropout",
          "[ops][dora]") {
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    Tensors in = inputs({33, 600}, 70, 4, type == at::kDouble ? type : at::kFloat);
    in[kB].zero_();
    in[kM] = norm_of(in);
    for (const size_t base : {kX, kWeight, kBias}) in[base] = in[base].to(type);
    in[kM] = norm_of(in);
    const at::Tensor expected = graft::ops::frozen_linear(in[kX], in[kWeight], in[kBias]);
    CHECK(at::equal(fused(in), expected));
    CHECK(at::equal(fused(in, kDropout), expected));
    CHECK(at::equal(fused(in, kDropout, true), expected));
  }
}

TEST_CASE("dora_norm equals the norm of the dense sum", "[ops][dora]") {
  const Tensors wide = inputs({1, 40}, 30, 8, at::kDouble);
  CHECK(largest_difference(norm_of(wide), literal_norm(wide)) < 1e-12);
  Tensors single = inputs({1, 40}, 30, 8, at::kFloat);
  const at::Tensor norm = norm_of(single);
  CHECK(norm.scalar_type() == at::kFloat);
  CHECK(((norm - literal_norm(single)) / norm).abs().max().item<double>() < 1e-6);
  single[kWeight] = single[kWeight].to(at::kBFloat16);
  const at::Tensor half = norm_of(single);
  CHECK(half.scalar_type() == at::kFloat);
  single[kWeight] = single[kWeight].to(at::kFloat);
  CHECK(at::equal(half, norm_of(single)));
  // A transposed weight, as an Embedding's is.
  single[kWeight] = single[kWeight].t().contiguous().t();
  CHECK(largest_difference(half, norm_of(single)) < 1e-5);
}

TEST_CASE("dora_norm keeps its digits where B A cancels the weight", "[ops][dora]") {
  Tensors in = inputs({1, 40}, 6, 3, at::kFloat);
  at::Tensor delta = kScale * in[kB].mm(in[kA]);
  const at::Tensor rest = 1e-3 * at::randn({6, 40});
  in[kWeight] = rest - delta;
  in[kWeight][0] = 5 * in[kWeight][0];  // one ordinary row
  const at::Tensor expected = literal_norm(in);
  CHECK(((norm_of(in) - expected) / expected).abs().max().item<double>() < 1e-3);

  in[kB] = at::ones({6, 1});
  in[kA] = at::ones({1, 40});
  in[kWeight] = at::full({6, 40}, -kScale, at::kFloat);
  CHECK(norm_of(in).abs().max().item<double>() == 0.0);
}

TEST_CASE("row_squares sums in fp64 whatever the size", "[ops][dora]") {
  const at::Tensor weight = at::full({3, 1 << 20}, 0.1f);
  const double expected = double{0.1f} * double{0.1f} * (1 << 20);
  CHECK(largest_difference(row_squares(weight) / expected, at::ones({3}, at::kDouble)) < 1e-12);
  CHECK(row_squares(at::empty({2, 0})).abs().sum().item<double>() == 0.0);
  CHECK(contains(error_of([] {
                   row_squares(at::ones({2, 2}, at::kLong));
                 }),
                 "[dora] a weight must be a floating-point matrix"));
}

TEST_CASE("a row of zeros gives the bias, no NaN, and can begin to learn", "[ops][dora]") {
  for (const auto& [dropout, on_base] :
       {std::pair(Dropout{}, false), {kDropout, false}, {kDropout, true}}) {
    Tensors in = inputs({6, 5}, 4, 2, at::kFloat);
    in[kWeight][2].zero_();
    in[kB].zero_();
    in[kM] = norm_of(in);
    CHECK(in[kM][2].item<double>() == 0.0);
    for (const size_t trained : {kX, kA, kB, kM})
      in[trained] = in[trained].detach().clone().set_requires_grad(true);
    const at::Tensor y = fused(in, dropout, on_base);
    CHECK(at::equal(y.select(1, 2), in[kBias][2].expand({6})));
    y.backward(graft::testing::seed_like(y));
    for (const size_t trained : {kX, kA, kB, kM})
      CHECK(at::isfinite(in[trained].grad()).all().item<bool>());
    CHECK(in[kM].grad()[2].item<double>() == 0.0);
    CHECK(in[kB].grad()[2].abs().min().item<double>() > 0.0);
  }
}

TEST_CASE("the magnitude's gradient is right where the magnitude is 0, tiny or negative",
          "[ops][dora]") {
  for (const auto type : {at::kDouble, at::kFloat}) {
    Tensors in = inputs({9, 5}, 6, 2, type);
    in[kBias] *= 50;
    in[kM][1] = 0;
    in[kM][3] = 1e-7;
    in[kM][4] = -1.5;
    check_against([](const Tensors& t) { return fused(t); },
                  [](const Tensors& t) { return literal(t); }, in,
                  type == at::kDouble ? 1e-11 : 1e-3);
  }
}

TEST_CASE("a frozen base gets no gradient from dora_linear", "[ops][dora]") {
  Tensors in = inputs({3, 4}, 5, 2, at::kFloat);
  for (const size_t trained : {kA, kB, kM}) in[trained].set_requires_grad(true);
  fused(in).sum().backward();
  for (const size_t frozen : {kX, kWeight, kBias}) CHECK_FALSE(in[frozen].grad().defined());
  for (const size_t trained : {kA, kB, kM}) CHECK(in[trained].grad().defined());
}

TEST_CASE("dora_linear's result may be changed in place, and walked back twice", "[ops][dora]") {
  Tensors in = inputs({2, 3, 4}, 5, 2, at::kDouble);
  in[kM].set_requires_grad(true);
  const auto gradient = [&](const at::Tensor& y, bool keep = false) {
    in[kM].mutable_grad() = at::Tensor();
    y.sum().backward({}, keep);
    return in[kM].grad().clone();
  };
  const at::Tensor expected = gradient(literal(in));
  at::Tensor y = fused(in);
  CHECK(largest_difference(gradient(y, true), expected) < 1e-12);
  CHECK(largest_difference(gradient(y), expected) < 1e-12);
  y = fused(in);
  y += at::ones({5}, at::kDouble);
  CHECK(largest_difference(gradient(y), expected) < 1e-12);
  y = fused(in);
  y.view({6, 5}).mul_(2);
  CHECK(largest_difference(gradient(y), 2 * expected) < 1e-12);
}

TEST_CASE("dora_linear keeps x, y and the rank-wide product alone for backward", "[ops][dora]") {
  constexpr int64_t kTokens = 64, kIn = 32, kOut = 48, kRank = 4;
  Tensors in = inputs({kTokens, kIn}, kOut, kRank, at::kFloat);
  for (const size_t trained : {kX, kA, kB, kM}) in[trained].set_requires_grad(true);
  const at::Tensor norm = norm_of(in);
  const auto run = [&](const Dropout& dropout) {
    return dora_linear(in[kX], in[kWeight], in[kBias],
                       {in[kA], in[kB], in[kM], norm, kScale, dropout});
  };
  run(kDropout);  // whatever is made once
  for (const auto& dropout : {Dropout{}, kDropout}) {
    const auto bytes = std::make_shared<LiveBytes>();
    {
      at::Tensor y;
      {
        const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, bytes);
        y = run(dropout);
      }
      // x is a reference to the caller's; what is new and alive is the output and S.
      CHECK(bytes->count == int64_t{sizeof(float)} * kTokens * (kOut + kRank));
      const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, bytes);
    }
  }
}

TEST_CASE("dora_linear's output is freed with its last user", "[ops][dora]") {
  Tensors in = inputs({4, 3}, 5, 2, at::kFloat);
  in[kM].set_requires_grad(true);
  c10::weak_intrusive_ptr<c10::StorageImpl> memory = [&] {
    const at::Tensor y = fused(in);
    return y.storage().getWeakStorageImpl();
  }();
  CHECK(memory.expired());
  at::Tensor y = fused(in);
  memory = y.storage().getWeakStorageImpl();
  const at::Tensor loss = y.sum();
  y = at::Tensor();
  CHECK_FALSE(memory.expired());
  loss.backward();
  CHECK(memory.expired());  // while the graph still exists
}

TEST_CASE("a bf16 base keeps its type while the rest of DoRA runs in fp32", "[ops][dora]") {
  Tensors in = inputs({6, 16}, 8, 2, at::kFloat);
  for (const size_t base : {kX, kWeight, kBias}) in[base] = in[base].to(at::kBFloat16);
  for (const size_t trained : {kX, kA, kB, kM}) in[trained].set_requires_grad(true);
  const at::Tensor y = fused(in, kDropout);
  CHECK(y.scalar_type() == at::kBFloat16);
  y.sum().backward();
  Tensors wide;
  for (const auto& tensor : in) {
    wide.push_back(tensor.detach().to(at::kDouble));
    wide.back().set_requires_grad(true);
  }
  const at::Tensor expected = literal(wide, kDropout);
  expected.sum().backward();
  const double unit = 1.0 / 64;  // some roundings to bf16
  CHECK(largest_difference(y, expected) < unit * expected.abs().max().item<double>());
  for (const size_t trained : {kX, kA, kB, kM}) {
    CHECK(in[trained].grad().scalar_type() == in[trained].scalar_type());
    CHECK(largest_difference(in[trained].grad(), wide[trained].grad()) <
          unit * wide[trained].grad().abs().max().item<double>());
  }
}

TEST_CASE("dora_linear takes no tokens and inputs that are not contiguous", "[ops][dora]") {
  for (const bool on_base : {false, true}) {
    Tensors in = inputs({0, 4}, 5, 2, at::kFloat);
    for (auto& tensor : in) tensor.set_requires_grad(true);
    const at::Tensor y = fused(in, kDropout, on_base);
    CHECK(y.sizes() == at::IntArrayRef({0, 5}));
    y.sum().backward();
    CHECK(in[kX].grad().sizes() == at::IntArrayRef({0, 4}));
    for (const size_t trained : {kWeight, kBias, kA, kB, kM})
      CHECK(in[trained].grad().abs().sum().item<double>() == 0);
  }
  const Tensors dense = inputs({2, 3, 4}, 5, 2, at::kDouble);
  Tensors strided = dense;
  strided[kX] = dense[kX].transpose(0, 1).contiguous().transpose(0, 1);
  strided[kWeight] = dense[kWeight].t().contiguous().t();
  CHECK(largest_difference(fused(strided, kDropout), fused(dense, kDropout)) < 1e-13);
}

TEST_CASE("dora_linear gives the same bits on any number of threads", "[ops][dora]") {
  graft::testing::check_threads([] {
    Tensors in = inputs({300, 8}, 16, 2, at::kFloat);
    in[kM].set_requires_grad(true);
    const at::Tensor y = fused(in, kDropout);
    y.backward(graft::testing::seed_like(y));
    return Tensors{y.detach(), in[kM].grad()};
  });
}

TEST_CASE("dora_linear runs in inference mode", "[ops][dora]") {
  Tensors in = inputs({3, 4}, 5, 2, at::kDouble);
  in[kM].set_requires_grad(true);
  const at::Tensor expected = fused(in).detach();
  const c10::InferenceMode inference;
  CHECK(at::equal(fused(in), expected));
}

TEST_CASE("dora_linear refuses shapes that do not fit and second derivatives", "[ops][dora]") {
  Tensors in = inputs({3, 4}, 5, 2, at::kDouble);
  const at::Tensor norm = norm_of(in);
  const auto with = [&](size_t which, const at::Tensor& tensor, const at::Tensor& n) {
    Tensors t = in;
    t[which] = tensor;
    return error_of([&] { dora_linear(t[kX], t[kWeight], t[kBias], {t[kA], t[kB], t[kM], n}); });
  };
  CHECK(contains(with(kX, at::ones({3, 5}), norm), "[dora] the input's last dimension must match"));
  CHECK(contains(with(kA, at::ones({2, 5}), norm), "A must be [r, in] and B [out, r]"));
  CHECK(contains(with(kB, at::ones({5, 3}), norm), "A must be [r, in] and B [out, r]"));
  CHECK(contains(with(kM, at::ones({4}), norm),
                 "the magnitude must hold one number an output: [5]; got [4]"));
  CHECK(contains(with(kM, {}, norm), "the magnitude must hold one number an output"));
  CHECK(contains(with(kM, in[kM], at::ones({5, 1})), "the norm must hold one number an output"));
  CHECK(contains(error_of([&] { fused(in, Dropout{1.5, {}}); }), "[dora] dropout must be in"));
  CHECK(contains(error_of([&] { dora_norm(in[kWeight], at::ones({4}), in[kA], in[kB], 1.0); }),
                 "the row squares must hold one number an output: [5]"));
  in[kX].set_requires_grad(true);
  CHECK(contains(graft::testing::double_backward_error(fused(in), in[kX]),
                 "[dora] a second derivative"));
}
