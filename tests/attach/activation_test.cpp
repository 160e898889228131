// Adapters on models of torch's own layers. That each kind of layer computes in a scope what
// graft's layer does, gradients included, is part of the adapter kit.
#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>

#include <thread>

#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::attach;
using graft::AttachedAdapter;
using graft::adapters::LoraOptions;
using graft::nn::Selector;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::testing::randomise;
using graft::testing::some_tokens;
using graft::testing::TorchDecoder;

const LoraOptions kLora{.rank = 2, .alpha = 4};

/// A torch model with an adapter that has learnt something, and what the model should compute.
struct Adapted {
  explicit Adapted(uint64_t seed = 1)
      : model(seed), adapter(attach(model, kLora, {.targets = Selector::regex(kTargets)})) {
    randomise(adapter.parameters(), seed);
    base = model.forward(some_tokens());
    adapter.merge();
    merged = model.forward(some_tokens());
    adapter.unmerge();
  }
  bool runs_adapters() { return distance(model.forward(some_tokens()), merged) < 1e-5; }
  bool runs_base() { return at::equal(model.forward(some_tokens()), base); }

  static constexpr const char* kTargets = ".*(q_proj|v_proj|embed|lm_head)";
  TorchDecoder model;
  AttachedAdapter adapter;
  at::Tensor base, merged;
};

}  // namespace

TEST_CASE("a model of torch's layers runs its adapters inside a scope only", "[attach][scope]") {
  Adapted a;
  CHECK(a.adapter.needs_activation());
  CHECK(distance(a.base, a.merged) > 1e-2);
  CHECK(a.runs_base());
  {
    const auto active = a.adapter.activate();
    CHECK(a.runs_adapters());
    CHECK(a.runs_adapters());
  }
  CHECK(a.runs_base());
  a.adapter.check_used();
}

TEST_CASE("a scope gives the gradients of graft's layers, backward inside or outside of it",
          "[attach][scope]") {
  GraftDecoder dropin;
  auto reference = attach(dropin, kLora, {.targets = Selector::regex(Adapted::kTargets)});
  randomise(reference.parameters());
  graft::testing::uneven_sum(dropin.forward(some_tokens())).backward();
  for (const bool inside : {true, false}) {
    TorchDecoder model;
    auto adapter = attach(model, kLora, {.targets = Selector::regex(Adapted::kTargets)});
    randomise(adapter.parameters());
    auto active = std::make_unique<graft::ActivationScope>(adapter.activate());
    const at::Tensor loss = graft::testing::uneven_sum(model.forward(some_tokens()));
    if (!inside) active.reset();
    loss.backward();
    const auto expected = reference.parameters(), found = adapter.parameters();
    REQUIRE(expected.size() == found.size());
    for (size_t i = 0; i < found.size(); ++i)
      CHECK(distance(found[i].grad(), expected[i].grad()) < 1e-5);
    for (const auto& item : model.named_parameters())
      CHECK(item.value().grad().defined() == contains(item.key(), ".adapters."));
  }
}

// Transposed, a 1 by 1 weight looks as it did: backward's own products with it are no layers.
TEST_CASE("backward's products inside a scope run no adapters", "[attach][scope]") {
  torch::nn::Module model;
  auto layer = model.register_module("layer", torch::nn::Linear(1, 1));
  auto adapter = attach(model, LoraOptions{.rank = 1}, {.targets = {"layer"}});
  randomise(adapter.parameters());
  const at::Tensor x = at::ones({3, 1}).set_requires_grad(true);
  const auto active = adapter.activate();
  layer->forward(x).sum().backward();
  const auto merged = adapter.layers()[0].adapter->merge(graft::nn::frozen_layer(*layer));
  CHECK(distance(x.grad(), merged.weight.expand({3, 1})) < 1e-6);
}

TEST_CASE("inference mode and no_grad are served", "[attach][scope]") {
  Adapted a;
  const auto active = a.adapter.activate();
  {
    const at::NoGradGuard no_grad;
    CHECK(a.runs_adapters());
    CHECK_FALSE(a.model.forward(some_tokens()).requires_grad());
  }
  const c10::InferenceMode inference;
  CHECK(a.runs_adapters());
}

TEST_CASE("scopes nest, of one model and of two", "[attach][scope]") {
  Adapted a(1), b(2);
  const auto outer = a.adapter.activate();
  {
    const auto again = a.adapter.activate();
    CHECK(a.runs_adapters());
    CHECK(b.runs_base());
    const auto other = b.adapter.activate();
    CHECK(a.runs_adapters());
    CHECK(b.runs_adapters());
  }
  CHECK(a.runs_adapters());
  CHECK(b.runs_base());
}

TEST_CASE("a scope can be moved", "[attach][scope]") {
  Adapted a;
  auto active = a.adapter.activate();
  {
    const auto moved = std::move(active);
    CHECK(a.runs_adapters());
  }
  CHECK(a.runs_base());
}

TEST_CASE("a scope is its thread's: another one sees the base", "[attach][scope]") {
  Adapted a;
  const auto active = a.adapter.activate();
  bool base_there = false, adapted_there = false;
  std::thread([&] { base_there = a.runs_base(); }).join();
  std::thread([&] {
    const auto own = a.adapter.activate();
    adapted_there = a.runs_adapters();
  }).join();
  CHECK(base_there);
  CHECK(adapted_there);
  CHECK(a.runs_adapters());
}

TEST_CASE("disabled and inactive adapters do not run in a scope", "[attach][scope]") {
  Adapted a;
  const auto active = a.adapter.activate();
  a.adapter.disable();
  CHECK(a.runs_base());
  a.adapter.enable();
  CHECK(a.runs_adapters());
  a.adapter.set_active(std::vector<std::string>{});
  CHECK(a.runs_base());
}

TEST_CASE("one scope runs every adapter of the model", "[attach][scope]") {
  Adapted a;
  auto second = attach(a.model, LoraOptions{.rank = 3}, {.targets = {"o_proj"}, .name = "second"});
  randomise(second.parameters());
  a.adapter.set_active({"default", "second"});
  a.adapter.merge();
  const at::Tensor expected = a.model.forward(some_tokens());
  a.adapter.unmerge();
  const auto active = second.activate();
  CHECK(distance(a.model.forward(some_tokens()), expected) < 1e-5);
}

TEST_CASE("a model moved to another type is served by a new scope", "[attach][scope]") {
  Adapted a;
  a.model.to(at::kDouble);
  const auto active = a.adapter.activate();
  const at::Tensor y = a.model.forward(some_tokens());
  CHECK(y.scalar_type() == at::kDouble);
  CHECK(distance(y, a.merged) < 1e-5);
}

TEST_CASE("a Sequential of torch's layers is served", "[attach][scope]") {
  at::manual_seed(3);
  torch::nn::Sequential net(torch::nn::Linear(4, 6),
                            torch::nn::Linear(torch::nn::LinearOptions(6, 3).bias(false)));
  torch::nn::Module model;
  model.register_module("net", net);
  auto adapter = attach(model, kLora, {.targets = Selector::all_linear()});
  randomise(adapter.parameters());
  for (const auto& shape : std::vector<std::vector<int64_t>>{{5, 4}, {2, 5, 4}, {4}}) {
    INFO("input " << at::IntArrayRef(shape));
    const at::Tensor x = at::randn(shape);
    adapter.merge();
    const at::Tensor expected = net->forward(x);
    adapter.unmerge();
    const auto active = adapter.activate();
    CHECK(distance(net->forward(x), expected) < 1e-5);
  }
}

TEST_CASE("the output layer of torch's attention is served", "[attach][scope]") {
  at::manual_seed(4);
  torch::nn::Module model;
  const auto attention = model.register_module("attention", torch::nn::MultiheadAttention(8, 2));
  auto adapter = attach(model, kLora, {.targets = {"out_proj"}});
  randomise(adapter.parameters());
  const at::Tensor x = at::randn({5, 1, 8});
  const auto run = [&] { return std::get<0>(attention->forward(x, x, x)); };
  const at::Tensor base = run();
  adapter.merge();
  const at::Tensor expected = run();
  adapter.unmerge();
  const auto active = adapter.activate();
  CHECK(distance(run(), expected) < 1e-5);
  CHECK(distance(base, expected) > 1e-3);
  adapter.check_used();
}

TEST_CASE("operations with other weights are left alone", "[attach][scope]") {
  Adapted a;
  at::manual_seed(5);
  const at::Tensor x = at::randn({3, 8}), w = at::randn({8, 8}), b = at::randn({8});
  const at::Tensor image = at::randn({1, 2, 5, 5}), kernel = at::randn({2, 2, 3, 3});
  const auto all = [&] {
    return std::vector<at::Tensor>{at::linear(x, w, b),
                                   at::addmm(b, x, w.t()),
                                   at::mm(x, w.t()),
                                   at::matmul(x, w),
                                   at::addmm(b, x, a.model.blocks[0]->q_proj->weight.t(), 2.0, 3.0),
                                   at::mm(x, a.model.blocks[0]->q_proj->weight),
                                   at::embedding(w, at::tensor({0, 7})),
                                   at::conv2d(image, kernel),
                                   at::conv2d(image, kernel, {}, 1, "same")};
  };
  const auto expected = all();
  const auto active = a.adapter.activate();
  const auto found = all();
  for (size_t i = 0; i < found.size(); ++i) {
    INFO("operation " << i);
    CHECK(at::equal(found[i], expected[i]));
  }
}

TEST_CASE("two adapted layers of torch that share a weight are refused", "[attach][scope]") {
  torch::nn::Module model;
  auto first = model.register_module("first", torch::nn::Linear(4, 4));
  auto second = model.register_module("second", torch::nn::Linear(4, 4));
  second->weight = second->parameters()[0] = first->weight;
  auto adapter = attach(model, kLora, {.targets = {"first", "second"}});
  CHECK(contains(error_of([&] { (void)adapter.activate(); }),
                 "two adapted layers of torch::nn must not share a weight"));
}

TEST_CASE("a scope over layers without adapters is refused", "[attach][scope]") {
  const auto layer = std::make_shared<torch::nn::LinearImpl>(2, 2);
  CHECK(contains(error_of([&] {
                   graft::ActivationScope({{"layer", layer}});
                 }),
                 "must have adapters; got none (layer 'layer')"));
}
