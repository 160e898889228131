#include <graft/adapters/lora.h>
#include <graft/adapters/randlora.h>
#include <graft/adapters/vera.h>
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

namespace {

using graft::adapters::RandLoraOptions;
using graft::adapters::VeraOptions;
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// A folder with an adapter whose layers share tensors, and what a model with it computes.
template <class Options>
struct SavedShared {
  explicit SavedShared(const Options& options) {
    auto adapter = attach(model, options, {.targets = {"q_proj"}});
    randomise(adapter.parameters());
    expected = model.forward(some_tokens());
    adapter.save(folder.path());
  }
  NamedTensors tensors() const {
    NamedTensors tensors;
    const auto file = graft::io::SafetensorsFile::open(folder / kWeights);
    for (const auto& name : file.names()) tensors.emplace_back(name, file.tensor(name).clone());
    return tensors;
  }
  /// Changes or drops tensors of the file.
  void rewrite(const NamedTensors& tensors) const {
    graft::io::write_safetensors(folder / kWeights, tensors);
  }
  void set(const char* key, const json& value) const {
    json config = config_of(folder.path());
    config[key] = value;
    write_config(folder.path(), config);
  }
  at::Tensor opened() const {
    GraftDecoder other;
    auto adapter = attach_from(other, folder.path());
    return other.forward(some_tokens());
  }
  std::string refusal() const {
    return error_of([&] { opened(); });
  }
  TempFolder folder;
  GraftDecoder model;
  at::Tensor expected;
};

NamedTensors without(NamedTensors tensors, const std::string& part) {
  std::erase_if(tensors, [&](const auto& item) { return contains(item.first, part); });
  return tensors;
}

at::Tensor& named(NamedTensors& tensors, const std::string& name) {
  for (auto& item : tensors)
    if (item.first == name) return item.second;
  FAIL("no tensor " << name);
  return tensors[0].second;
}

}  // namespace

TEST_CASE("what layers share is stored once, and not at all where it follows from the seed",
          "[attach][files]") {
  const SavedShared with(RandLoraOptions{.rank = 3}),
      off(RandLoraOptions{.rank = 3, .save_projection = false});
  CHECK(with.tensors().size() == 6);  // lambda and gamma of two layers, A and B
  CHECK(off.tensors().size() == 4);
  CHECK(config_of(with.folder.path())["save_projection"] == true);
  CHECK(config_of(off.folder.path())["save_projection"] == false);
  CHECK(at::equal(with.opened(), with.expected));
  CHECK(at::equal(off.opened(), off.expected));
}

TEST_CASE("a file's shared tensors win over the seed's", "[attach][files]") {
  const SavedShared saved(VeraOptions{.rank = 3});
  NamedTensors tensors = saved.tensors();
  named(tensors, "base_model.vera_A").mul_(2);
  for (const char* layer : {"0", "1"})
    named(tensors, std::string("base_model.model.model.layers.") + layer + ".q_proj.vera_lambda_d")
        .div_(2);
  saved.rewrite(tensors);
  CHECK(graft::testing::distance(saved.opened(), saved.expected) < 1e-6);
}

TEST_CASE("shared tensors that a writer stored once a layer are read", "[attach][files]") {
  const SavedShared saved(RandLoraOptions{.rank = 3});
  NamedTensors tensors = saved.tensors();
  NamedTensors copies = without(tensors, "base_model.randlora_");
  for (const char* layer : {"0", "1"})
    for (const char* name : {"randlora_A", "randlora_B"})
      copies.emplace_back(std::string("base_model.model.model.layers.") + layer + ".q_proj." + name,
                          named(tensors, std::string("base_model.") + name).clone());
  saved.rewrite(copies);  // the copies alone
  CHECK(at::equal(saved.opened(), saved.expected));
  copies.back().second.view(-1)[0] += 1;
  saved.rewrite(copies);
  CHECK(contains(saved.refusal(),
                 "copies of a shared tensor must be equal; got another "
                 "base_model.model.model.layers.1.q_proj.randlora_B than "
                 "base_model.model.model.layers.0.q_proj.randlora_B"));
}

TEST_CASE("a file without its shared tensors is refused unless they follow from its seed",
          "[attach][files]") {
  const SavedShared saved(VeraOptions{.rank = 3, .projection_key = 6});
  const NamedTensors tensors = saved.tensors();
  saved.rewrite(without(tensors, "base_model.vera_"));
  CHECK(contains(saved.refusal(), "2 missing: base_model.vera_A, base_model.vera_B"));
  saved.set("save_projection", false);
  CHECK(at::equal(saved.opened(), saved.expected));
  // An adapter of another seed cannot take the values, whatever the caller waives.
  GraftDecoder model;
  auto other = attach(model, VeraOptions{.rank = 3}, {.targets = {"q_proj"}});
  CHECK(contains(error_of([&] { other.load(saved.folder.path(), /*same_options=*/false); }),
                 "got projection_prng_key=6 for 0"));
  saved.rewrite(without(tensors, "base_model.vera_A"));
  CHECK(contains(saved.refusal(), "1 missing: base_model.vera_A"));
}

TEST_CASE("shared tensors that the configuration calls the seed's must be the seed's",
          "[attach][files]") {
  const SavedShared saved(VeraOptions{.rank = 3});
  saved.set("save_projection", false);
  CHECK(at::equal(saved.opened(), saved.expected));
  NamedTensors tensors = saved.tensors();
  named(tensors, "base_model.vera_B").view(-1)[5] += 1;
  saved.rewrite(tensors);
  CHECK(contains(saved.refusal(),
                 "with save_projection=false shared tensors must be those of "
                 "projection_prng_key; got others in base_model.vera_B"));
}

TEST_CASE("shared tensors of another size are listed", "[attach][files]") {
  const SavedShared saved(VeraOptions{.rank = 3});
  NamedTensors tensors = saved.tensors();
  at::Tensor& A = named(tensors, "base_model.vera_A");
  A = A.narrow(1, 0, 5).contiguous();
  saved.rewrite(tensors);
  CHECK(contains(saved.refusal(), "1 mis-shaped: base_model.vera_A [3, 5] for [3, 8]"));
}
