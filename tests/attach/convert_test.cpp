#include <graft/adapters/adalora.h>
#include <graft/adapters/dylora.h>
#include <graft/adapters/lora_xs.h>
#include <graft/adapters/randlora.h>
#include <graft/adapters/sora.h>
#include <graft/adapters/vera.h>
#include <graft/attach/attach.h>
#include <graft/io/adapter_config.h>
#include <graft/io/convert_adapter.h>

#include "tests/io/file_helpers.h"
#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::attach;
using graft::attach_from;
using graft::AttachedAdapter;
using graft::io::convert_to_lora;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::testing::randomise;
using graft::testing::some_tokens;
using graft::testing::TempFolder;
namespace adapters = graft::adapters;
namespace fs = std::filesystem;

template <class Method>
std::vector<Method*> layers_of(const AttachedAdapter& adapter) {
  std::vector<Method*> layers;
  for (const auto& layer : adapter.layers())
    layers.push_back(dynamic_cast<Method*>(layer.adapter.get()));
  return layers;
}

// What a fresh model computes with the adapter of that folder.
at::Tensor output_with(const fs::path& folder) {
  GraftDecoder model;
  auto adapter = attach_from(model, folder);
  CHECK(adapter.recipe().method() == "lora");
  model.eval();
  return model.forward(some_tokens());
}

// Trains nothing: random values, saved as the method, converted, compared.
template <class Options>
void check_conversion(const Options& options,
                      const graft::AttachOptions& where = {.targets = {"q_proj", "v_proj"}}) {
  const TempFolder folder;
  GraftDecoder model;
  auto adapter = attach(model, options, where);
  randomise(adapter.parameters());
  model.eval();
  const at::Tensor expected = model.forward(some_tokens());
  adapter.save(folder.path() / "own");
  const auto done = convert_to_lora(folder.path() / "own", folder.path() / "plain");
  CHECK(done.layers == 4);
  CHECK(distance(output_with(folder.path() / "plain"), expected) < 1e-5);
}

}  // namespace

TEST_CASE("a converted folder is a plain LoRA with the same output", "[attach][convert]") {
  check_conversion(adapters::SoraOptions{.rank = 3});
  check_conversion(adapters::DyloraOptions{.rank = 3});
  check_conversion(adapters::LoraXsOptions{.rank = 3});
  check_conversion(adapters::AdaLoraOptions{.init_rank = 4, .target_rank = 2, .total_step = 10});
}

TEST_CASE("a layer's own rank and alpha survive the conversion", "[attach][convert]") {
  check_conversion(adapters::SoraOptions{.rank = 3, .alpha = 5},
                   {.targets = {"q_proj", "v_proj"},
                    .rank_pattern = {{"layers.0.q_proj", 2}},
                    .alpha_pattern = {{"layers.1.v_proj", 11}, {"layers.0.q_proj", 7}}});
  check_conversion(adapters::LoraXsOptions{.rank = 3, .alpha = 5},
                   {.targets = {"q_proj", "v_proj"}, .alpha_pattern = {{"layers.1.v_proj", 11}}});
}

TEST_CASE("pruning leaves out what is switched off, whole layers too", "[attach][convert]") {
  const TempFolder folder;
  GraftDecoder model;
  auto adapter = attach(model, adapters::SoraOptions{.rank = 4}, {.targets = {"q_proj", "v_proj"}});
  randomise(adapter.parameters());
  {
    const at::NoGradGuard no_grad;
    const auto layers = layers_of<adapters::SoraImpl>(adapter);
    layers[0]->lora_gate.slice(0, 1, 3).zero_();
    layers[1]->lora_gate.zero_();
  }
  model.eval();
  const at::Tensor expected = model.forward(some_tokens());
  adapter.save(folder.path() / "own");
  const auto done = convert_to_lora(folder.path() / "own", folder.path() / "plain");
  CHECK(done.layers == 3);
  CHECK(done.dropped == 1);
  CHECK(done.largest_rank == 4);
  CHECK(done.parameters == (2 + 4 + 4) * 16);
  CHECK(distance(output_with(folder.path() / "plain"), expected) < 1e-5);
}

TEST_CASE("a truncated DyLoRA is the adapter at that rank", "[attach][convert]") {
  const TempFolder folder;
  GraftDecoder model;
  auto adapter =
      attach(model, adapters::DyloraOptions{.rank = 4}, {.targets = {"q_proj", "v_proj"}});
  randomise(adapter.parameters());
  model.eval();
  model.forward(some_tokens());
  adapter.save(folder.path() / "own");
  for (const int64_t rank : {1, 3, 4}) {
    adapters::set_dylora_rank(model, rank);
    const fs::path plain = folder.path() / std::to_string(rank);
    CHECK(convert_to_lora(folder.path() / "own", plain, {.rank = rank}).largest_rank == rank);
    CHECK(at::equal(output_with(plain), model.forward(some_tokens())));
  }
}

TEST_CASE("conversions that make no sense are refused", "[attach][convert]") {
  const TempFolder folder;
  const auto saved = [&](const auto& options, const char* name) {
    GraftDecoder model;
    auto adapter = attach(model, options, {.targets = {"q_proj"}});
    model.forward(some_tokens());
    adapter.save(folder.path() / name);
    return folder.path() / name;
  };
  const auto refusal = [&](const fs::path& from, int64_t rank = 0) {
    return error_of([&] { convert_to_lora(from, folder.path() / "out", {.rank = rank}); });
  };
  CHECK(contains(refusal(saved(adapters::RandLoraOptions{.rank = 2}, "rand")),
                 "[convert] the method must have a plain LoRA form; got randlora"));
  const fs::path sora = saved(adapters::SoraOptions{.rank = 2}, "sora");
  CHECK(contains(refusal(sora, 1), "only a method whose ranks nest (dylora)"));
  CHECK(contains(refusal(sora, -1), "rank must be at least 1; got -1"));
  CHECK(contains(error_of([&] { convert_to_lora(sora, sora); }), "another than the input"));
  const fs::path dylora = saved(adapters::DyloraOptions{.rank = 2}, "dylora");
  CHECK(contains(refusal(dylora, 3), "a rank to cut to must be in [1, 2]; got 3"));
  CHECK_FALSE(fs::exists(folder.path() / "out"));

  GraftDecoder model;
  auto adapter = attach(model, adapters::SoraOptions{.rank = 2}, {.targets = {"q_proj"}});
  {
    const at::NoGradGuard no_grad;
    for (auto* layer : layers_of<adapters::SoraImpl>(adapter)) layer->lora_gate.zero_();
  }
  model.forward(some_tokens());
  adapter.save(folder.path() / "empty");
  CHECK(contains(refusal(folder.path() / "empty"), "some layer must have an update left"));
}
