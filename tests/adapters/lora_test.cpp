#include <ATen/ATen.h>
#include <graft/adapters/lora.h>
#include <graft/core/random.h>

#include <cmath>

#include "tests/support/gradcheck.h"
#include "tests/support/method_tests.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::adapters::LayerContext;
using graft::adapters::LoraImpl;
using graft::adapters::LoraOptions;
using graft::nn::FrozenConv;
using graft::nn::FrozenEmbedding;
using graft::nn::FrozenLinear;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::make_random;
using graft::testing::random;
using graft::testing::randomise;
using graft::testing::some_linear;

LoraImpl make(const graft::nn::FrozenLayer& base, const LoraOptions& options) {
  return make_random<LoraImpl>(base, options);
}

}  // namespace

TEST_CASE("LoRA on a Linear is W x + b + s (B A x + c)", "[adapters][lora]") {
  const FrozenLinear base = some_linear();
  LoraImpl lora = make(base, {.rank = 2, .alpha = 3, .bias = true});
  const at::Tensor x = random({2, 5, 4});
  const at::Tensor expected =
      at::linear(x, base.weight, base.bias) +
      1.5 * (x.matmul(lora.lora_A.t()).matmul(lora.lora_B.t()) + lora.lora_bias);
  CHECK(distance(lora.forward(base, x), expected) < 1e-13);
  CHECK(distance(at::linear(x, lora.merged_weight(base), lora.merged_bias(base)), expected) <
        1e-13);
}

TEST_CASE("LoRA on an Embedding is W[i] + s (B A)[:, i]", "[adapters][lora]") {
  at::manual_seed(2);
  const FrozenEmbedding base{random({7, 5})};
  LoraImpl lora = make(base, {.rank = 3, .alpha = 6});
  CHECK(lora.lora_A.sizes() == at::IntArrayRef({3, 7}));
  CHECK(lora.lora_B.sizes() == at::IntArrayRef({5, 3}));
  const at::Tensor indices = at::tensor({6, 0, 6, 1, 2, 3}).view({2, 3});
  const at::Tensor dense = base.weight + 2.0 * lora.lora_B.mm(lora.lora_A).t();
  CHECK(distance(lora.forward(base, indices),
                 dense.index_select(0, indices.view(-1)).view({2, 3, 5})) < 1e-13);
  CHECK(distance(lora.merged_weight(base), dense) < 1e-13);
}

TEST_CASE("an Embedding's padding row gets the update and no gradient", "[adapters][lora]") {
  const FrozenEmbedding base{random({4, 5}), /*padding_idx=*/2};
  LoraImpl lora = make(base, {.rank = 1, .alpha = 1});
  const at::Tensor y = lora.forward(base, at::tensor({2, 3}));
  CHECK(distance(y[0], lora.merged_weight(base)[2]) < 1e-13);
  y.sum().backward();
  CHECK(lora.lora_A.grad()[0][2].item<double>() == 0);
  CHECK(lora.lora_A.grad()[0][3].item<double>() != 0);
}

TEST_CASE("LoRA on a convolution is B of one times A with the base's geometry",
          "[adapters][lora]") {
  at::manual_seed(3);
  const FrozenConv base{random({4, 2, 3, 3}), random({4}), {2, 1}, {1, 0}, {1, 2}, 2};
  LoraImpl lora = make(base, {.rank = 2, .alpha = 4, .bias = true});
  CHECK(lora.lora_A.sizes() == at::IntArrayRef({2, 4, 3, 3}));
  CHECK(lora.lora_B.sizes() == at::IntArrayRef({4, 1, 1, 1}));
  const at::Tensor x = random({1, 4, 5, 7});
  const std::vector<int64_t> stride = {2, 1}, padding = {1, 0}, dilation = {1, 2};
  const at::Tensor plain = at::conv2d(x, base.weight, base.bias, stride, padding, dilation, 2);
  const at::Tensor low = at::conv2d(x, lora.lora_A, {}, stride, padding, dilation, 1);
  const at::Tensor up =
      at::convolution(low, lora.lora_B, lora.lora_bias, {1, 1}, {0, 0}, {1, 1}, false, {0, 0}, 2);
  CHECK(distance(lora.forward(base, x), plain + 2.0 * up) < 1e-13);
  CHECK(contains(error_of([&] { lora.merged_weight(base); }),
                 "a convolution with groups cannot be merged; got groups=2 (layer 'q_proj')"));
}

TEST_CASE("rsLoRA with alpha is LoRA with alpha sqrt(r)", "[adapters][lora]") {
  const LoraOptions stable{.rank = 4, .alpha = 3, .rslora = true};
  CHECK(stable.scale() == 1.5);
  CHECK(LoraOptions{.rank = 4, .alpha = 6}.scale() == 1.5);
  CHECK(LoraOptions{.rank = 8, .alpha = 16}.scale() == 2.0);
  const FrozenLinear base = some_linear();
  LoraImpl a = make(base, stable), b = make(base, {.rank = 4, .alpha = 6});
  const at::Tensor x = random({3, 4});
  CHECK(at::equal(a.forward(base, x), b.forward(base, x)));
  CHECK(at::equal(a.delta(), b.delta()));
}

TEST_CASE("LoRA's dropout hits the low-rank branch alone, in training alone", "[adapters][lora]") {
  const FrozenLinear base = some_linear();
  LoraImpl lora = make(base, {.rank = 2, .alpha = 2, .dropout = 0.5});
  const at::Tensor x = random({8, 4});
  const auto expected = [&](uint32_t step) {
    const auto site = static_cast<uint32_t>(graft::random::hash_name("q_proj"));
    const at::Tensor dropped = graft::ops::apply_dropout(x, {0.5, {1, site, step}});
    return at::linear(x, base.weight, base.bias) + dropped.mm(lora.lora_A.t()).mm(lora.lora_B.t());
  };
  CHECK(distance(lora.forward(base, x), expected(0)) < 1e-13);
  CHECK(distance(lora.forward(base, x), expected(1)) < 1e-13);
  CHECK(lora.counters() == std::vector<int64_t>{2});
  lora.eval();
  const at::Tensor plain = lora.forward(base, x);
  CHECK(distance(plain, at::linear(x, lora.merged_weight(base), base.bias)) < 1e-13);
  CHECK(lora.counters() == std::vector<int64_t>{2});
  lora.train();
  lora.set_counters({0});
  CHECK(distance(lora.forward(base, x), expected(0)) < 1e-13);
  CHECK(contains(error_of([&] { lora.set_counters({}); }), "one counter a layer"));
}

TEST_CASE("LoRA's gradients are right under a fixed dropout mask, for each kind of layer",
          "[adapters][lora]") {
  at::manual_seed(4);
  const FrozenConv conv{random({3, 2, 2}), random({3}), {1}, {1}, {1}, 1, {1, 0}, "Reflect"};
  const std::vector<std::pair<graft::nn::FrozenLayer, at::Tensor>> layers = {
      {some_linear(), random({3, 4})}, {conv, random({2, 2, 4})}};
  for (const auto& [base, input] : layers) {
    INFO(graft::nn::kind_name(base));
    LoraImpl lora = make(base, {.rank = 2, .alpha = 3, .dropout = 0.4, .bias = true});
    const at::Tensor x = input.clone().set_requires_grad(true);
    graft::testing::check_leaf_gradients(
        [&] {
          lora.set_counters({7});
          return lora.apply(base, x);
        },
        {{"A", lora.lora_A}, {"B", lora.lora_B}, {"c", lora.lora_bias}, {"x", x}});
  }
}

TEST_CASE("LoRA's dropout on a convolution masks the input", "[adapters][lora]") {
  const FrozenConv base{random({3, 2, 2}), {}, {1}, {1}, {1}};
  LoraImpl lora = make(base, {.rank = 2, .alpha = 2, .dropout = 0.5});
  const at::Tensor x = random({2, 2, 6});
  const auto site = static_cast<uint32_t>(graft::random::hash_name("q_proj"));
  const at::Tensor dropped = graft::ops::apply_dropout(x, {0.5, {1, site, 0}});
  const at::Tensor low = at::conv1d(dropped, lora.lora_A, {}, 1, 1);
  const at::Tensor expected = at::conv1d(x, base.weight, {}, 1, 1) + at::conv1d(low, lora.lora_B);
  CHECK(distance(lora.forward(base, x), expected) < 1e-13);
}

TEST_CASE("a bf16 base gets fp32 factors and a bf16 output", "[adapters][lora]") {
  const FrozenLinear base{at::randn({6, 4}, at::kBFloat16), {}};
  LoraImpl lora = make(base, {.rank = 2});
  CHECK(lora.lora_A.scalar_type() == at::kFloat);
  CHECK(lora.forward(base, at::randn({3, 4}, at::kBFloat16)).scalar_type() == at::kBFloat16);
  const at::Tensor exact = base.weight.to(at::kFloat) + lora.delta();
  CHECK(at::equal(lora.merged_weight(base), exact.to(at::kBFloat16)));
}

TEST_CASE("LoRA's values at the start depend on the layer's name and the seed alone",
          "[adapters][lora]") {
  const FrozenLinear base = some_linear();
  const auto A = [&](const std::string& name, uint64_t seed) {
    return LoraImpl(base, {.rank = 2}, LayerContext{name, seed}).lora_A.detach();
  };
  CHECK(at::equal(A("a", 1), A("a", 1)));
  CHECK_FALSE(at::equal(A("a", 1), A("b", 1)));
  CHECK_FALSE(at::equal(A("a", 1), A("a", 2)));
  LayerContext empty{"a", 1};
  empty.initialise = false;
  const LoraImpl zeros(base, {.rank = 2, .init = "orthogonal"}, empty);
  CHECK(zeros.lora_A.abs().sum().item<double>() == 0);
}

TEST_CASE("LoRA names its tensors as PEFT does", "[adapters][lora]") {
  const auto suffixes = [](const LoraImpl& lora) {
    std::vector<std::string> names;
    for (const auto& tensor : lora.file_tensors()) names.push_back(tensor.suffix);
    return names;
  };
  using Names = std::vector<std::string>;
  CHECK(suffixes(make(some_linear(), {.rank = 2})) == Names{"lora_A.weight", "lora_B.weight"});
  CHECK(suffixes(make(some_linear(), {.rank = 2, .bias = true})) ==
        Names{"lora_A.weight", "lora_B.weight", "lora_B.bias"});
  CHECK(suffixes(make(FrozenEmbedding{random({5, 4})}, {.rank = 2})) ==
        Names{"lora_embedding_A", "lora_embedding_B"});
}

TEST_CASE("LoRA refuses options that make no sense, in words", "[adapters][lora]") {
  const auto refusal = [](const graft::nn::FrozenLayer& base, const LoraOptions& options) {
    return error_of([&] { LoraImpl(base, options, {"layers.3.q_proj", 0}); });
  };
  const graft::nn::FrozenLayer linear = some_linear(6, 4);
  CHECK(refusal(linear, {.rank = 5}) ==
        "[lora] rank must be in [1, min(in, out)]; got rank=5 for in=4, out=6 (layer "
        "'layers.3.q_proj')");
  CHECK(contains(refusal(linear, {.rank = 0}), "[lora] rank must be"));
  CHECK(contains(refusal(linear, {.alpha = 0}), "alpha must be finite and not 0"));
  CHECK(contains(refusal(linear, {.alpha = std::nan("")}), "alpha must be finite"));
  CHECK(contains(refusal(linear, {.rank = 2, .dropout = 1}), "dropout must be in [0, 1)"));
  CHECK(contains(refusal(linear, {.rank = 2, .init = "zeros"}),
                 "initialiser must be one of kaiming, gaussian, orthogonal, random, "));
  const FrozenEmbedding embedding{random({5, 4})};
  CHECK(contains(refusal(embedding, {.rank = 2, .dropout = 0.1}), "an Embedding takes no dropout"));
  CHECK(contains(refusal(embedding, {.rank = 2, .bias = true}), "an Embedding takes no lora bias"));
  const FrozenConv grouped{random({4, 2, 3}), {}, {1}, {0}, {1}, 2};
  CHECK(contains(refusal(grouped, {.rank = 3}), "multiple of the convolution's groups"));
  const FrozenLinear whole{at::ones({4, 4}, at::kLong), {}};
  CHECK(contains(refusal(whole, {.rank = 2}), "the base weight must be floating point"));
  const FrozenLinear no_bias{random({4, 4}), {}};
  CHECK(contains(error_of([&] { make(no_bias, {.rank = 2, .bias = true}).merged_bias(no_bias); }),
                 "only be merged into a layer that has a bias"));
}

TEST_CASE("a folder of PEFT's finds PiSSA's start by the whole decomposition", "[adapters][lora]") {
  const auto whole = [](const LoraOptions& options) {
    return graft::adapters::found_again_as_peft(graft::adapters::make_recipe(options))
        ->start_plan()
        .options.whole_svd;
  };
  CHECK(whole({.init = "pissa"}));
  CHECK_FALSE(whole({.init = "olora"}));
  CHECK_FALSE(whole({}));
}
