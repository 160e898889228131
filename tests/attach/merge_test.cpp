#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>

#include <limits>

#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::attach;
using graft::adapters::LoraOptions;
using graft::nn::Selector;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::testing::holds_exactly;
using graft::testing::randomise;
using graft::testing::snapshot;
using graft::testing::some_tokens;
using graft::testing::TorchDecoder;

const LoraOptions kLora{.rank = 2, .alpha = 4};

}  // namespace

TEST_CASE("a merged model computes the same and unmerge puts back every bit", "[attach][merge]") {
  GraftDecoder model;
  auto adapter = attach(model, kLora, {.targets = Selector::regex(".*(proj|embed|lm_head)")});
  randomise(adapter.parameters());
  const auto before = snapshot(model);
  const at::Tensor y = model.forward(some_tokens());
  adapter.merge();
  CHECK(adapter.is_merged());
  CHECK(distance(model.forward(some_tokens()), y) < 1e-5);
  CHECK_FALSE(holds_exactly(model, before));
  adapter.unmerge();
  CHECK_FALSE(adapter.is_merged());
  CHECK(holds_exactly(model, before));
  CHECK(at::equal(model.forward(some_tokens()), y));
}

TEST_CASE("a lora bias is merged into the layer's bias and taken out again", "[attach][merge]") {
  GraftDecoder model;
  auto adapter =
      attach(model, LoraOptions{.rank = 2, .bias = true}, {.targets = {"q_proj", "o_proj"}});
  randomise(adapter.parameters());
  const auto before = snapshot(model);
  const at::Tensor y = model.forward(some_tokens());
  adapter.merge();
  CHECK(distance(model.forward(some_tokens()), y) < 1e-5);
  adapter.unmerge();
  CHECK(holds_exactly(model, before));
}

TEST_CASE("two active adapters merge to the sum of their updates", "[attach][merge]") {
  GraftDecoder model;
  auto first = attach(model, kLora, {.targets = {"q_proj", "v_proj"}, .name = "first"});
  randomise(first.parameters(), 1);
  auto second = attach(model, LoraOptions{.rank = 3}, {.targets = {"q_proj"}, .name = "second"});
  randomise(second.parameters(), 2);
  first.set_active({"first", "second"});
  const auto before = snapshot(model);
  const at::Tensor y = model.forward(some_tokens());
  second.merge();
  CHECK(first.is_merged());
  CHECK(distance(model.forward(some_tokens()), y) < 1e-5);
  first.unmerge();
  CHECK(holds_exactly(model, before));
}

TEST_CASE("two active adapters merge the sum of their biases", "[attach][merge]") {
  GraftDecoder model;
  const LoraOptions with_bias{.rank = 2, .bias = true};
  auto first = attach(model, with_bias, {.targets = {"q_proj"}, .name = "first"});
  randomise(first.parameters(), 1);
  auto second = attach(model, with_bias, {.targets = {"q_proj"}, .name = "second"});
  randomise(second.parameters(), 2);
  first.set_active({"first", "second"});
  const auto before = snapshot(model);
  const at::Tensor y = model.forward(some_tokens());
  first.merge();
  CHECK(distance(model.forward(some_tokens()), y) < 1e-5);
  first.unmerge();
  CHECK(holds_exactly(model, before));
}

TEST_CASE("an unmodified model merges into torch's own layers", "[attach][merge]") {
  TorchDecoder model;
  auto adapter = attach(model, kLora, {.targets = Selector::all_linear()});
  randomise(adapter.parameters());
  at::Tensor y;
  {
    const auto active = adapter.activate();
    y = model.forward(some_tokens());
  }
  adapter.merge();
  CHECK(distance(model.forward(some_tokens()), y) < 1e-5);
  CHECK(contains(error_of([&] { (void)adapter.activate(); }), "nothing to activate"));
}

TEST_CASE("a bf16 weight is rounded once and comes back", "[attach][merge]") {
  GraftDecoder model;
  model.to(at::kBFloat16);
  auto adapter = attach(model, kLora, {.targets = {"q_proj"}});
  CHECK(adapter.parameters()[0].scalar_type() == at::kFloat);
  randomise(adapter.parameters());
  const auto before = snapshot(model);
  const at::Tensor plain = model.blocks[0]->q_proj->weight.detach().clone();
  adapter.merge();
  const auto& lora = dynamic_cast<graft::adapters::LoraImpl&>(*adapter.layers()[0].adapter);
  const at::Tensor exact = plain.to(at::kFloat) + lora.delta();
  CHECK(at::equal(model.blocks[0]->q_proj->weight, exact.to(at::kBFloat16)));
  adapter.unmerge();
  CHECK(holds_exactly(model, before));
}

TEST_CASE("what cannot be done while merged is refused", "[attach][merge]") {
  GraftDecoder model;
  auto adapter = attach(model, kLora, {.targets = {"q_proj"}});
  CHECK(contains(error_of([&] { adapter.unmerge(); }), "[merge] the adapters are not merged"));
  adapter.merge();
  CHECK(contains(error_of([&] { adapter.merge(); }), "merged already"));
  CHECK(contains(error_of([&] { adapter.disable(); }), "unmerge first"));
  CHECK(contains(error_of([&] { adapter.enable(); }), "unmerge first"));
  CHECK(contains(error_of([&] { adapter.set_active(); }), "unmerge first"));
  CHECK(contains(error_of([&] { adapter.detach(); }), "unmerge first"));
  CHECK(contains(error_of([&] { adapter.load("unused"); }), "unmerge first"));
  CHECK(contains(error_of([&] { attach(model, kLora, {.targets = {"v_proj"}, .name = "b"}); }),
                 "not merged"));
  adapter.unmerge();
  adapter.disable();
  CHECK(contains(error_of([&] { adapter.merge(); }), "there must be an enabled active adapter"));
  adapter.enable();
  adapter.set_active(std::vector<std::string>{});
  CHECK(contains(error_of([&] { adapter.merge(); }), "there must be an enabled active adapter"));
}

TEST_CASE("a merge that fails changes nothing", "[attach][merge]") {
  GraftDecoder model;
  auto adapter = attach(model, kLora, {.targets = {"q_proj"}});
  randomise(adapter.parameters());
  {
    const at::NoGradGuard no_grad;
    adapter.parameters().back()[0][0] = std::numeric_limits<float>::quiet_NaN();
  }
  const auto weight = model.blocks[0]->q_proj->weight.detach().clone();
  CHECK(contains(error_of([&] { adapter.merge(); }),
                 "a merged weight must be finite; got NaN or infinity (layer "
                 "'model.layers.1.q_proj')"));
  CHECK_FALSE(adapter.is_merged());
  CHECK(at::equal(model.blocks[0]->q_proj->weight, weight));
}

TEST_CASE("a weight that two modules share is not merged", "[attach][merge]") {
  GraftDecoder model;
  model.embed->register_parameter("tied", model.lm_head->weight);
  auto adapter = attach(model, kLora, {.targets = {"lm_head"}});
  const auto before = snapshot(model);
  CHECK(contains(error_of([&] { adapter.merge(); }),
                 "[merge] a merged weight must belong to one layer; got the weight of 'lm_head', "
                 "shared by 'model.embed.tied' and 'lm_head.weight'"));
  CHECK(holds_exactly(model, before));
}

TEST_CASE("a convolution with groups is not merged", "[attach][merge]") {
  torch::nn::Module model;
  model.register_module("conv", graft::nn::Conv1d(torch::nn::Conv1dOptions(4, 4, 3).groups(2)));
  auto adapter = attach(model, kLora, {.targets = {"conv"}});
  CHECK(contains(error_of([&] { adapter.merge(); }), "groups cannot be merged; got groups=2"));
  CHECK_FALSE(adapter.is_merged());
}
