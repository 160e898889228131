#include <graft/adapters/dora.h>
#include <graft/ops/dora_linear.h>

#include "tests/io/file_helpers.h"
#include "tests/support/adapter_kit.h"
#include "tests/support/method_tests.h"

namespace {

using graft::adapters::DoraImpl;
using graft::adapters::DoraOptions;
using graft::adapters::LayerContext;
using graft::nn::FrozenConv;
using graft::nn::FrozenEmbedding;
using graft::nn::FrozenLayer;
using graft::nn::FrozenLinear;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::make_random;
using graft::testing::MethodCase;
using graft::testing::random;
using graft::testing::randomise;
using graft::testing::some_linear;
using graft::testing::uneven_sum;

std::shared_ptr<DoraImpl> make(const FrozenLayer& base, const DoraOptions& options) {
  auto dora = std::make_shared<DoraImpl>(base, options, LayerContext{"q_proj", 1});
  randomise({dora->lora_A, dora->lora_B});
  const at::NoGradGuard no_grad;
  dora->lora_magnitude_vector.mul_(at::rand_like(dora->lora_magnitude_vector) + 0.5);
  return dora;
}

FrozenConv some_conv() {
  at::manual_seed(2);
  return {random({6, 3, 2, 3}), random({6}), {2, 1}, {1, 0}, {1, 1}, 1, {1, 1, 0, 0}, "Reflect"};
}

FrozenConv grouped_conv() {
  at::manual_seed(3);
  return {random({6, 2, 3}), random({6}), {1}, {1}, {1}, 2};
}

FrozenEmbedding some_embedding() {
  at::manual_seed(4);
  return {random({7, 5})};
}

// V with its outputs first, with gradients to A and B.
at::Tensor literal_rows(const FrozenLayer& base, const DoraImpl& dora) {
  const int64_t rank = dora.lora_A.size(0);
  const at::Tensor delta =
      dora.lora_B.reshape({-1, rank}).mm(dora.lora_A.reshape({rank, -1})) * dora.scale;
  const at::Tensor weight = graft::nn::weight_of(base);
  const bool transposed = std::holds_alternative<FrozenEmbedding>(base);
  return (transposed ? weight.t() : weight).reshape(delta.sizes()) + delta;
}

// The method as it is written down, through dense weights; gradients by autograd.
at::Tensor literal(const FrozenLayer& base, const DoraImpl& dora, const at::Tensor& x,
                   const graft::ops::Dropout& mask, bool on_base) {
  const at::Tensor V = literal_rows(base, dora);
  const at::Tensor c = dora.lora_magnitude_vector.view(-1) / V.norm(2, 1).detach();
  if (std::holds_alternative<FrozenEmbedding>(base))
    return FrozenEmbedding{(V * c.unsqueeze(1)).t()}.apply(x);
  const at::Tensor weight = graft::nn::weight_of(base), bias = graft::nn::bias_of(base);
  const at::Tensor dropped = graft::ops::dropout(x, mask);
  const auto run = [&](const at::Tensor& input, const at::Tensor& kernel, const at::Tensor& b) {
    if (const auto* conv = std::get_if<FrozenConv>(&base))
      return conv->convolve(conv->padded(input), kernel.reshape(weight.sizes()), b, 1);
    return at::linear(input, kernel, b);
  };
  const at::Tensor scaled = V * c.unsqueeze(1), W = weight.reshape(V.sizes());
  if (on_base) return run(x, W, bias) + run(dropped, scaled - W, {});
  return run(x, W * c.unsqueeze(1), bias) + run(dropped, scaled - W * c.unsqueeze(1), {});
}

MethodCase dora_case(DoraOptions options) {
  MethodCase dora;
  dora.method = "dora";
  dora.exact_gradients = false;  // central differences see the norm move
  dora.recipe = [options](int64_t rank) mutable {
    options.rank = rank;
    return graft::adapters::make_recipe(options);
  };
  // LoRA's r (in + out), the kernel's elements counted as inputs, and a length for each output.
  dora.count = [](const FrozenLayer& layer, int64_t rank) {
    const at::Tensor& weight = graft::nn::weight_of(layer);
    if (std::holds_alternative<FrozenEmbedding>(layer))
      return rank * (weight.size(0) + weight.size(1)) + weight.size(1);
    const auto* conv = std::get_if<FrozenConv>(&layer);
    const int64_t groups = conv == nullptr ? 1 : conv->groups;
    return rank * (weight.numel() / weight.size(0) * groups) + weight.size(0) * (rank / groups) +
           weight.size(0);
  };
  dora.zero_at_first = [](const std::string& kind) {
    return std::vector<std::string>{kind == "Embedding" ? "lora_B" : "lora_A"};
  };
  return dora;
}

}  // namespace

TEST_CASE("DoRA keeps the promises of adapters on every kind of layer", "[adapters][dora]") {
  graft::testing::run_adapter_kit(dora_case({.alpha = 3.0}));
}

TEST_CASE("DoRA's output and gradients are those of the formula with a constant norm",
          "[adapters][dora]") {
  const std::vector<std::pair<FrozenLayer, at::Tensor>> layers = {
      {some_linear(), random({2, 5, 4})},
      {some_conv(), random({2, 3, 4, 5})},
      {some_conv(), random({3, 4, 5})},
      {some_embedding(), at::tensor({6, 0, 1, 6, 2, 3}).view({2, 3})}};
  for (const auto& [base, input] : layers) {
    const bool embedding = std::holds_alternative<FrozenEmbedding>(base);
    for (const double p : embedding ? std::vector{0.0} : std::vector{0.0, 0.4}) {
      for (const bool on_base : {false, true}) {
        INFO(graft::nn::kind_name(base) << ", dropout " << p << ", on base " << on_base);
        auto dora = make(base, {.rank = 2, .alpha = 3, .dropout = p, .dropout_on_base = on_base});
        at::Tensor x = input.clone();
        std::vector<at::Tensor> leaves = dora->parameters();
        if (!embedding) leaves.push_back(x.set_requires_grad(true));
        const auto site = static_cast<uint32_t>(graft::random::hash_name("q_proj"));
        const at::Tensor found = dora->apply(base, x);
        const at::Tensor expected = literal(base, *dora, x, {p, {1, site, 0}}, on_base);
        CHECK(distance(found, expected) < 1e-13);
        const auto gradients = torch::autograd::grad({uneven_sum(found)}, leaves);
        const auto wanted = torch::autograd::grad({uneven_sum(expected)}, leaves);
        for (size_t i = 0; i < leaves.size(); ++i) CHECK(distance(gradients[i], wanted[i]) < 1e-12);
        dora->eval();
        CHECK(distance(dora->apply(base, x), literal(base, *dora, x, {}, on_base)) < 1e-13);
        CHECK(dora->counters() == std::vector<int64_t>{p > 0 ? 1 : 0});
      }
    }
  }
}

TEST_CASE("a convolution with groups has the norm of its dense kernel", "[adapters][dora]") {
  const FrozenConv base = grouped_conv();
  auto dora = make(base, {.rank = 4, .alpha = 6});
  const at::Tensor x = random({2, 4, 5});
  // The dense kernel by feeding one channel and place at a time.
  const at::Tensor impulses = at::eye(12, at::kDouble).view({12, 4, 3});
  FrozenConv plain = base;
  plain.padding = {0};
  plain.bias = at::Tensor();
  const at::Tensor hidden = at::conv1d(impulses, dora->lora_A);
  const at::Tensor up =
      at::convolution(hidden, dora->lora_B, std::nullopt, {1}, {0}, {1}, false, {0}, 2);
  const at::Tensor rows = (plain.apply(impulses) + 1.5 * up).squeeze(2).t().detach();
  CHECK(distance(dora->norm(base), rows.norm(2, 1)) < 1e-12);
  const at::Tensor c = dora->lora_magnitude_vector.detach() / rows.norm(2, 1).view({1, 6, 1});
  const at::Tensor dense = at::conv1d(x, rows.view({6, 4, 3}), std::nullopt, 1, 1);
  CHECK(distance(dora->forward(base, x), c * dense + base.bias.view({1, 6, 1})) < 1e-12);
  CHECK(contains(error_of([&] { dora->merged_weight(base); }),
                 "[dora] a convolution with groups cannot be merged; got groups=2"));
}

TEST_CASE("merged rows have the trained lengths and the direction of W + s B A",
          "[adapters][dora]") {
  for (const FrozenLayer& base :
       std::vector<FrozenLayer>{some_linear(), some_conv(), some_embedding()}) {
    INFO(graft::nn::kind_name(base));
    auto dora = make(base, {.rank = 2, .alpha = 3});
    const at::Tensor merged = dora->merged_weight(base), V = literal_rows(base, *dora).detach();
    const bool transposed = std::holds_alternative<FrozenEmbedding>(base);
    const at::Tensor rows = (transposed ? merged.t() : merged).reshape(V.sizes());
    CHECK(distance(rows.norm(2, 1), dora->lora_magnitude_vector.view(-1)) < 1e-13);
    CHECK(distance(rows / rows.norm(2, 1, true), V / V.norm(2, 1, true)) < 1e-13);
  }
}

TEST_CASE("a layer with rows of zeros starts as the base and learns without NaN",
          "[adapters][dora]") {
  for (FrozenLayer base :
       std::vector<FrozenLayer>{some_linear(), some_conv(), grouped_conv(), some_embedding()}) {
    INFO(graft::nn::kind_name(base));
    const bool embedding = std::holds_alternative<FrozenEmbedding>(base);
    graft::nn::weight_of(base).select(embedding ? 1 : 0, 2).zero_();
    DoraImpl dora(base, {.rank = 2}, {"q_proj", 1});
    const at::Tensor x =
        embedding ? at::tensor({0, 3, 6, 2})
        : std::holds_alternative<FrozenLinear>(base)
            ? random({3, 4})
            : random(graft::nn::weight_of(base).dim() == 3 ? std::vector<int64_t>{2, 4, 5}
                                                           : std::vector<int64_t>{2, 3, 4, 5});
    CHECK(at::equal(dora.apply(base, x), graft::nn::apply(base, x)));
    for (int step = 0; step < 3; ++step) {
      uneven_sum(dora.apply(base, x)).backward();
      const at::NoGradGuard no_grad;
      for (at::Tensor parameter : dora.parameters()) {
        REQUIRE(at::isfinite(parameter.grad()).all().item<bool>());
        parameter.sub_(parameter.grad(), 0.05);
        parameter.mutable_grad() = at::Tensor();
      }
    }
    CHECK(dora.norm(base)[2].item<double>() > 0.0);
    CHECK(dora.lora_magnitude_vector.view(-1)[2].item<double>() != 0.0);
    CHECK(at::isfinite(dora.apply(base, x)).all().item<bool>());
  }
}

TEST_CASE("the norm follows changes of W, A and B, and is computed once between them",
          "[adapters][dora]") {
  FrozenLinear base = some_linear();
  auto dora = make(base, {.rank = 2, .alpha = 3});
  const auto check = [&] {
    CHECK(distance(dora->norm(base), literal_rows(base, *dora).norm(2, 1)) < 1e-13);
  };
  check();
  const at::Tensor kept = dora->norm(base);
  const at::Tensor x = random({3, 4});
  dora->forward(base, x).sum().backward();
  CHECK(dora->norm(base).is_same(kept));
  {
    const at::NoGradGuard no_grad;
    dora->lora_magnitude_vector.mul_(2);
    CHECK(dora->norm(base).is_same(kept));  // does not depend on m
    for (at::Tensor tensor : {dora->lora_A, dora->lora_B, base.weight}) {
      tensor.mul_(1.5);
      CHECK_FALSE(dora->norm(base).is_same(kept));
      check();
      tensor.view(-1)[0].fill_(4.0);
      check();
    }
  }
  base.weight = random({6, 4});  // another tensor of the same version
  check();
  base.weight.set_data(random({6, 4}));  // another memory under the same tensor
  check();
  base.weight.set_data(random({6, 4}));  // perhaps where the one before the last was
  check();
  const c10::InferenceMode inference;
  base.weight = random({6, 4});  // has no version: never kept
  check();
  base.weight.mul_(2);
  check();
}

TEST_CASE("a norm first asked for in inference mode serves training", "[adapters][dora]") {
  const FrozenLinear base = some_linear();
  auto dora = make(base, {.rank = 2});
  const at::Tensor x = random({3, 4});
  {
    const c10::InferenceMode inference;
    dora->forward(base, x);
  }
  dora->forward(base, x).sum().backward();
  CHECK(dora->lora_B.grad().defined());
}

TEST_CASE("a loaded DoRA adapter uses the norm of the loaded values", "[adapters][dora]") {
  graft::testing::GraftDecoder model, other;
  const auto recipe = graft::adapters::make_recipe(DoraOptions{.rank = 2, .alpha = 4});
  auto adapter = graft::attach(model, recipe, {.targets = {"q_proj", "o_proj"}, .seed = 1});
  randomise(adapter.parameters());
  const at::Tensor expected = model.forward(graft::testing::some_tokens());
  const graft::testing::TempFolder folder;
  adapter.save(folder.path());
  auto loaded = graft::attach(other, recipe, {.targets = {"q_proj", "o_proj"}, .seed = 2});
  other.forward(graft::testing::some_tokens());  // norms of the values at the start
  loaded.load(folder.path());
  CHECK(at::equal(other.forward(graft::testing::some_tokens()), expected));
}

TEST_CASE("rank and alpha patterns reach DoRA's layers", "[adapters][dora]") {
  graft::testing::GraftDecoder model;
  const auto recipe = graft::adapters::make_recipe(DoraOptions{.rank = 2, .alpha = 4});
  auto adapter = graft::attach(model, recipe,
                               {.targets = {"q_proj", "o_proj"},
                                .rank_pattern = {{"o_proj", 3}},
                                .alpha_pattern = {{"layers.1.q_proj", 9}}});
  const auto slot = [&](auto& layer) {
    return std::dynamic_pointer_cast<DoraImpl>(layer->slot->get("default"));
  };
  CHECK(slot(model.blocks[0]->o_proj)->lora_A.size(0) == 3);
  CHECK(slot(model.blocks[0]->q_proj)->scale == 2.0);
  CHECK(slot(model.blocks[1]->q_proj)->scale == 4.5);
}

TEST_CASE("DoRA refuses options and layers that do not fit, in words", "[adapters][dora]") {
  const auto refusal = [](const FrozenLayer& base, const DoraOptions& options) {
    return error_of([&] { make(base, options); });
  };
  CHECK(contains(refusal(some_linear(), {.rank = 5}),
                 "[dora] rank must be in [1, min(in, out)]; got rank=5 for in=4, out=6 (layer "));
  CHECK(contains(refusal(some_linear(), {.rank = 0}), "[dora] rank must be in"));
  CHECK(
      contains(refusal(some_linear(), {.rank = 1, .alpha = 0}), "alpha must be finite and not 0"));
  CHECK(contains(refusal(some_linear(), {.rank = 1, .dropout = 1}), "[dora] dropout must be in"));
  CHECK(contains(refusal(some_linear(), {.rank = 1, .lr_ratio = 0}), "must be positive; got 0"));
  CHECK(contains(refusal(some_linear(), {.rank = 1, .init = "zeros"}), "got 'zeros'"));
  CHECK(contains(refusal(some_embedding(), {.rank = 1, .dropout = 0.1}), "takes no dropout"));
  CHECK(contains(refusal(grouped_conv(), {.rank = 3}), "multiple of the convolution's groups"));
  CHECK(contains(error_of([] { make(some_linear(), {.rank = 1})->set_counters({}); }),
                 "one counter a layer"));
}
