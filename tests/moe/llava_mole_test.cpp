#include <graft/io/safetensors.h>
#include <graft/moe/llava_mole.h>
#include <graft/nn/gated_mlp.h>
#include <graft/train/checkpoint.h>

#include <nlohmann/json.hpp>

#include "tests/moe/mixture_tests.h"
#include "tests/support/adapter_kit.h"

namespace {

using namespace graft::moe;
using graft::attach;
using graft::attach_from;
using graft::nn::FrozenLinear;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::random;
using graft::testing::randomise;
using graft::testing::uneven_sum;

constexpr auto kAll = {Combine::one, Combine::prob, Combine::straight_through, Combine::dense};

LlavaMoleOptions options_of(Combine combine, double balance_loss = 0.0) {
  return {.rank = 2, .alpha = 3.0, .experts = 3, .combine = combine, .balance_loss = balance_loss};
}

// Two feed-forward blocks of width 4 and 6.
struct TwoBlocks : torch::nn::Module {
  TwoBlocks() {
    at::manual_seed(2);
    first = register_module("first", graft::nn::GatedMlp(4, 6));
    second = register_module("second", graft::nn::GatedMlp(4, 6));
    to(at::kDouble);
  }
  at::Tensor forward(const at::Tensor& x) { return second->forward(first->forward(x)); }
  graft::nn::GatedMlp first{nullptr}, second{nullptr};
};

at::Tensor input() {
  at::manual_seed(8);
  return random({2, 5, 4});
}

LlavaMoleImpl& layer(const graft::AttachedAdapter& adapter, const std::string& name) {
  for (const auto& item : adapter.layers())
    if (item.name == name) return static_cast<LlavaMoleImpl&>(*item.adapter);
  throw std::runtime_error(name);
}

const graft::AttachOptions kTargets{.targets = {"gate_proj", "up_proj", "down_proj"}};

// The adapted block by its formula; `gates` [tokens, E].
at::Tensor literal(const graft::AttachedAdapter& adapter, const std::string& block,
                   const graft::nn::FrozenGatedMlp& base, const at::Tensor& x,
                   const at::Tensor& gates) {
  const auto project = [&](const char* name, const FrozenLinear& linear, const at::Tensor& in) {
    return graft::testing::sum_over_experts(layer(adapter, block + "." + name), linear, in, gates);
  };
  const at::Tensor z =
      at::silu(project("gate_proj", base.gate, x)) * project("up_proj", base.up, x);
  return project("down_proj", base.down, z);
}

}  // namespace

TEST_CASE("LLaVA-MoLE keeps the promises of adapters", "[moe][llava_mole]") {
  for (const Combine combine : kAll) {
    INFO(combine_name(combine));
    graft::testing::MethodCase method;
    method.method = "llava-mole";
    method.recipe = [combine](int64_t rank) {
      return graft::testing::recipe_of_rank(options_of(combine), rank);
    };
    method.count = [](const graft::nn::FrozenLayer& base, int64_t rank) {
      const at::Tensor& weight = graft::nn::weight_of(base);
      return 3 * (rank * (weight.size(0) + weight.size(1)) + weight.size(1) + 1);
    };
    method.zero_at_first = [](const std::string&) {
      return std::vector<std::string>{"lora_A", "weight", "offset"};
    };
    method.unfit = {"Embedding", "Conv"};
    method.unmergeable = {"Linear"};  // I3: gates depend on the input
    // Its gradient is that of the dense gates on purpose, the value that of the chosen one.
    method.exact_gradients = combine != Combine::straight_through;
    graft::testing::run_adapter_kit(method);
  }
}

TEST_CASE("LLaVA-MoLE chooses one expert for a block's three layers", "[moe][llava_mole]") {
  for (const Combine combine : kAll) {
    INFO(combine_name(combine));
    TwoBlocks model;
    auto adapter = attach(model, options_of(combine), kTargets);
    randomise(adapter.parameters());
    const at::Tensor x = input();
    const RouterImpl& router = layer(adapter, "first.down_proj").router();
    CHECK(&router == &layer(adapter, "first.gate_proj").router());
    CHECK(&router != &layer(adapter, "second.gate_proj").router());
    const at::Tensor p = at::softmax(at::linear(x.view({10, 4}), router.weight, router.offset), -1);
    const auto [largest, chosen] = p.max(1, /*keepdim=*/true);
    const at::Tensor one = at::zeros_like(p).scatter(1, chosen, 1.0);
    const at::Tensor gates = combine == Combine::dense  ? p
                             : combine == Combine::prob ? one * p
                                                        : one;
    CHECK(distance(model.first->forward(x),
                   literal(adapter, "first", model.first->frozen(), x, gates)) < 1e-12);
  }
}

TEST_CASE("LLaVA-MoLE's router learns from its balance loss alone where the weight is 1",
          "[moe][llava_mole]") {
  for (const Combine combine : kAll) {
    INFO(combine_name(combine));
    TwoBlocks model;
    auto adapter = attach(model, options_of(combine, 0.5), kTargets);
    randomise(adapter.parameters());
    const at::Tensor& weight = layer(adapter, "first.gate_proj").router().weight;
    uneven_sum(model.forward(input())).backward();
    CHECK((weight.grad().abs().max().item<double>() == 0) == (combine == Combine::one));
    model.forward(input());
    adapter.penalty().backward();
    CHECK(weight.grad().abs().max().item<double>() > 0);
  }
}

TEST_CASE("LLaVA-MoLE's straight-through gradient is that of the dense gates at the chosen value",
          "[moe][llava_mole]") {
  const FrozenLinear base = graft::testing::some_linear();
  auto method =
      graft::testing::make_random<LlavaMoleImpl>(base, options_of(Combine::straight_through));
  const at::Tensor x = input();
  uneven_sum(method.forward(base, x)).backward();
  const at::Tensor found = method.router().weight.grad().clone();
  method.zero_grad();
  // <dy, s B_e A_e x> against the softmax of all experts.
  const at::Tensor logits =
      at::linear(x.view({10, 4}), method.router().weight, method.router().offset);
  const at::Tensor p = at::softmax(logits, -1);
  const at::Tensor dy =
      graft::testing::uneven_like(at::zeros({2, 5, 6}, at::kDouble)).view({10, 6});
  at::Tensor through = at::zeros({}, at::kDouble);
  for (int64_t e = 0; e < 3; ++e) {
    const auto lora = method.extract_expert(e);
    const at::Tensor out = x.view({10, 4}).mm(lora.A.t()).mm(lora.B.t()) * lora.scale;
    through = through + (p.select(1, e) * (out * dy).sum(1)).sum();
  }
  through.backward();
  CHECK(distance(method.router().weight.grad(), found) < 1e-12);
}

TEST_CASE("LLaVA-MoLE's balance loss has no factor E: 1/3 at even logits, blocks pooled",
          "[moe][llava_mole]") {
  TwoBlocks model;
  // The loss is of first choices, also where all experts work.
  const Combine combine = GENERATE(Combine::one, Combine::dense);
  auto adapter = attach(model, options_of(combine, 0.5), kTargets);
  for (const char* name : {"first.gate_proj", "second.gate_proj"}) {
    const at::NoGradGuard no_grad;
    at::Tensor(layer(adapter, name).router().weight).zero_();
    at::Tensor(layer(adapter, name).router().offset).zero_();
  }
  model.forward(input());
  CHECK(distance(adapter.penalty(), at::full({}, 0.5 / 3, at::kDouble)) < 1e-14);
  // By hand, with other logits: per sequence the tokens of both blocks together.
  randomise(adapter.parameters());
  model.forward(input());
  at::Tensor expected = at::zeros({}, at::kDouble);
  for (int64_t sequence = 0; sequence < 2; ++sequence) {
    at::Tensor f = at::zeros({3}, at::kDouble), P = at::zeros({3}, at::kDouble);
    for (const char* name : {"first.up_proj", "second.up_proj"}) {
      const Routing& routing = layer(adapter, name).routing();
      const at::Tensor p = routing.probabilities.narrow(0, 5 * sequence, 5).detach();
      P += p.sum(0) / 10;
      f += at::one_hot(p.argmax(1), 3).sum(0).to(at::kDouble) / 10;
    }
    expected += 0.5 * (f * P).sum() / 2;
  }
  CHECK(distance(adapter.penalty(), expected) < 1e-14);
  CHECK(adapter.figures()[0].first == "balance_loss");
}

TEST_CASE("LLaVA-MoLE routes anew in every pass, whatever the input's memory",
          "[moe][llava_mole]") {
  TwoBlocks model;
  auto adapter = attach(model, options_of(Combine::prob, 0.1), kTargets);
  randomise(adapter.parameters());
  const at::Tensor x = input();
  const auto step = [&] {
    for (at::Tensor p : adapter.parameters()) p.mutable_grad() = at::Tensor();
    const at::Tensor y = model.forward(x);
    (uneven_sum(y) + adapter.penalty()).backward();
    return layer(adapter, "first.gate_proj").router().weight.grad().clone();
  };
  const at::Tensor first = step();
  CHECK(at::equal(step(), first));  // the same tensor again
  {
    const at::NoGradGuard no_grad;
    at::Tensor(layer(adapter, "first.gate_proj").router().weight).mul_(-1);
  }
  CHECK_FALSE(at::equal(step(), first));
  {
    const at::NoGradGuard no_grad;  // a pass without a graph before one with it
    model.forward(x);
  }
  at::Tensor(layer(adapter, "first.gate_proj").router().weight).detach().mul_(-1);
  CHECK(at::equal(step(), first));
}

TEST_CASE("a layer does not take the routing of another input for its own", "[moe][llava_mole]") {
  TwoBlocks model;
  auto adapter = attach(model, options_of(Combine::prob, 0.1), kTargets);
  randomise(adapter.parameters());
  auto &gate = model.first->gate_proj, &up = model.first->up_proj;
  LlavaMoleImpl& own = layer(adapter, "first.up_proj");
  const at::Tensor x = input();
  const auto routed = [&] { return own.routing().logits.detach().clone(); };
  up->forward(x[1].clone());
  const at::Tensor second = routed();
  gate->forward(x[0]);  // another part of the same memory
  up->forward(x[1]);
  CHECK(at::equal(routed(), second));
  const at::Tensor changed = x.clone();
  gate->forward(changed);
  changed.mul_(2);
  up->forward(changed);
  const at::Tensor after = routed();
  up->forward(x * 2);
  CHECK(at::equal(routed(), after));
  {
    const at::NoGradGuard no_grad;
    gate->forward(x);
  }
  up->forward(x);
  CHECK(own.routing().logits.requires_grad());
}

TEST_CASE("LLaVA-MoLE in a checkpointed block has the gradients of the plain one",
          "[moe][llava_mole]") {
  TwoBlocks model;
  auto adapter = attach(model, options_of(Combine::prob), kTargets);
  randomise(adapter.parameters());
  const auto gradients = [&](bool checkpointed) {
    for (at::Tensor p : adapter.parameters()) p.mutable_grad() = at::Tensor();
    const at::Tensor x = input().set_requires_grad(true);
    const auto f = [&](const at::Tensor& t) { return model.forward(t); };
    uneven_sum(checkpointed ? graft::train::checkpoint(f, x, adapter.parameters()) : f(x))
        .backward();
    std::vector<at::Tensor> all = {x.grad()};
    for (const at::Tensor& p : adapter.parameters()) all.push_back(p.grad());
    return all;
  };
  const auto plain = gradients(false), again = gradients(true);
  for (size_t i = 0; i < plain.size(); ++i) CHECK(distance(again[i], plain[i]) < 1e-13);
}

TEST_CASE("a layer that follows a routing of other tokens is refused", "[moe][llava_mole]") {
  TwoBlocks model;
  auto adapter = attach(model, options_of(Combine::one), kTargets);
  CHECK(contains(error_of([&] {
                   model.first->down_proj->forward(random({3, 6}));
                 }),
                 "got 3 tokens for 0 routed (layer 'first.down_proj')"));
  model.forward(input());
  CHECK(contains(error_of([&] {
                   model.first->down_proj->forward(random({3, 6}));
                 }),
                 "got 3 tokens for 10 routed"));
}

TEST_CASE("LLaVA-MoLE's folder holds a block's router once", "[moe][llava_mole][files]") {
  const graft::testing::TempFolder folder;
  TwoBlocks model, other;
  auto adapter = attach(model, options_of(Combine::dense, 0.25), kTargets);
  randomise(adapter.parameters());
  const at::Tensor expected = model.forward(input());
  CHECK(adapter.parameter_count() == 2 * (3 * 2 * 3 * (4 + 6) + 3 * 4 + 3));
  adapter.save(folder.path());
  const auto file = graft::io::SafetensorsFile::open(folder / "adapter_model.safetensors");
  const std::string block = "base_model.model.first.";
  CHECK(file.tensor(block + "gate_proj.moe_gate.weight").sizes() == at::IntArrayRef({3, 4}));
  CHECK(file.tensor(block + "gate_proj.moe_gate.bias").sizes() == at::IntArrayRef({3}));
  CHECK_FALSE(file.contains(block + "down_proj.moe_gate.weight"));
  CHECK(file.names().size() == 2 * (2 + 3 * 3 * 2));
  auto read = attach_from(other, folder.path());
  CHECK(at::equal(other.forward(input()), expected));
  CHECK(read.recipe().describe() == adapter.recipe().describe());
}

TEST_CASE("LLaVA-MoLE knows its ways to combine by name", "[moe][llava_mole]") {
  for (const Combine combine : kAll) CHECK(parse_combine(combine_name(combine)) == combine);
  CHECK(contains(
      error_of([] { parse_combine("two"); }),
      "[llava-mole] combine must be one of one, prob, straight_through, dense; got 'two'"));
}
