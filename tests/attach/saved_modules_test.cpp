// Parts of the model itself that an adapter trains: modules_to_save and biases.
#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>
#include <graft/io/safetensors.h>

#include "tests/io/file_helpers.h"
#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::attach;
using graft::attach_from;
using graft::TrainedBias;
using graft::adapters::LoraOptions;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::testing::holds_exactly;
using graft::testing::randomise;
using graft::testing::snapshot;
using graft::testing::some_tokens;

const LoraOptions kLora{.rank = 2, .alpha = 4};

std::vector<std::string> model_parameters(const graft::AttachedAdapter& adapter) {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : adapter.named_parameters())
    if (!contains(name, ".adapters.")) names.push_back(name);
  return names;
}

}  // namespace

TEST_CASE("modules_to_save are trained whole and carry no adapter", "[attach]") {
  GraftDecoder model;
  auto adapter = attach(model, kLora,
                        {.targets = graft::nn::Selector::regex(".*(q_proj|lm_head)"),
                         .modules_to_save = {"lm_head"}});
  CHECK(adapter.layers().size() == 2);
  CHECK(model_parameters(adapter) == std::vector<std::string>{"lm_head.weight", "lm_head.bias"});
  CHECK(adapter.parameter_count() == 2 * 32 + 11 * 8 + 11);
  model.forward(some_tokens()).sum().backward();
  CHECK(model.lm_head->weight.grad().defined());
  CHECK_FALSE(model.embed->weight.grad().defined());
}

TEST_CASE("switching adapters switches what modules_to_save trained", "[attach]") {
  GraftDecoder model;
  const auto before = snapshot(model);
  const at::Tensor base = model.lm_head->weight.detach().clone();
  auto first = attach(model, kLora,
                      {.targets = {"q_proj"}, .modules_to_save = {"lm_head"}, .name = "first"});
  randomise(first.parameters(), 1);
  const at::Tensor trained = model.lm_head->weight.detach().clone();
  auto second = attach(model, kLora,
                       {.targets = {"q_proj"}, .modules_to_save = {"lm_head"}, .name = "second"});
  CHECK(at::equal(model.lm_head->weight, base));
  randomise(second.parameters(), 2);
  first.set_active();
  CHECK(at::equal(model.lm_head->weight, trained));
  CHECK(model.lm_head->weight.requires_grad());
  first.disable();
  CHECK(at::equal(model.lm_head->weight, base));
  CHECK_FALSE(model.lm_head->weight.requires_grad());
  first.enable();
  CHECK(at::equal(model.lm_head->weight, trained));
  first.detach();
  second.detach();
  CHECK(holds_exactly(model, before));
}

TEST_CASE("biases are trained as the options say", "[attach]") {
  const auto trained = [](TrainedBias bias) {
    GraftDecoder model;
    return model_parameters(attach(model, kLora, {.targets = {"q_proj", "v_proj"}, .bias = bias}));
  };
  using Names = std::vector<std::string>;
  CHECK(trained(TrainedBias::none).empty());
  CHECK(trained(TrainedBias::adapted_layers) ==
        Names{"model.layers.0.q_proj.bias", "model.layers.1.q_proj.bias"});
  CHECK(trained(TrainedBias::all) ==
        Names{"model.layers.0.q_proj.bias", "model.layers.0.o_proj.bias",
              "model.layers.1.q_proj.bias", "model.layers.1.o_proj.bias", "lm_head.bias"});
}

TEST_CASE("trained modules and biases come back from the file", "[attach]") {
  const graft::testing::TempFolder folder;
  GraftDecoder model;
  auto adapter =
      attach(model, kLora,
             {.targets = {"q_proj"}, .modules_to_save = {"lm_head"}, .bias = TrainedBias::all});
  randomise(adapter.parameters());
  const at::Tensor expected = model.forward(some_tokens());
  adapter.save(folder.path());
  const auto file = graft::io::SafetensorsFile::open(folder / "adapter_model.safetensors");
  const std::string prefix = "base_model.model.";
  for (const char* key : {"lm_head.weight", "lm_head.bias", "model.layers.0.o_proj.bias",
                          "model.layers.0.q_proj.base_layer.bias"})
    CHECK(file.tensor(prefix + key).numel() > 0);

  GraftDecoder other;
  auto loaded = attach_from(other, folder.path());
  CHECK(at::equal(other.forward(some_tokens()), expected));
  CHECK(loaded.parameter_count() == adapter.parameter_count());
}

TEST_CASE("an inactive adapter saves its own modules, not the active one's", "[attach]") {
  const graft::testing::TempFolder folder;
  GraftDecoder model;
  auto first = attach(model, kLora,
                      {.targets = {"q_proj"}, .modules_to_save = {"lm_head"}, .name = "first"});
  randomise(first.parameters());
  const at::Tensor trained = model.lm_head->weight.detach().clone();
  model.forward(some_tokens());
  auto second = attach(model, kLora, {.targets = {"q_proj"}, .name = "second"});
  first.save(folder.path());
  GraftDecoder other;
  auto loaded = attach_from(other, folder.path());
  CHECK(at::equal(other.lm_head->weight, trained));
}

TEST_CASE("a model moved to another type keeps what modules_to_save trained", "[attach]") {
  const graft::testing::TempFolder folder;
  GraftDecoder model;
  auto adapter = attach(model, kLora, {.targets = {"q_proj"}, .modules_to_save = {"lm_head"}});
  model.to(at::kDouble);
  const at::Tensor base = model.lm_head->weight.detach().clone();
  randomise(adapter.parameters());
  const at::Tensor trained = model.lm_head->weight.detach().clone();
  const at::Tensor expected = model.forward(some_tokens());
  adapter.save(folder.path());
  adapter.disable();
  CHECK(model.lm_head->weight.scalar_type() == at::kDouble);
  CHECK(at::equal(model.lm_head->weight, base));
  adapter.enable();
  CHECK(at::equal(model.lm_head->weight, trained));
  GraftDecoder other;
  other.to(at::kDouble);
  auto loaded = attach_from(other, folder.path());
  CHECK(at::equal(other.forward(some_tokens()), expected));
}

TEST_CASE("a module to save that shares its weight is refused", "[attach]") {
  GraftDecoder model;
  model.register_parameter("tied", model.lm_head->weight);
  CHECK(contains(error_of([&] {
                   attach(model, kLora, {.targets = {"q_proj"}, .modules_to_save = {"lm_head"}});
                 }),
                 "must not share a weight with another module; got 'lm_head.weight' shared with "
                 "'tied'"));
}
