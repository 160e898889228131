#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/adapters/randlora.h>
#include <graft/attach/attach.h>
#include <graft/io/adapter_config.h>
#include <graft/io/safetensors.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/adapters/random_bases.h"
#include "tests/support/adapter_kit.h"
#include "tests/support/method_tests.h"

namespace {

using graft::attach;
using graft::attach_from;
using graft::adapters::RandLoraBases;
using graft::adapters::RandLoraImpl;
using graft::adapters::RandLoraOptions;
using graft::adapters::RandLoraScaling;
using graft::nn::FrozenLinear;
using graft::ops::RandLoraPairing;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::make_random;
using graft::testing::random;
using graft::testing::randomise;
using graft::testing::some_linear;
using graft::testing::TempFolder;
using graft::testing::TwoLayers;
using nlohmann::json;

RandLoraImpl& randlora_of(const graft::AttachedAdapter& adapter, size_t layer) {
  return static_cast<RandLoraImpl&>(*adapter.layers()[layer].adapter);
}

graft::testing::MethodCase kit_case(RandLoraOptions options) {
  graft::testing::MethodCase randlora;
  randlora.method = "randlora";
  randlora.recipe = [options](int64_t rank) mutable {
    options.rank = rank;
    options.alpha = static_cast<double>(rank);
    return graft::adapters::make_recipe(options);
  };
  randlora.count = [](const graft::nn::FrozenLayer& layer, int64_t rank) {
    const at::Tensor& weight = graft::nn::weight_of(layer);
    const int64_t p = std::min(weight.size(0), weight.size(1));
    return (p + rank - 1) / rank * (rank + p);
  };
  randlora.zero_at_first = [](const std::string&) {
    return std::vector<std::string>{"randlora_gamma"};
  };
  randlora.unfit = {"Embedding", "Conv"};
  return randlora;
}

json config_of(const std::filesystem::path& folder) {
  return json::parse(std::ifstream(folder / "adapter_config.json"));
}

}  // namespace

TEST_CASE("RandLoRA keeps the promises of adapters", "[adapters][randlora]") {
  graft::testing::run_adapter_kit(kit_case({}));
}

TEST_CASE("RandLoRA with the paper's pairing and scale keeps them too", "[adapters][randlora]") {
  graft::testing::run_adapter_kit(kit_case(
      {.pairing = RandLoraPairing::paper, .scaling = RandLoraScaling::paper, .projection_key = 1}));
}

TEST_CASE("RandLoRA is W x + b + s D x with D the sum over the bases", "[adapters][randlora]") {
  for (const auto& [out, in] : std::vector<std::pair<int64_t, int64_t>>{{6, 4}, {4, 7}}) {
    const FrozenLinear base = some_linear(out, in);
    RandLoraImpl randlora(base, {.rank = 3, .alpha = 2, .pairing = RandLoraPairing::paper},
                          {"q_proj", 1});
    randomise(randlora.parameters());
    CHECK(randlora.bases() == 2);
    at::Tensor D = at::zeros({std::max(out, in), 4}, at::kDouble);
    for (int64_t b = 0; b < 2; ++b)
      D += randlora.B.select(1, b)
               .mm(at::diag(randlora.lambda.select(1, b)))
               .mm(randlora.A.select(1, 0))
               .mm(at::diag(randlora.gamma[b]))
               .detach();
    const at::Tensor delta = (out >= in ? D : D.t()) * (2.0 / 3.0), x = random({3, in});
    CHECK(distance(randlora.delta(), delta) < 1e-13);
    CHECK(distance(randlora.forward(base, x),
                   at::linear(x, base.weight, base.bias) + x.mm(delta.t())) < 1e-13);
    CHECK(distance(randlora.merged_weight(base), base.weight + delta) < 1e-13);
  }
}

TEST_CASE("RandLoRA's two scales differ by sqrt(N)", "[adapters][randlora]") {
  const FrozenLinear base = some_linear();
  const auto delta = [&](RandLoraScaling scaling) {
    RandLoraImpl randlora(base, {.rank = 1, .alpha = 2, .scaling = scaling}, {"q_proj", 1});
    randomise(randlora.parameters());
    return randlora.delta();
  };
  CHECK(distance(delta(RandLoraScaling::peft), delta(RandLoraScaling::paper) * 2.0) < 1e-14);
}

TEST_CASE("RandLoRA reaches every rank up to min(in, out)", "[adapters][randlora]") {
  for (const auto pairing : {RandLoraPairing::peft, RandLoraPairing::paper}) {
    RandLoraImpl randlora(some_linear(9, 7), {.rank = 2, .pairing = pairing}, {"q_proj", 1});
    randomise(randlora.parameters());
    CHECK(at::linalg_matrix_rank(randlora.delta()).item<int64_t>() == 7);
  }
}

TEST_CASE("RandLoRA's dropout hits the branch alone, in training alone", "[adapters][randlora]") {
  const FrozenLinear base = some_linear();
  RandLoraImpl randlora(base, {.rank = 3, .alpha = 3, .dropout = 0.5}, {"q_proj", 1});
  randomise(randlora.parameters());
  const at::Tensor x = random({8, 4});
  const auto site = static_cast<uint32_t>(graft::random::hash_name("q_proj"));
  for (const uint32_t step : {0, 1}) {
    const at::Tensor dropped = graft::ops::apply_dropout(x, {0.5, {1, site, step}});
    CHECK(distance(randlora.forward(base, x), at::linear(x, base.weight, base.bias) +
                                                  dropped.mm(randlora.delta().t())) < 1e-13);
  }
  randlora.eval();
  CHECK(distance(randlora.forward(base, x),
                 at::linear(x, randlora.merged_weight(base), base.bias)) < 1e-13);
  CHECK(randlora.counters() == std::vector<int64_t>{2});
  randlora.set_counters({7});
  CHECK(randlora.counters() == std::vector<int64_t>{7});
  CHECK(contains(error_of([&] { randlora.set_counters({}); }), "one counter a layer"));
}

TEST_CASE("RandLoRA's layers share one pair of bases and start at 1 / max(N, p)",
          "[adapters][randlora]") {
  TwoLayers model;
  auto adapter = attach(model, RandLoraOptions{.rank = 3});
  const auto &first = randlora_of(adapter, 0), &second = randlora_of(adapter, 1);
  CHECK(first.A.data_ptr() == second.A.data_ptr());
  CHECK(first.B.data_ptr() == second.B.data_ptr());
  CHECK(first.A.sizes() == at::IntArrayRef({3, 1, 10}));
  CHECK(first.B.sizes() == at::IntArrayRef({10, 4, 3}));
  CHECK(at::equal(first.gamma, at::full({2, 6}, 1.0 / 6)));
  CHECK(at::equal(second.gamma, at::full({3, 7}, 1.0 / 7)));
  const RandLoraImpl narrow(some_linear(6, 1), {.rank = 4}, {"q_proj", 1});
  CHECK(at::equal(narrow.gamma, at::ones({1, 1}, at::kDouble)));
  model.to(at::kDouble);
  CHECK(first.B.data_ptr() == second.B.data_ptr());
}

// Whether this LibTorch draws bf16 numbers as the goldens' (2.15) does; 2.11 draws others.
bool draws_as_the_goldens() {
  const at::Tensor drawn = at::empty({4}, at::kBFloat16)
                               .uniform_(0.0, 1.0, at::detail::createCPUGenerator(0))
                               .to(at::kDouble);
  const at::Tensor theirs =
      at::tensor({0.49609375, 0.76953125, 0.08837890625, 0.1318359375}, at::kDouble);
  const bool same = at::equal(drawn, theirs);
  if (!same) WARN("this LibTorch draws other bf16 numbers than the goldens'; left out");
  return same;
}

TEST_CASE("RandLoRA draws PEFT's bases, bit for bit", "[adapters][randlora][golden]") {
  const graft::testing::Golden golden("randlora");
  const auto file = graft::io::SafetensorsFile::open(golden.folder / "bases.safetensors");
  for (const auto& [name, kind] : std::vector<std::pair<std::string, RandLoraBases>>{
           {"dense", RandLoraBases::dense},
           {"sparse", RandLoraBases::sparse},
           {"very_sparse", RandLoraBases::very_sparse}}) {
    if (kind == RandLoraBases::dense && !draws_as_the_goldens()) continue;
    for (const int64_t key : {0, 11}) {
      TwoLayers model;
      auto adapter =
          attach(model, RandLoraOptions{.rank = 3, .bases = kind, .projection_key = key});
      const std::string place = name + "." + std::to_string(key) + ".";
      INFO(place);
      for (const auto& [letter, tensor] :
           {std::pair("A", randlora_of(adapter, 1).A), std::pair("B", randlora_of(adapter, 1).B)}) {
        CHECK(at::equal(tensor, file.tensor(place + letter).to(at::kFloat)));
        CHECK(std::abs(tensor.std().item<double>() - 1.0) < 0.01);
      }
    }
  }
}

TEST_CASE("PEFT's RandLoRA folders open, with a copy of the bases a layer and without any",
          "[adapters][randlora][golden]") {
  const graft::testing::Golden golden("randlora");
  check_golden_folder(golden, "with_projection", "randlora_");
  if (draws_as_the_goldens()) check_golden_folder(golden, "without_projection", "randlora_");
}

TEST_CASE("RandLoRA's options survive a folder, whose type PEFT knows when it means the same",
          "[adapters][randlora]") {
  const auto saved_type = [](const RandLoraOptions& options,
                             const graft::AttachOptions& attach_options) {
    const TempFolder folder;
    TwoLayers model, other;
    auto adapter = attach(model, options, attach_options);
    randomise(adapter.parameters());
    const at::Tensor expected = model.forward(model.input());
    adapter.save(folder.path());
    auto loaded = attach_from(other, folder.path());
    CHECK(at::equal(other.forward(other.input()), expected));
    CHECK(loaded.recipe().describe() == adapter.recipe().describe());
    return config_of(folder.path())["peft_type"].get<std::string>();
  };
  CHECK(saved_type({.rank = 3, .alpha = 4}, {}) == "RANDLORA");
  CHECK(saved_type({.rank = 3, .bases = RandLoraBases::sparse}, {}) == "RANDLORA");
  CHECK(saved_type({.rank = 3,
                    .bases = RandLoraBases::very_sparse,
                    .projection_key = 9,
                    .save_projection = false},
                   {}) == "RANDLORA");
  CHECK(saved_type({.rank = 3, .pairing = RandLoraPairing::paper}, {}) == "GRAFT_RANDLORA");
  CHECK(saved_type({.rank = 3, .scaling = RandLoraScaling::paper}, {}) == "GRAFT_RANDLORA");
  CHECK(saved_type({.rank = 3}, {.alpha_pattern = {{"first", 8.0}}}) == "GRAFT_RANDLORA");
  CHECK(saved_type({.rank = 3}, {.rank_pattern = {{"second", 2}}}) == "RANDLORA");
}

TEST_CASE("randlora-paper is RandLoRA with the paper's conventions", "[adapters][randlora]") {
  json config = {{"r", 8}};
  const auto recipe = graft::adapters::find_method("randlora-paper").read_config(config);
  CHECK(recipe->describe() == "rank 8, alpha 16, the paper's pairing, scale alpha / (r sqrt(N))");
  CHECK(config.empty());
  json peft = {{"r", 8}, {"init_weights", true}};
  CHECK(graft::adapters::find_method("randlora").read_config(peft)->describe() ==
        "rank 8, alpha 640");
  json wrong = {{"randlora_pairing", "other"}};
  CHECK(contains(error_of([&] { graft::adapters::find_method("randlora").read_config(wrong); }),
                 "[randlora] randlora_pairing must be peft or paper; got 'other'"));
}

TEST_CASE("RandLoRA refuses options and layers that make no sense, in words",
          "[adapters][randlora]") {
  const auto refusal = [](const graft::nn::FrozenLayer& base, const RandLoraOptions& options) {
    return error_of([&] { RandLoraImpl(base, options, {"q_proj", 0}); });
  };
  const graft::nn::FrozenLayer linear = some_linear();
  CHECK(refusal(linear, {.rank = 0}) == "[randlora] rank must be in [1, 65536]; got rank=0");
  CHECK(contains(refusal(linear, {.rank = 2, .alpha = 0}), "alpha must be finite and not 0"));
  CHECK(contains(refusal(linear, {.rank = 2, .dropout = 1}), "dropout must be in [0, 1)"));
  CHECK(contains(refusal(graft::nn::FrozenConv{random({4, 2, 3}), {}, {1}, {0}, {1}}, {.rank = 2}),
                 "does not support Conv1d (layer 'q_proj')"));
  CHECK(contains(refusal(FrozenLinear{at::ones({4, 4}, at::kLong), {}}, {.rank = 2}),
                 "the base weight must be floating point"));
  const FrozenLinear wide{at::empty({1, 1}).expand({60000, 60000}), {}};
  CHECK(contains(refusal(wide, {}), "at most 2^31 numbers"));
  // One number cannot be scaled to unit spread.
  const FrozenLinear point{random({1, 1}), {}};
  CHECK(contains(refusal(point, {.rank = 1}), "the drawn bases must not be constant"));
}
