#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>
#include <graft/io/safetensors.h>

#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/io/file_helpers.h"
#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::attach;
using graft::attach_from;
using graft::adapters::LoraOptions;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::testing::holds_exactly;
using graft::testing::randomise;
using graft::testing::snapshot;
using graft::testing::some_tokens;
using graft::testing::TempFolder;
using graft::testing::TorchDecoder;
using nlohmann::json;
namespace fs = std::filesystem;

const LoraOptions kLora{.rank = 2, .alpha = 4};
constexpr const char* kWeights = "adapter_model.safetensors";

json config_of(const fs::path& folder) {
  return json::parse(std::ifstream(folder / "adapter_config.json"));
}

void write_config(const fs::path& folder, const json& config) {
  std::ofstream(folder / "adapter_config.json") << config.dump();
}

/// A folder with an adapter on q_proj, and what a model with it computes.
struct Saved {
  Saved() {
    auto adapter = attach(model, kLora, {.targets = {"q_proj"}});
    randomise(adapter.parameters());
    expected = model.forward(some_tokens());
    adapter.save(folder.path(), "a base");
  }
  TempFolder folder;
  GraftDecoder model;
  at::Tensor expected;
};

}  // namespace

TEST_CASE("a saved adapter has PEFT's keys and config", "[attach][files]") {
  const Saved saved;
  CHECK(saved.folder.list().size() == 2);
  const auto file = graft::io::SafetensorsFile::open(saved.folder / kWeights);
  CHECK(file.names().size() == 4);
  CHECK(file.tensor("base_model.model.model.layers.1.q_proj.lora_A.weight").sizes() ==
        at::IntArrayRef({2, 8}));
  CHECK(file.tensor("base_model.model.model.layers.0.q_proj.lora_B.weight").sizes() ==
        at::IntArrayRef({8, 2}));
  const json config = config_of(saved.folder.path());
  CHECK(config["peft_type"] == "LORA");
  CHECK(config["r"] == 2);
  CHECK(config["lora_alpha"] == 4);
  CHECK(config["target_modules"] == json{"q_proj"});
  CHECK(config["base_model_name_or_path"] == "a base");
}

TEST_CASE("an adapter loads into a fresh model of either kind of layer", "[attach][files]") {
  const Saved saved;
  GraftDecoder model;
  auto adapter = attach_from(model, saved.folder.path(), "loaded");
  CHECK(adapter.name() == "loaded");
  CHECK(at::equal(model.forward(some_tokens()), saved.expected));
  TorchDecoder plain;
  auto other = attach_from(plain, saved.folder.path());
  const auto active = other.activate();
  CHECK(graft::testing::distance(plain.forward(some_tokens()), saved.expected) < 1e-5);
}

TEST_CASE("load replaces an attached adapter's values", "[attach][files]") {
  const Saved saved;
  GraftDecoder model;
  auto adapter =
      attach(model, LoraOptions{.rank = 2, .alpha = 4, .dropout = 0.1}, {.targets = {"q_proj"}});
  adapter.load(saved.folder.path());
  model.eval();
  CHECK(at::equal(model.forward(some_tokens()), saved.expected));
}

TEST_CASE("an adapter that was neither run nor trained may be saved", "[attach][files]") {
  const TempFolder folder;
  const Saved saved;
  GraftDecoder model;
  auto fresh = attach(model, kLora, {.targets = {"q_proj"}, .seed = 3});
  fresh.save(folder.path());
  GraftDecoder second;
  attach_from(second, saved.folder.path()).save(folder.path());
  GraftDecoder third;
  auto loaded = attach_from(third, folder.path());
  CHECK(at::equal(third.forward(some_tokens()), saved.expected));
}

TEST_CASE("per-layer ranks and layer choices survive the file", "[attach][files]") {
  const TempFolder folder;
  GraftDecoder model;
  graft::nn::Selector targets{"q_proj", "model.layers.1.v_proj"};
  // The second key never wins here, and would after PEFT's sorting of the keys.
  auto adapter = attach(model, LoraOptions{.rank = 2, .rslora = true, .bias = true},
                        {.targets = targets,
                         .rank_pattern = {{"q_proj", 3}, {"layers.0.q_proj", 1}},
                         .alpha_pattern = {{"v_proj", 5.0}}});
  randomise(adapter.parameters());
  const at::Tensor expected = model.forward(some_tokens());
  adapter.save(folder.path());
  GraftDecoder other;
  auto loaded = attach_from(other, folder.path());
  CHECK(loaded.layers().size() == 3);
  CHECK(at::equal(other.forward(some_tokens()), expected));
}

TEST_CASE("a folder that does not fit changes nothing and lists what is wrong", "[attach][files]") {
  const Saved saved;
  GraftDecoder model;
  const auto refused = [&](const LoraOptions& lora, const graft::AttachOptions& options) {
    auto adapter = attach(model, lora, options);
    const auto before = snapshot(model);
    const std::string message = error_of([&] { adapter.load(saved.folder.path()); });
    CHECK(holds_exactly(model, before));
    adapter.detach();
    return message;
  };
  const std::string layer = "base_model.model.model.layers.";
  CHECK(contains(refused(kLora, {.targets = {"q_proj", "v_proj"}}),
                 "4 missing: " + layer + "0.v_proj.lora_A.weight"));
  CHECK(contains(refused(kLora, {.targets = {"model.layers.0.q_proj"}}),
                 "2 unexpected: " + layer + "1.q_proj.lora_A.weight"));
  CHECK(contains(refused(kLora, {.targets = {"q_proj"}, .rank_pattern = {{"1.q_proj", 1}}}),
                 "2 mis-shaped: " + layer + "1.q_proj.lora_A.weight [2, 8] for [1, 8]"));
  CHECK(contains(refused({.rank = 2, .alpha = 5}, {.targets = {"q_proj"}}),
                 "options must agree with the adapter's; got lora_alpha=4 for 5"));
  CHECK(contains(refused({.rank = 2, .alpha = 4, .rslora = true}, {.targets = {"q_proj"}}),
                 "use_rslora=false for true"));
}

TEST_CASE("attach_from that fails leaves no adapter behind", "[attach][files]") {
  const Saved saved;
  json config = config_of(saved.folder.path());
  config["target_modules"] = {"q_proj", "v_proj"};
  write_config(saved.folder.path(), config);
  GraftDecoder model;
  const auto before = snapshot(model);
  CHECK(contains(error_of([&] { attach_from(model, saved.folder.path()); }), "4 missing"));
  CHECK(holds_exactly(model, before));
  CHECK(model.blocks[0]->q_proj->slot == nullptr);
  CHECK(contains(error_of([&] { attach_from(model, saved.folder / "nothing"); }), "nothing"));
}

TEST_CASE("only finite numbers are saved", "[attach][files]") {
  const TempFolder folder;
  GraftDecoder model;
  auto adapter = attach(model, kLora, {.targets = {"q_proj"}});
  model.forward(some_tokens());
  {
    const at::NoGradGuard no_grad;
    adapter.parameters()[1][0][0] = std::numeric_limits<float>::infinity();
  }
  CHECK(contains(error_of([&] { adapter.save(folder.path()); }),
                 "must be finite; got NaN or infinity in base_model.model.model.layers.0.q_proj"));
  CHECK(folder.list().empty());
}
