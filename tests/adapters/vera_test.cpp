#include <ATen/ATen.h>
#include <graft/adapters/vera.h>
#include <graft/attach/attach.h>
#include <graft/io/safetensors.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "tests/adapters/random_bases.h"
#include "tests/support/adapter_kit.h"
#include "tests/support/method_tests.h"

namespace {

using graft::attach;
using graft::attach_from;
using graft::adapters::VeraImpl;
using graft::adapters::VeraOptions;
using graft::nn::FrozenLinear;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::make_random;
using graft::testing::random;
using graft::testing::randomise;
using graft::testing::some_linear;
using graft::testing::TwoLayers;

VeraImpl& vera_of(const graft::AttachedAdapter& adapter, size_t layer) {
  return static_cast<VeraImpl&>(*adapter.layers()[layer].adapter);
}

}  // namespace

TEST_CASE("VeRA keeps the promises of adapters", "[adapters][vera]") {
  graft::testing::MethodCase vera;
  vera.method = "vera";
  vera.recipe = [](int64_t rank) {
    return graft::adapters::make_recipe(VeraOptions{.rank = rank, .d_initial = 0.5});
  };
  vera.count = [](const graft::nn::FrozenLayer& layer, int64_t rank) {
    return rank + graft::nn::weight_of(layer).size(0);
  };
  vera.zero_at_first = [](const std::string&) { return std::vector<std::string>{"vera_lambda_d"}; };
  vera.unfit = {"Embedding", "Conv"};
  graft::testing::run_adapter_kit(vera);
}

TEST_CASE("VeRA is W x + b + p * (B (d * (A x)))", "[adapters][vera]") {
  const FrozenLinear base = some_linear();
  VeraImpl vera(base, {.rank = 9}, {"q_proj", 1});  // more units than the layer is wide
  randomise(vera.parameters());
  const at::Tensor x = random({3, 4});
  at::Tensor expected = at::linear(x, base.weight, base.bias);
  for (int64_t t = 0; t < 3; ++t)
    for (int64_t i = 0; i < 6; ++i)
      for (int64_t a = 0; a < 9; ++a)
        for (int64_t j = 0; j < 4; ++j)
          expected[t][i] +=
              (vera.lambda_b[i] * vera.B[i][a] * vera.lambda_d[a] * vera.A[a][j] * x[t][j])
                  .detach();
  CHECK(distance(vera.forward(base, x), expected) < 1e-13);
  CHECK(distance(at::linear(x, vera.merged_weight(base), base.bias), expected) < 1e-13);
}

TEST_CASE("VeRA's dropout hits the branch alone, in training alone", "[adapters][vera]") {
  const FrozenLinear base = some_linear();
  VeraImpl vera(base, {.rank = 3, .dropout = 0.5}, {"q_proj", 1});
  randomise(vera.parameters());
  const at::Tensor x = random({8, 4});
  const auto site = static_cast<uint32_t>(graft::random::hash_name("q_proj"));
  for (const uint32_t step : {0, 1}) {
    const at::Tensor dropped = graft::ops::apply_dropout(x, {0.5, {1, site, step}});
    CHECK(distance(vera.forward(base, x),
                   at::linear(x, base.weight, base.bias) + dropped.mm(vera.delta().t())) < 1e-13);
  }
  CHECK(vera.counters() == std::vector<int64_t>{2});
  vera.eval();
  CHECK(distance(vera.forward(base, x), at::linear(x, vera.merged_weight(base), base.bias)) <
        1e-13);
  vera.set_counters({7});
  CHECK(vera.counters() == std::vector<int64_t>{7});
  CHECK(contains(error_of([&] { vera.set_counters({}); }), "one counter a layer"));
}

TEST_CASE("VeRA's layers share one pair, which follows from the key alone", "[adapters][vera]") {
  TwoLayers model, other, third;
  auto a = attach(model, VeraOptions{.rank = 3, .projection_key = 4}, {.seed = 1});
  auto b = attach(other, VeraOptions{.rank = 3, .projection_key = 4}, {.seed = 2});
  auto c = attach(third, VeraOptions{.rank = 3, .projection_key = 5}, {.seed = 1});
  CHECK(vera_of(a, 0).A.data_ptr() == vera_of(a, 1).A.data_ptr());
  CHECK(vera_of(a, 0).B.data_ptr() == vera_of(a, 1).B.data_ptr());
  CHECK(vera_of(a, 0).A.sizes() == at::IntArrayRef({3, 10}));
  CHECK(vera_of(a, 0).B.sizes() == at::IntArrayRef({10, 3}));
  CHECK(at::equal(vera_of(a, 0).A, vera_of(b, 0).A));
  CHECK(at::equal(vera_of(a, 0).B, vera_of(b, 0).B));
  CHECK_FALSE(at::equal(vera_of(a, 0).A, vera_of(c, 0).A));
  CHECK(vera_of(a, 0).lambda_d.min().item<double>() == vera_of(a, 0).lambda_d.max().item<double>());
  CHECK(std::abs(vera_of(a, 0).lambda_d[0].item<double>() - 0.1) < 1e-7);
  // Moved as a whole, the layers still hold one pair.
  model.to(at::kDouble);
  CHECK(vera_of(a, 0).A.scalar_type() == at::kDouble);
  CHECK(vera_of(a, 0).A.data_ptr() == vera_of(a, 1).A.data_ptr());
}

TEST_CASE("a layer of another rank has a pair of its own, which the file holds",
          "[adapters][vera]") {
  const graft::testing::TempFolder folder;
  TwoLayers model, other;
  auto adapter = attach(model, VeraOptions{.rank = 3}, {.rank_pattern = {{"second", 2}}});
  CHECK(vera_of(adapter, 1).A.sizes() == at::IntArrayRef({2, 10}));
  randomise(adapter.parameters());
  const at::Tensor expected = model.forward(model.input());
  adapter.save(folder.path());
  const auto file = graft::io::SafetensorsFile::open(folder / "adapter_model.safetensors");
  CHECK(file.tensor("base_model.vera_B").sizes() == at::IntArrayRef({10, 3}));
  CHECK(file.tensor("base_model.vera_B.rank_2").sizes() == at::IntArrayRef({10, 2}));
  auto loaded = attach_from(other, folder.path());
  CHECK(at::equal(other.forward(other.input()), expected));
}

TEST_CASE("PEFT's VeRA folders open, with and without the pair, and compute what PEFT does",
          "[adapters][vera][golden]") {
  graft::testing::check_golden("vera", "vera_");
}

TEST_CASE("VeRA draws PEFT's pair, bit for bit", "[adapters][vera][golden]") {
  const graft::testing::Golden golden("vera");
  const auto file = graft::io::SafetensorsFile::open(golden.folder / "with_projection" /
                                                     "adapter_model.safetensors");
  TwoLayers model;
  auto adapter = attach(model, VeraOptions{.rank = 5, .projection_key = 3});
  CHECK(at::equal(vera_of(adapter, 0).A, file.tensor("base_model.vera_A")));
  CHECK(at::equal(vera_of(adapter, 0).B, file.tensor("base_model.vera_B")));
}

TEST_CASE("a stored VeRA layer is a plain LoRA layer", "[adapters][vera]") {
  const FrozenLinear base = some_linear();
  VeraImpl vera(base, {.rank = 3}, {"q_proj", 1});
  randomise(vera.parameters());
  graft::adapters::StoredLayer layer;
  for (const auto& [suffix, tensor] : vera.file_tensors()) layer[suffix] = tensor.detach();
  const auto& entry = graft::adapters::vera_entry();
  const auto recipe = graft::adapters::make_recipe(VeraOptions{.rank = 3});
  CHECK(contains(error_of([&] { entry.to_lora(*recipe, layer, 0); }),
                 "a stored layer must hold base_model.vera_A; got none"));
  layer["base_model.vera_A"] = at::cat({vera.A, random({3, 2})}, 1);  // of a wider layer
  layer["base_model.vera_B"] = at::cat({vera.B, random({5, 3})}, 0);
  CHECK(contains(error_of([&] { entry.to_lora(*recipe, layer, 0); }),
                 "the base model must be given to have a plain LoRA form"));
  layer["in_features"] = at::tensor(4);
  const auto lora = entry.to_lora(*recipe, layer, 0);
  CHECK(distance(lora.B.mm(lora.A) * lora.scale, vera.delta()) < 1e-13);
  CHECK(contains(error_of([&] { entry.to_lora(*recipe, layer, 2); }), "do not nest; got rank=2"));
}

TEST_CASE("VeRA refuses options and layers that make no sense, in words", "[adapters][vera]") {
  const auto refusal = [](const graft::nn::FrozenLayer& base, const VeraOptions& options) {
    return error_of([&] { VeraImpl(base, options, {"q_proj", 0}); });
  };
  const graft::nn::FrozenLayer linear = some_linear();
  CHECK(refusal(linear, {.rank = 0}) == "[vera] rank must be in [1, 65536]; got rank=0");
  CHECK(contains(refusal(linear, {.rank = 65537}), "rank must be in"));
  CHECK(contains(refusal(linear, {.rank = 2, .dropout = 1}), "dropout must be in [0, 1)"));
  CHECK(contains(refusal(linear, {.rank = 2, .d_initial = 0}), "d_initial must be finite and not"));
  CHECK(contains(refusal(linear, {.rank = 2, .d_initial = std::nan("")}), "d_initial must be"));
  CHECK(contains(refusal(graft::nn::FrozenEmbedding{random({5, 4})}, {.rank = 2}),
                 "does not support Embedding (layer 'q_proj')"));
  CHECK(contains(refusal(FrozenLinear{at::ones({4, 4}, at::kLong), {}}, {.rank = 2}),
                 "the base weight must be floating point"));
  const FrozenLinear wide{at::empty({1, 1}).expand({40000, 40000}), {}};
  CHECK(contains(refusal(wide, {.rank = 60000}), "at most 2^31 numbers"));
  graft::testing::GraftDecoder decoder;
  CHECK(contains(error_of([&] { attach(decoder, VeraOptions{.rank = 2}, {.targets = {"embed"}}); }),
                 "does not support Embedding (layer 'model.embed')"));
  CHECK(contains(error_of([&] {
                   attach(decoder, VeraOptions{.rank = 2},
                          {.targets = {"q_proj"}, .alpha_pattern = {{"q_proj", 2.0}}});
                 }),
                 "this method has no alpha"));
}
