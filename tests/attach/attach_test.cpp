#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>
#include <graft/nn/adapter_slot.h>

#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::attach;
using graft::AttachedAdapter;
using graft::AttachOptions;
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

std::vector<std::string> names_of(const AttachedAdapter& adapter) {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : adapter.named_parameters()) names.push_back(name);
  return names;
}

int64_t trained_tensors(const torch::nn::Module& model) {
  int64_t count = 0;
  for (const auto& parameter : model.parameters()) count += parameter.requires_grad();
  return count;
}

}  // namespace

TEST_CASE("attach freezes the model and trains the adapter alone", "[attach]") {
  GraftDecoder model;
  auto adapter = attach(model, kLora, {.targets = {"q_proj"}});
  const std::string layer = "model.layers.";
  CHECK(names_of(adapter) == std::vector<std::string>{layer + "0.q_proj.adapters.default.lora_A",
                                                      layer + "0.q_proj.adapters.default.lora_B",
                                                      layer + "1.q_proj.adapters.default.lora_A",
                                                      layer + "1.q_proj.adapters.default.lora_B"});
  CHECK(adapter.parameter_count() == 2 * 2 * (8 + 8));
  CHECK(trained_tensors(model) == 4);
  CHECK(adapter.layers().size() == 2);
  CHECK(adapter.name() == "default");
  CHECK(adapter.recipe().method() == "lora");
  CHECK_FALSE(adapter.needs_activation());
  CHECK(adapter.is_active());
  for (const auto& [name, tensor] : adapter.named_parameters())
    CHECK(model.named_parameters()[name].is_same(tensor));
}

TEST_CASE("the whole model trains through its adapters", "[attach]") {
  GraftDecoder model;
  auto adapter = attach(model, kLora, {.targets = Selector::all_linear()});
  CHECK(adapter.layers().size() == 6);  // the output layer is left out
  const auto base = snapshot(model);
  const auto target = at::remainder(some_tokens() + 1, 11).view(-1);
  const auto loss = [&] {
    return at::cross_entropy_loss(model.forward(some_tokens()).view({-1, 11}), target);
  };
  const double before = loss().item<double>();
  for (int step = 0; step < 10; ++step) {
    loss().backward();
    const at::NoGradGuard no_grad;
    for (at::Tensor parameter : adapter.parameters()) {
      parameter.sub_(parameter.grad(), 0.2);
      parameter.mutable_grad().zero_();
    }
  }
  CHECK(loss().item<double>() < before - 0.05);
  for (const auto& [name, value] : base)
    CHECK(at::equal(model.named_parameters()[name], value) == !contains(name, "lora"));
}

TEST_CASE("adapters of one model add up when several are active", "[attach]") {
  GraftDecoder model;
  auto first = attach(model, kLora, {.targets = {"q_proj", "v_proj"}, .name = "first"});
  randomise(first.parameters(), 1);
  auto second = attach(model, LoraOptions{.rank = 3}, {.targets = {"q_proj"}, .name = "second"});
  CHECK(second.is_active());
  CHECK_FALSE(first.is_active());
  randomise(second.parameters(), 2);
  const at::Tensor x = at::randn({3, 8});
  auto& q = model.blocks[0]->q_proj;
  const at::Tensor with_second = q->forward(x);
  first.set_active();
  const at::Tensor with_first = q->forward(x);
  first.disable();
  CHECK_FALSE(second.is_enabled());
  const at::Tensor base = q->forward(x);
  first.enable();
  second.set_active({"first", "second"});
  CHECK(distance(q->forward(x), with_first + with_second - base) < 1e-5);
  CHECK((first.is_active() && second.is_active()));
  CHECK(trained_tensors(model) == 8 + 4);

  first.set_active(std::vector<std::string>{});
  CHECK(at::equal(q->forward(x), base));
  CHECK(contains(error_of([&] {
                   first.set_active({"first", "third"});
                 }),
                 "[attach] an adapter to activate must be one of 'first', 'second'; got 'third'"));
}

TEST_CASE("an inactive adapter has nothing to train", "[attach]") {
  GraftDecoder model;
  auto first = attach(model, kLora, {.targets = {"q_proj"}, .name = "first"});
  auto second = attach(model, kLora, {.targets = {"q_proj"}, .name = "second"});
  CHECK(contains(error_of([&] { first.parameters(); }), "must be active and enabled"));
  CHECK(first.parameter_count() == second.parameter_count());
}

// The model stays frozen: what it was before is the caller's to know.
TEST_CASE("detach leaves the model's values and structure as they were, and frozen", "[attach]") {
  GraftDecoder model;
  const auto before = snapshot(model);
  const at::Tensor y = model.forward(some_tokens());
  auto adapter = attach(
      model, kLora,
      {.targets = {"q_proj"}, .modules_to_save = {"lm_head"}, .bias = graft::TrainedBias::all});
  randomise(adapter.parameters());
  CHECK_FALSE(at::equal(model.forward(some_tokens()), y));
  adapter.detach();
  CHECK(holds_exactly(model, before));
  CHECK(distance(model.forward(some_tokens()), y) < 1e-6);
  CHECK(trained_tensors(model) == 0);
  CHECK(model.blocks[0]->q_proj->slot == nullptr);
  adapter.detach();
  CHECK(contains(error_of([&] { adapter.save("unused"); }), "a detached adapter cannot be saved"));
  CHECK(contains(error_of([&] { (void)adapter.activate(); }), "a detached adapter"));

  auto again = attach(model, kLora, {.targets = {"q_proj"}});
  CHECK(again.parameters().size() == 4);
}

TEST_CASE("detaching one of two adapters keeps the other", "[attach]") {
  GraftDecoder model;
  auto first = attach(model, kLora, {.targets = {"q_proj"}, .name = "first"});
  randomise(first.parameters());
  const at::Tensor y = model.forward(some_tokens());
  auto second = attach(model, kLora, {.targets = {"q_proj", "v_proj"}, .name = "second"});
  second.detach();
  CHECK(model.blocks[0]->v_proj->slot == nullptr);
  first.set_active();
  CHECK(at::equal(model.forward(some_tokens()), y));
}

TEST_CASE("attach that fails leaves the model as it was", "[attach]") {
  GraftDecoder model;
  const auto before = snapshot(model);
  const auto refused = [&](const LoraOptions& lora, const AttachOptions& options) {
    const std::string message = error_of([&] { attach(model, lora, options); });
    CHECK(holds_exactly(model, before));
    CHECK(trained_tensors(model) == static_cast<int64_t>(before.size()));
    return message;
  };
  CHECK(contains(refused(kLora, {.targets = {"q_porj"}}), "nearest names: q_proj"));
  CHECK(contains(refused({.rank = 9}, {.targets = {"q_proj"}}),
                 "got rank=9 for in=8, out=8 (layer 'model.layers.0.q_proj')"));
  CHECK(contains(refused({.rank = 2, .bias = true}, {.targets = {"q_proj", "embed"}}),
                 "an Embedding takes no"));
  CHECK(contains(refused(kLora, {.targets = {"q_proj"}, .modules_to_save = {"head"}}),
                 "modules_to_save must name modules of the model; got 'head'"));
  CHECK(contains(refused(kLora, {.targets = {"q_proj"}, .rank_pattern = {{"k_proj", 4}}}),
                 "every key of rank_pattern must match an adapted layer; got 'k_proj'"));
  CHECK(contains(refused(kLora, {.targets = {"q_proj"}, .name = "a.b"}), "hold a dot; got 'a.b'"));
  CHECK(contains(refused(kLora, {.targets = {"q_proj"}, .name = ""}), "must not be empty"));
}

TEST_CASE("an adapter's name is used once, and one adapter trains biases", "[attach]") {
  GraftDecoder model;
  auto adapter =
      attach(model, kLora, {.targets = {"q_proj"}, .bias = graft::TrainedBias::all, .name = "a"});
  CHECK(contains(error_of([&] { attach(model, kLora, {.targets = {"q_proj"}, .name = "a"}); }),
                 "name must be new; got 'a' a second time"));
  CHECK(contains(
      error_of([&] {
        attach(model, kLora,
               {.targets = {"v_proj"}, .bias = graft::TrainedBias::adapted_layers, .name = "b"});
      }),
      "only one adapter of a model may train biases"));
}

TEST_CASE("the first matching key of rank_pattern and alpha_pattern decides", "[attach]") {
  GraftDecoder model;
  auto adapter = attach(model, kLora,
                        {.targets = {"q_proj", "v_proj"},
                         .rank_pattern = {{"layers.0.q_proj", 1}, {".*q_proj", 3}},
                         .alpha_pattern = {{"v_proj", 10.0}}});
  const auto shape = [&](const std::string& layer) {
    return model.named_parameters()["model.layers." + layer + ".adapters.default.lora_A"].size(0);
  };
  CHECK(shape("0.q_proj") == 1);
  CHECK(shape("1.q_proj") == 3);
  CHECK(shape("0.v_proj") == 2);
  for (const auto& layer : adapter.layers()) {
    const auto& lora = dynamic_cast<const graft::adapters::LoraImpl&>(*layer.adapter);
    const double alpha = layer.name.ends_with("v_proj") ? 10.0 : 4.0;
    CHECK(lora.scale == alpha / static_cast<double>(lora.lora_A.size(0)));
  }
}

TEST_CASE("train, eval and to of the model reach the adapters", "[attach]") {
  GraftDecoder model;
  auto adapter = attach(model, LoraOptions{.rank = 2, .dropout = 0.5}, {.targets = {"q_proj"}});
  randomise(adapter.parameters());
  model.eval();
  CHECK_FALSE(adapter.layers()[0].adapter->is_training());
  CHECK(at::equal(model.forward(some_tokens()), model.forward(some_tokens())));
  model.train();
  CHECK_FALSE(at::equal(model.forward(some_tokens()), model.forward(some_tokens())));
  model.eval();
  const at::Tensor before = model.forward(some_tokens());
  model.to(at::kDouble);
  CHECK(adapter.parameters()[0].scalar_type() == at::kDouble);
  CHECK(distance(model.forward(some_tokens()), before) < 1e-5);
}

TEST_CASE("an adapter attached in eval mode stays in eval mode", "[attach]") {
  GraftDecoder model;
  model.eval();
  auto adapter = attach(model, kLora, {.targets = {"q_proj"}});
  CHECK_FALSE(adapter.layers()[0].adapter->is_training());
}

TEST_CASE("a module that the model holds twice gets one adapter", "[attach]") {
  GraftDecoder model;
  model.register_module("twin", model.blocks[0]->q_proj.ptr());
  auto adapter = attach(model, kLora, {.targets = Selector::regex(".*q_proj|twin")});
  CHECK(adapter.layers().size() == 2);
  CHECK(adapter.parameters().size() == 4);
}

TEST_CASE("a layer that never runs is an error, named", "[attach]") {
  GraftDecoder model;
  model.register_module("spare", graft::nn::Linear(8, 8));
  auto adapter = attach(model, kLora, {.targets = {"q_proj", "spare"}});
  CHECK(contains(error_of([&] { adapter.check_used(); }), "got 3 of 3 that never did"));
  model.forward(some_tokens());
  CHECK(error_of([&] { adapter.check_used(); }) ==
        "[attach] every adapted layer must run; got 1 of 3 that never did, so their adapters have "
        "no effect: 'spare'");
  CHECK(contains(error_of([&] { adapter.save("unused"); }), "'spare'"));

  TorchDecoder plain;
  auto outside = attach(plain, kLora, {.targets = {"q_proj"}});
  plain.forward(some_tokens());
  CHECK(contains(error_of([&] { outside.check_used(); }), "run adapters inside activate() only"));
  randomise(outside.parameters());
  CHECK(contains(error_of([&] { outside.save("unused"); }), "2 of 2 that never did"));
}
