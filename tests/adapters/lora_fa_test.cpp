#include <ATen/ATen.h>
#include <graft/adapters/lora.h>
#include <graft/adapters/lora_fa.h>
#include <graft/core/random.h>
#include <graft/io/safetensors.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "tests/support/adapter_kit.h"
#include "tests/support/method_tests.h"

namespace {

using namespace graft::adapters;
using namespace graft::testing;
using graft::nn::FrozenConv;
using graft::nn::FrozenLinear;
using nlohmann::json;

LoraFaImpl make(const graft::nn::FrozenLayer& base, const LoraFaOptions& options) {
  return make_random<LoraFaImpl>(base, options);
}

MethodCase kit_case() {
  MethodCase method;
  method.method = "lora-fa";
  method.recipe = [](int64_t rank) { return make_recipe(LoraFaOptions{.rank = rank, .alpha = 3}); };
  method.count = [](const graft::nn::FrozenLayer& layer, int64_t rank) {
    const auto* conv = std::get_if<FrozenConv>(&layer);
    return graft::nn::weight_of(layer).size(0) * (rank / (conv == nullptr ? 1 : conv->groups));
  };
  method.zero_at_first = [](const std::string&) { return std::vector<std::string>{}; };
  return method;
}

}  // namespace

TEST_CASE("LoRA-FA keeps the promises of adapters on every kind of layer that it fits",
          "[adapters][lora-fa]") {
  MethodCase method = kit_case();
  method.unfit = {"Embedding"};
  method.reads_back = false;  // as plain LoRA, which trains A as well
  run_adapter_kit(method);
}

TEST_CASE("LoRA-FA is LoRA with the same values", "[adapters][lora-fa]") {
  const FrozenLinear base = some_linear();
  LoraFaImpl frozen = make(base, {.rank = 2, .alpha = 3});
  LoraImpl lora(base, {.rank = 2, .alpha = 3}, {"q_proj", 1});
  CHECK(at::equal(lora.lora_A, frozen.lora_A));  // drawn alike
  {
    const at::NoGradGuard no_grad;
    lora.lora_B.copy_(frozen.lora_B);
  }
  const at::Tensor x = random({3, 4});
  CHECK(at::equal(frozen.forward(base, x), lora.forward(base, x)));
  CHECK(distance(frozen.forward(base, x),
                 at::linear(x, base.weight + 1.5 * frozen.lora_B.mm(frozen.lora_A), base.bias)) <
        1e-13);
  CHECK(at::equal(frozen.merged_weight(base), lora.merged_weight(base)));
  CHECK(LoraFaOptions{.rank = 4, .alpha = 3, .rslora = true}.scale() == 1.5);
}

TEST_CASE("LoRA-FA trains B and leaves A alone", "[adapters][lora-fa]") {
  const FrozenLinear base = some_linear();
  LoraFaImpl adapter = make(base, {.rank = 2});
  CHECK(adapter.parameters().size() == 1);
  CHECK(adapter.named_buffers().contains("lora_A"));
  CHECK_FALSE(adapter.lora_A.requires_grad());
  adapter.forward(base, random({3, 4})).square().sum().backward();
  CHECK_FALSE(adapter.lora_A.grad().defined());
  CHECK(adapter.lora_B.grad().abs().max().item<double>() > 0);
}

namespace {

// Whether backward of a layer can still be taken right after its input's storage was overwritten:
// autograd checks the version of everything that it kept.
template <class Adapter>
bool keeps_input(Adapter& adapter, const FrozenLinear& base) {
  const at::Tensor leaf = random({3, 4}).set_requires_grad(true);
  const at::Tensor x = leaf * 1.0;
  const at::Tensor loss = adapter.forward(base, x).sum();
  {
    const at::NoGradGuard no_grad;
    x.zero_();
  }
  try {
    loss.backward();
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

}  // namespace

TEST_CASE("LoRA-FA's backward does not keep the layer's input, LoRA's does",
          "[adapters][lora-fa]") {
  const FrozenLinear base = some_linear();
  LoraFaImpl frozen = make(base, {.rank = 2});
  CHECK_FALSE(keeps_input(frozen, base));
  LoraImpl lora(base, {.rank = 2}, {"q_proj", 1});
  CHECK(keeps_input(lora, base));
}

TEST_CASE("a projected step moves the weight against the gradient within A's rows",
          "[adapters][lora-fa]") {
  const FrozenLinear base = some_linear(5, 7);
  LoraFaImpl adapter = make(base, {.rank = 3, .alpha = 5});
  const at::Tensor G = random({5, 7});  // the gradient of <G, W> in W
  for (int step = 0; step < 3; ++step) {
    adapter.zero_grad();
    const at::Tensor before = adapter.merged_weight(base);
    (adapter.scale * adapter.lora_B.mm(adapter.lora_A) * G).sum().backward();
    LoraFaImpl::before_update({&adapter}, {});
    {
      const at::NoGradGuard no_grad;
      adapter.lora_B.sub_(adapter.lora_B.grad(), 0.1);
    }
    const at::Tensor A = adapter.lora_A;
    const at::Tensor nearest = G.mm(at::linalg_pinv(A)).mm(A);  // G P_A
    CHECK(distance(adapter.merged_weight(base) - before, -0.1 * nearest) < 1e-6);
    // What is left over has nothing in A's rows: no other step of this form is nearer to G.
    CHECK(distance((G - nearest).mm(A.t()), at::zeros({5, 3})) < 1e-10);
  }
}

TEST_CASE("the projection is that of PEFT's optimiser", "[adapters][lora-fa]") {
  const FrozenLinear base = some_linear();
  LoraFaImpl adapter = make(base, {.rank = 2, .alpha = 6});
  const at::Tensor gradient = random({6, 2}), A = adapter.lora_A;
  const at::Tensor expected =
      gradient.mm(at::linalg_inv(A.mm(A.t()) + 1e-8 * at::eye(2, at::kDouble))) / 9.0;
  CHECK(distance(adapter.projected_gradient(gradient), expected) < 1e-13);
  // A new A, as when values are loaded, is noticed.
  adapter.lora_A.mul_(2.0);
  CHECK(distance(adapter.projected_gradient(gradient), expected / 4.0) < 1e-6);
  // The ridge counts where A vanishes.
  adapter.lora_A.zero_();
  CHECK(distance(adapter.projected_gradient(gradient) / 1e8, gradient / 9.0) < 1e-13);
}

TEST_CASE("the projection of a convolution with groups is one for each group",
          "[adapters][lora-fa]") {
  at::manual_seed(3);
  const FrozenConv base{random({6, 2, 3}), random({6}), {1}, {0}, {1}, 2};
  LoraFaImpl adapter = make(base, {.rank = 4, .alpha = 4});
  const at::Tensor gradient = random({6, 2, 1});
  const at::Tensor found = adapter.projected_gradient(gradient);
  for (const int64_t group : {0, 1}) {
    const at::Tensor A = adapter.lora_A.view({4, 12}).narrow(0, 2 * group, 2);
    const at::Tensor expected =
        gradient.view({6, 2}).narrow(0, 3 * group, 3).mm(at::linalg_inv(A.mm(A.t())));
    CHECK(distance(found.view({6, 2}).narrow(0, 3 * group, 3), expected) < 1e-6);
  }
}

TEST_CASE("without `projected` LoRA-FA leaves gradients as they are", "[adapters][lora-fa]") {
  const FrozenLinear base = some_linear();
  LoraFaImpl plain = make(base, {.rank = 2, .projected = false}), other = make(base, {.rank = 2});
  for (LoraFaImpl* adapter : {&plain, &other}) {
    LoraFaImpl::before_update({adapter}, {});  // nothing ran: nothing to do
    CHECK_FALSE(adapter->lora_B.grad().defined());
    adapter->forward(base, at::ones({3, 4}, at::kDouble)).square().sum().backward();
  }
  const at::Tensor gradient = plain.lora_B.grad().clone();
  CHECK(at::equal(gradient, other.lora_B.grad()));
  LoraFaImpl::before_update({&plain, &other}, {});
  CHECK(at::equal(plain.lora_B.grad(), gradient));
  CHECK(at::equal(other.lora_B.grad(), other.projected_gradient(gradient)));
  CHECK_FALSE(at::equal(other.lora_B.grad(), gradient));
}

TEST_CASE("the attached handle hands gradients to the method before the update",
          "[adapters][lora-fa][attach]") {
  GraftDecoder model;
  auto adapter = graft::attach(model, LoraFaOptions{.rank = 2}, {.targets = {"q_proj", "o_proj"}});
  uneven_sum(model.forward(some_tokens())).backward();
  auto& layer = dynamic_cast<LoraFaImpl&>(*adapter.layers()[1].adapter);
  const at::Tensor expected = layer.projected_gradient(layer.lora_B.grad().clone());
  adapter.before_update({});
  CHECK(at::equal(layer.lora_B.grad(), expected));
}

TEST_CASE("a LoRA-FA folder is a plain LoRA folder", "[adapters][lora-fa]") {
  GraftDecoder model;
  auto adapter =
      graft::attach(model, LoraFaOptions{.rank = 2, .alpha = 3, .rslora = true, .init = "gaussian"},
                    {.targets = {"q_proj"}});
  randomise(adapter.parameters());
  const at::Tensor expected = model.forward(some_tokens());
  std::string folder = (std::filesystem::temp_directory_path() / "graft-fa-XXXXXX").string();
  REQUIRE(::mkdtemp(folder.data()) != nullptr);
  adapter.save(folder);
  adapter.detach();
  GraftDecoder fresh;
  const auto read = graft::attach_from(fresh, folder);
  std::filesystem::remove_all(folder);
  CHECK(read.recipe().method() == "lora");
  CHECK(at::equal(fresh.forward(some_tokens()), expected));
  json fa, lora;
  make_recipe(LoraFaOptions{.rank = 2, .alpha = 3})->write_config(fa);
  make_recipe(LoraOptions{.rank = 2, .alpha = 3})->write_config(lora);
  CHECK(fa == lora);
}

TEST_CASE("LoRA-FA reads LoRA's fields and its own", "[adapters][lora-fa]") {
  const MethodEntry entry = lora_fa_entry();
  CHECK_FALSE(entry.claims(json{{"peft_type", "LORA"}}));
  json config = {{"r", 3},
                 {"lora_alpha", 2.5},
                 {"lora_dropout", 0.1},
                 {"use_rslora", true},
                 {"init_lora_weights", "gaussian"},
                 {"projected", false}};
  const auto recipe = entry.read_config(config);
  CHECK(config.empty());
  const auto options = dynamic_cast<const RecipeOf<LoraFaImpl>&>(*recipe).options();
  CHECK((options.rank == 3 && options.alpha == 2.5 && options.dropout == 0.1));
  CHECK((options.rslora && options.init == "gaussian" && !options.projected));
  CHECK(recipe->describe() ==
        "rank 3, alpha 2.5, rsLoRA, dropout 0.1, init gaussian, plain gradient");
  json empty = json::object();
  const auto defaults =
      dynamic_cast<const RecipeOf<LoraFaImpl>&>(*entry.read_config(empty)).options();
  CHECK((defaults.rank == 8 && defaults.alpha == 8.0 && defaults.projected));
}

TEST_CASE("LoRA-FA's dropout hits the branch alone, in training alone", "[adapters][lora-fa]") {
  const FrozenLinear base = some_linear();
  LoraFaImpl adapter = make(base, {.rank = 2, .alpha = 2, .dropout = 0.5});
  const at::Tensor x = random({8, 4});
  const auto site = static_cast<uint32_t>(graft::random::hash_name("q_proj"));
  const auto branch = [&](const at::Tensor& input) {
    return at::linear(x, base.weight, base.bias) +
           input.mm(adapter.lora_A.t()).mm(adapter.lora_B.t());
  };
  CHECK(distance(adapter.forward(base, x),
                 branch(graft::ops::apply_dropout(x, {0.5, {1, site, 0}}))) < 1e-13);
  CHECK(adapter.counters() == std::vector<int64_t>{1});
  adapter.eval();
  CHECK(distance(adapter.forward(base, x), branch(x)) < 1e-13);
  CHECK(contains(error_of([&] { adapter.set_counters({}); }), "one counter a layer"));
}

TEST_CASE("LoRA-FA refuses what it cannot do", "[adapters][lora-fa]") {
  const auto error = [](const LoraFaOptions& options) {
    return error_of([&] { options.validate(); });
  };
  CHECK(contains(error({.rank = 0}), "[lora-fa] rank must be in [1, min(in, out)]; got rank=0"));
  CHECK(contains(error({.alpha = 0}), "got 0"));
  CHECK(contains(error({.alpha = std::nan("")}), "alpha must be finite"));
  CHECK(contains(error({.dropout = 1}), "[lora-fa]"));
  CHECK(contains(error_of([] { make(some_linear(), {.rank = 5}); }),
                 "got rank=5 for in=4, out=6 (layer 'q_proj')"));
  const graft::nn::FrozenEmbedding embedding{random({5, 4})};
  CHECK(contains(error_of([&] { make(embedding, {.rank = 1}); }),
                 "[lora-fa] this method does not support Embedding (layer 'q_proj')"));
}
