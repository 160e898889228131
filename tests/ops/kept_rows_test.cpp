#include <ATen/ATen.h>
#include <graft/ops/dora_linear.h>
#include <graft/ops/lora_linear.h>
#include <graft/ops/rand_lora_linear.h>
#include <graft/ops/rms_norm.h>
#include <graft/ops/sparse_linear.h>
#include <graft/ops/split_rows.h>
#include <graft/ops/swiglu.h>

#include "tests/ops/gradients.h"
#include "tests/support/live_bytes.h"

namespace {

using graft::ops::Dropout;
using graft::ops::lora_linear;
using graft::testing::bytes_kept_by;
using graft::testing::gradients;
using graft::testing::Tensors;

constexpr int64_t kTokens = 40, kIn = 24, kOut = 9, kRank = 3;
const Dropout kDropout{0.3, {5, 6, 7}};

// x, second input (a norm's weight, or an up projection), two layers' A and B, and a weight.
Tensors inputs(at::ScalarType type, bool norm) {
  at::manual_seed(3);
  const std::vector<int64_t> second =
      norm ? std::vector<int64_t>{kIn} : std::vector<int64_t>{2, kTokens / 2, kIn};
  Tensors in = {
      at::randn({2, kTokens / 2, kIn}, at::kDouble), at::randn(second, at::kDouble),
      at::randn({kRank, kIn}, at::kDouble),          at::randn({kOut, kRank}, at::kDouble),
      at::randn({kRank, kIn}, at::kDouble),          at::randn({kOut, kRank}, at::kDouble)};
  for (auto& tensor : in) tensor = tensor.to(type);
  return in;
}

at::Tensor source(const Tensors& in, bool norm) {
  return norm ? graft::ops::rms_norm(in[0], in[1], 1e-5) : graft::ops::swiglu(in[0], in[1]);
}

// Two layers on the same input, as q_proj and k_proj are; `copied`: a copy in between hides from
// the layers what their input came from.
at::Tensor two_layers(const Tensors& in, bool norm, bool copied, const Dropout& dropout) {
  const at::Tensor weight = at::ones({kOut, kIn}, in[0].options().requires_grad(false));
  const at::Tensor made = source(in, norm), x = copied ? made.clone() : made;
  return lora_linear(x, weight, {}, {in[2], in[3], {}, 1.5, dropout}) *
         lora_linear(x, weight, {}, {in[4], in[5], {}, 0.5, dropout});
}

}  // namespace

TEST_CASE("an input that can be made again gives the same gradients, bit for bit", "[ops]") {
  for (const bool norm : {true, false})
    for (const auto type : {at::kDouble, at::kFloat})
      for (const auto& dropout : {Dropout{}, kDropout}) {
        const Tensors in = inputs(type, norm);
        const auto kept =
            gradients([&](const Tensors& t) { return two_layers(t, norm, true, dropout); }, in);
        const auto made_again =
            gradients([&](const Tensors& t) { return two_layers(t, norm, false, dropout); }, in);
        for (size_t i = 0; i < in.size(); ++i) {
          INFO((norm ? "rms_norm" : "swiglu") << ", input " << i);
          CHECK(at::equal(kept[i], made_again[i]));
        }
      }
}

TEST_CASE("a second graph at the same place is not mistaken for the first", "[ops]") {
  Tensors in = inputs(at::kFloat, true);
  const auto f = [](const Tensors& t) { return two_layers(t, true, false, {}); };
  const auto copied = [](const Tensors& t) { return two_layers(t, true, true, {}); };
  for (int round = 0; round < 5; ++round) {
    in[0] = at::randn_like(in[0]);
    const auto a = gradients(f, in), b = gradients(copied, in);
    for (size_t i = 0; i < in.size(); ++i) CHECK(at::equal(a[i], b[i]));
  }
}

TEST_CASE("a layer keeps no input that a norm or a product can make again", "[ops]") {
  const at::Tensor weight = at::ones({kOut, kIn});
  constexpr int64_t kInput = kTokens * kIn * int64_t{sizeof(float)};
  for (const bool norm : {true, false}) {
    Tensors in = inputs(at::kFloat, norm);
    for (auto& tensor : in) tensor.set_requires_grad(true);
    const auto layer = [&](bool copied) {
      const at::Tensor made = source(in, norm);
      return lora_linear(copied ? made.clone() : made, weight, {}, {in[2], in[3], {}, 1.0});
    };
    layer(false);  // whatever is made once
    CHECK(bytes_kept_by([&] { return layer(true); }) -
              bytes_kept_by([&] { return layer(false); }) ==
          kInput);
  }
}

TEST_CASE("a part of an input that can be made again is made again, too", "[ops][split]") {
  for (const bool norm : {true, false}) {
    const Tensors in = inputs(at::kFloat, norm);
    // Two layers, each on one of the batch's two sequences.
    const auto parts = [&](const Tensors& t, bool copied) {
      const at::Tensor weight = at::ones({kOut, kIn});
      const at::Tensor made = source(t, norm), x = copied ? made.clone() : made;
      const auto rows = graft::ops::split_rows(x, {1, 1});
      return at::cat({lora_linear(rows[0], weight, {}, {t[2], t[3], {}, 1.5, kDropout}),
                      lora_linear(rows[1], weight, {}, {t[4], t[5], {}, 0.5, kDropout})});
    };
    const auto kept = gradients([&](const Tensors& t) { return parts(t, true); }, in);
    const auto made_again = gradients([&](const Tensors& t) { return parts(t, false); }, in);
    for (size_t i = 0; i < in.size(); ++i) CHECK(at::equal(kept[i], made_again[i]));
    const Tensors leaves = graft::testing::leaves_of(in);
    CHECK(bytes_kept_by([&] { return parts(leaves, true); }) -
              bytes_kept_by([&] { return parts(leaves, false); }) ==
          kTokens * kIn * int64_t{sizeof(float)});
  }
}

TEST_CASE("parts of a batch: gradients side by side, zeros for a part without one",
          "[ops][split]") {
  const at::Tensor x = at::arange(12, at::kDouble).view({4, 3}).set_requires_grad(true);
  const auto parts = graft::ops::split_rows(x, {1, 3});
  CHECK(at::equal(parts[1], x.narrow(0, 1, 3)));
  parts[1].sum().backward();
  CHECK(at::equal(x.grad().sum(1), at::tensor({0.0, 3.0, 3.0, 3.0}, at::kDouble)));
  CHECK(graft::testing::contains(graft::testing::error_of([&] {
                                   graft::ops::split_rows(x, {1, 2});
                                 }),
                                 "must add up to the rows of x; got 3 for x [4, 3]"));
}

TEST_CASE("an input without a gradient is kept as it is", "[ops]") {
  Tensors in = inputs(at::kFloat, true);
  for (size_t i = 2; i < in.size(); ++i) in[i].set_requires_grad(true);  // as behind an embedding
  const at::Tensor y = two_layers(in, true, false, {});
  y.sum().backward();
  const at::Tensor dA = in[2].grad().clone();
  for (auto& tensor : in) tensor.mutable_grad() = at::Tensor();
  two_layers(in, true, true, {}).sum().backward();
  CHECK(at::equal(in[2].grad(), dA));
}
