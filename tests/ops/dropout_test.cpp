#include <ATen/ATen.h>
#include <graft/core/philox.h>
#include <graft/ops/dropout.h>

#include <cmath>

#include "tests/ops/gradients.h"

namespace {

using graft::ops::add_dropped_;
using graft::ops::apply_dropout;
using graft::ops::Dropout;
using graft::testing::contains;
using graft::testing::error_of;

// One element's mask, straight from the definition.
bool kept(const Dropout& dropout, int64_t row, int64_t column) {
  const auto word =
      graft::philox4x32({static_cast<uint32_t>(column / 8), static_cast<uint32_t>(row),
                         dropout.key.site, dropout.key.step},
                        dropout.key.seed);
  const uint32_t words[4] = {word.x, word.y, word.z, word.w};
  const int64_t half = column % 8;
  return (words[half / 2] >> (16 * (half % 2)) & 0xffff) >= dropout.threshold();
}

at::Tensor expected_mask(const Dropout& dropout, int64_t rows, int64_t columns) {
  at::Tensor mask = at::zeros({rows, columns}, at::kDouble);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      if (kept(dropout, i, j)) mask[i][j] = dropout.scale();
  return mask;
}

const Dropout kDropout{0.3, {0x123456789abcdef0, 77, 5}};

}  // namespace

TEST_CASE("the mask is philox at the element's position, for every width", "[ops][dropout]") {
  for (const int64_t columns : {1, 7, 8, 9, 127, 128, 129, 300}) {
    INFO("columns " << columns);
    const at::Tensor expected = expected_mask(kDropout, 3, columns);
    for (const auto type : {at::kFloat, at::kDouble}) {
      const at::Tensor y = apply_dropout(at::ones({3, columns}, type), kDropout);
      CHECK(at::equal(y, expected.to(type)));
    }
  }
}

TEST_CASE("an element whose bits equal the threshold is kept", "[ops][dropout]") {
  const auto word =
      graft::philox4x32({0, 0, kDropout.key.site, kDropout.key.step}, kDropout.key.seed);
  const uint32_t bits = word.x & 0xffff;
  for (const auto& [threshold, kept] : {std::pair(bits, true), std::pair(bits + 1, false)}) {
    const Dropout dropout{threshold / 65536.0, kDropout.key};
    REQUIRE(dropout.threshold() == threshold);
    CHECK((apply_dropout(at::ones({1, 1}), dropout).item<float>() != 0) == kept);
  }
}

TEST_CASE("each part of the key changes the mask", "[ops][dropout]") {
  const at::Tensor x = at::ones({4, 64});
  const at::Tensor y = apply_dropout(x, kDropout);
  Dropout seed = kDropout, high = kDropout, site = kDropout, step = kDropout;
  seed.key.seed ^= 1;
  high.key.seed ^= uint64_t{1} << 40;
  site.key.site += 1;
  step.key.step += 1;
  for (const auto& other : {seed, high, site, step})
    CHECK_FALSE(at::equal(y, apply_dropout(x, other)));
  CHECK(at::equal(y, apply_dropout(x, kDropout)));
}

TEST_CASE("the mask drops the asked share and keeps the mean", "[ops][dropout]") {
  for (const double p : {0.05, 0.5, 0.9}) {
    const Dropout dropout{p, {11, 1, 0}};
    const at::Tensor y = apply_dropout(at::ones({1000, 200}, at::kDouble), dropout);
    const double dropped = y.eq(0).to(at::kDouble).mean().item<double>();
    CHECK(std::abs(dropped - p) < 5 * std::sqrt(p * (1 - p) / 200000));
    CHECK(std::abs(y.mean().item<double>() - 1) < 5 * std::sqrt(p / (1 - p) / 200000));
    // No row or column is special.
    CHECK(y.eq(0).to(at::kDouble).mean(0).sub(p).abs().max().item<double>() < 0.08);
    CHECK(y.eq(0).to(at::kDouble).mean(1).sub(p).abs().max().item<double>() < 0.2);
  }
}

TEST_CASE("threshold and scale belong together to the last bit", "[ops][dropout]") {
  for (const double p : {0.1, 1.0 / 3, 0.999}) {
    const Dropout dropout{p, {}};
    CHECK(std::abs(dropout.threshold() / 65536.0 - p) <= 0.5 / 65536);
    CHECK(dropout.scale() * (65536.0 - dropout.threshold()) == 65536.0);
  }
  CHECK_FALSE(Dropout{}.active());
}

TEST_CASE("dropout's backward applies the forward's mask", "[ops][dropout]") {
  at::manual_seed(1);
  graft::testing::check_differences(
      [](const graft::testing::Tensors& in) { return graft::ops::dropout(in[0], kDropout); },
      {at::randn({3, 5, 11}, at::kDouble)});
}

TEST_CASE("add_dropped_ adds what apply_dropout returns", "[ops][dropout]") {
  at::manual_seed(2);
  for (const auto type : {at::kFloat, at::kDouble}) {
    const at::Tensor x = at::randn({5, 33}, type), target = at::randn({5, 33}, type);
    at::Tensor sum = target.clone();
    add_dropped_(sum, x, kDropout);
    CHECK(graft::testing::largest_difference(sum, target + apply_dropout(x, kDropout)) < 1e-6);
  }
}

TEST_CASE("the mask does not depend on the number of threads", "[ops][dropout]") {
  at::manual_seed(3);
  const at::Tensor x = at::randn({513, 130}), base = at::randn({513, 130});
  graft::testing::check_threads([&] {
    at::Tensor sum = base.clone();
    add_dropped_(sum, x, kDropout);
    return graft::testing::Tensors{apply_dropout(x, kDropout), sum};
  });
}

TEST_CASE("dropout serves other shapes and types of input", "[ops][dropout]") {
  at::manual_seed(4);
  const at::Tensor x = at::randn({2, 3, 16});
  const at::Tensor y = apply_dropout(x, kDropout);
  CHECK(at::equal(y.view({6, 16}), apply_dropout(x.view({6, 16}), kDropout)));
  const at::Tensor strided = x.transpose(0, 1).contiguous().transpose(0, 1);
  CHECK(at::equal(y, apply_dropout(strided, kDropout)));
  const at::Tensor half = apply_dropout(x.to(at::kBFloat16), kDropout);
  CHECK(half.scalar_type() == at::kBFloat16);
  CHECK(at::equal(half.eq(0), y.eq(0)));
  CHECK(apply_dropout(at::ones({0, 4}), kDropout).sizes() == at::IntArrayRef({0, 4}));
  CHECK(apply_dropout(at::ones({}), kDropout).dim() == 0);
  CHECK(apply_dropout(x, Dropout{}).is_same(x));
}

TEST_CASE("dropout outside [0, 1) and unlike tensors are refused", "[ops][dropout]") {
  for (const double p : {-0.1, 1.0, 0.999999, std::nan("")}) {
    INFO("p " << p);
    CHECK(contains(error_of([&] { graft::ops::check_dropout(p, "lora", "layer 'q'"); }),
                   "[lora] dropout must be in [0, 1); got "));
    CHECK(contains(error_of([&] { apply_dropout(at::ones({2, 2}), {p, {}}); }), "[dropout]"));
  }
  at::Tensor target = at::zeros({2, 3});
  CHECK(contains(error_of([&] { add_dropped_(target, at::ones({3, 2}), kDropout); }), "alike"));
  CHECK(contains(error_of([&] {
                   add_dropped_(target, at::ones({2, 3}, at::kDouble), kDropout);
                 }),
                 "alike"));
}
