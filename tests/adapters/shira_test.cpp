#include <ATen/ATen.h>
#include <graft/adapters/shira.h>
#include <graft/attach/adapted.h>
#include <graft/io/safetensors.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/adapters/random_bases.h"
#include "tests/support/adapter_kit.h"
#include "tests/support/method_tests.h"

namespace {

using namespace graft::adapters;
using namespace graft::testing;
using graft::attach;
using graft::attach_from;
using graft::nn::FrozenLinear;
using nlohmann::json;

// s S as a dense matrix, entry by entry.
at::Tensor dense(const ShiraImpl& shira, int64_t out, int64_t in) {
  at::Tensor matrix = at::zeros({out, in}, at::kDouble);
  for (int64_t q = 0; q < shira.shira_weight.numel(); ++q)
    matrix[shira.shira_indices[0][q].item<int64_t>()][shira.shira_indices[1][q].item<int64_t>()] +=
        shira.scale * shira.shira_weight[q].item<double>();
  return matrix;
}

ShiraImpl& shira_of(const graft::AttachedAdapter& adapter, size_t layer) {
  return static_cast<ShiraImpl&>(*adapter.layers()[layer].adapter);
}

// The kit asks for ranks up to min(in, out), which is more than the entries allow.
int64_t fitting(int64_t rank) {
  return rank <= 2 ? rank : 1;
}

}  // namespace

TEST_CASE("SHiRA keeps the promises of adapters", "[adapters][shira]") {
  MethodCase method;
  method.method = "shira";
  method.recipe = [](int64_t rank) { return make_recipe(ShiraOptions{.rank = fitting(rank)}); };
  method.count = [](const graft::nn::FrozenLayer& layer, int64_t rank) {
    const at::Tensor& weight = graft::nn::weight_of(layer);
    return fitting(rank) * (weight.size(0) + weight.size(1));
  };
  method.zero_at_first = [](const std::string&) { return std::vector<std::string>{}; };
  method.unfit = {"Embedding", "Conv"};
  run_adapter_kit(method);
}

TEST_CASE("SHiRA is x (W + s S)^T + b", "[adapters][shira]") {
  const FrozenLinear base = some_linear();
  ShiraImpl shira(base, {.rank = 1}, {"q_proj", 1});
  randomise(shira.parameters());
  const at::Tensor x = random({3, 4});
  for (const double scale : {1.0, 0.5, 0.0}) {
    shira.scale = scale;
    const at::Tensor weight = base.weight + dense(shira, 6, 4);
    CHECK(distance(shira.forward(base, x), at::linear(x, weight, base.bias)) < 1e-13);
    CHECK(distance(shira.merged_weight(base), weight) < 1e-13);
  }
}

TEST_CASE("SHiRA's positions are distinct, ascending and reproducible", "[adapters][shira]") {
  const FrozenLinear base = some_linear(20, 30);
  const auto places = [&](const std::string& name, uint64_t seed, const ShiraOptions& options) {
    const ShiraImpl shira(base, options, {name, seed});
    return shira.shira_indices[0].to(at::kLong) * 30 + shira.shira_indices[1];
  };
  const at::Tensor found = places("q_proj", 1, {.rank = 3});
  CHECK(found.numel() == 150);
  CHECK(found.diff().min().item<int64_t>() > 0);
  CHECK(at::equal(found, places("q_proj", 1, {.rank = 3})));
  CHECK_FALSE(at::equal(found, places("k_proj", 1, {.rank = 3})));
  CHECK_FALSE(at::equal(found, places("q_proj", 2, {.rank = 3})));
  // With a seed of their own they are PEFT's: the same in every layer and run.
  const ShiraOptions seeded{.rank = 3, .random_seed = 4};
  CHECK(at::equal(places("q_proj", 1, seeded), places("k_proj", 2, seeded)));
}

TEST_CASE("SHiRA draws PEFT's positions, bit for bit", "[adapters][shira][golden]") {
  const auto file = graft::io::SafetensorsFile::open(std::filesystem::path(GRAFT_GOLDENS) /
                                                     "shira" / "seeds.safetensors");
  CHECK(file.names().size() == 5);
  for (const auto& name : file.names()) {
    INFO(name);
    long long out = 0, in = 0, rank = 0, seed = 0;
    REQUIRE(std::sscanf(name.c_str(), "%lld.%lld.%lld.%lld", &out, &in, &rank, &seed) == 4);
    const ShiraImpl shira(FrozenLinear{at::ones({out, in}), {}},
                          {.rank = rank, .random_seed = seed}, {"q_proj", 1});
    CHECK(at::equal(shira.shira_indices, file.tensor(name)));
  }
}

TEST_CASE("the magnitude mask takes the largest weights", "[adapters][shira]") {
  const FrozenLinear base = some_linear(8, 9);
  const ShiraImpl shira(base, {.rank = 2, .mask = "magnitude"}, {"q_proj", 1});
  const at::Tensor chosen = base.weight.abs().index(
      {shira.shira_indices[0].to(at::kLong), shira.shira_indices[1].to(at::kLong)});
  const at::Tensor sorted = std::get<0>(base.weight.abs().flatten().sort(0, /*descending=*/true));
  CHECK(at::equal(std::get<0>(chosen.sort(0, true)), sorted.narrow(0, 0, 34)));
}

TEST_CASE("PEFT's SHiRA folder opens and computes what PEFT does", "[adapters][shira][golden]") {
  const Golden golden("shira");
  TwoLayers model;
  golden.load_base(model);
  auto adapter = attach_from(model, golden.folder / "seeded");
  const at::Tensor x = golden.file.tensor("x").clone().set_requires_grad(true);
  const at::Tensor y = model.forward(x);
  CHECK(distance(y, golden.file.tensor("y")) < 1e-6);
  (y * golden.file.tensor("c")).sum().backward();
  CHECK(distance(x.grad(), golden.file.tensor("grad.x")) < 1e-5);
  for (const auto& layer : adapter.layers())
    CHECK(distance(static_cast<ShiraImpl&>(*layer.adapter).shira_weight.grad(),
                   golden.file.tensor("grad." + layer.name + ".shira_weight")) < 1e-5);
}

TEST_CASE("SHiRA's folders hold what PEFT's do", "[adapters][shira][golden]") {
  const Golden golden("shira");
  for (const std::string name : {"seeded", "custom"}) {
    INFO(name);
    TwoLayers model;
    auto adapter = attach_from(model, golden.folder / name);
    const TempFolder again;
    adapter.save(again.path());
    const auto theirs =
        graft::io::SafetensorsFile::open(golden.folder / name / "adapter_model.safetensors");
    const auto ours = graft::io::SafetensorsFile::open(again / "adapter_model.safetensors");
    CHECK(ours.names().size() == theirs.names().size());
    for (const auto& key : theirs.names()) {
      INFO(key);
      CHECK(ours.tensor(key).scalar_type() == theirs.tensor(key).scalar_type());
      CHECK(at::equal(ours.tensor(key), theirs.tensor(key)));
    }
    const auto config = [](const std::filesystem::path& folder) {
      std::ifstream file(folder / "adapter_config.json");
      return json::parse(file);
    };
    const json expected = config(golden.folder / name), found = config(again.path());
    for (const char* key :
         {"peft_type", "r", "mask_type", "random_seed", "init_weights", "fan_in_fan_out"})
      CHECK(found.at(key) == expected.at(key));
  }
  // The seeded positions are those that attach draws.
  TwoLayers model, other;
  auto read = attach_from(model, golden.folder / "seeded");
  auto drawn = attach(other, ShiraOptions{.rank = 2, .random_seed = 5});
  for (size_t i : {0, 1})
    CHECK(at::equal(shira_of(read, i).shira_indices, shira_of(drawn, i).shira_indices));
}

TEST_CASE("a converted module keeps SHiRA's positions", "[adapters][shira]") {
  const FrozenLinear base = some_linear();
  ShiraImpl shira(base, {.rank = 1}, {"q_proj", 1});
  const at::Tensor before = shira.shira_indices.clone();
  shira.to(at::kFloat);
  CHECK(shira.file_tensors()[1].tensor.scalar_type() == at::kInt);
  CHECK(at::equal(shira.shira_indices, before));
  shira.to(at::kBFloat16);
  CHECK(contains(
      error_of([&] { shira.file_tensors(); }),
      "positions must not be converted to a type of 16 bits; got BFloat16 (layer 'q_proj')"));
}

TEST_CASE("a cloned Adapted layer has SHiRA's positions too", "[adapters][shira]") {
  graft::Adapted<torch::nn::LinearImpl, ShiraImpl> layer(torch::nn::LinearOptions(5, 6),
                                                         {.rank = 1}, "q_proj", 3);
  randomise(layer.method().parameters());
  const auto copy =
      std::dynamic_pointer_cast<graft::Adapted<torch::nn::LinearImpl, ShiraImpl>>(layer.clone());
  REQUIRE(copy);
  const at::Tensor x = at::randn({2, 5});
  CHECK(at::equal(copy->method().shira_indices, layer.method().shira_indices));
  CHECK(at::equal(copy->forward(x), layer.forward(x)));
}

TEST_CASE("SHiRA's options go through a config and back", "[adapters][shira]") {
  const MethodEntry entry = shira_entry();
  CHECK(entry.peft_type == "SHIRA");
  CHECK((entry.keys.rank == "r" && entry.keys.alpha.empty() && entry.keys.dropout.empty()));
  CHECK((entry.keys.rslora.empty() && entry.keys.init.empty()));
  CHECK_FALSE(entry.to_lora);
  json config;
  make_recipe(ShiraOptions{.rank = 3, .mask = "magnitude", .random_seed = 9, .init_zero = false})
      ->write_config(config);
  config.erase("fan_in_fan_out");
  const auto recipe = entry.read_config(config);
  CHECK(config.empty());
  const auto options = dynamic_cast<const RecipeOf<ShiraImpl>&>(*recipe).options();
  CHECK((options.rank == 3 && options.mask == "magnitude" && options.random_seed == 9));
  CHECK_FALSE(options.init_zero);
  CHECK(recipe->describe() == "rank 3, mask magnitude, seed 9, random values");
  json empty = json::object();
  const auto defaults =
      dynamic_cast<const RecipeOf<ShiraImpl>&>(*entry.read_config(empty)).options();
  CHECK((defaults.rank == 32 && defaults.mask == "random" && defaults.init_zero));
  CHECK_FALSE(defaults.random_seed);
}

TEST_CASE("init_weights off starts from normal numbers", "[adapters][shira]") {
  const FrozenLinear base = some_linear(40, 50);
  const ShiraImpl zero(base, {.rank = 20}, {"q_proj", 1}),
      normal(base, {.rank = 20, .init_zero = false}, {"q_proj", 1});
  CHECK(zero.shira_weight.count_nonzero().item<int64_t>() == 0);
  CHECK(std::abs(normal.shira_weight.std().item<double>() - 1) < 0.1);
}

TEST_CASE("SHiRA refuses what it cannot do", "[adapters][shira]") {
  const auto make = [](const ShiraOptions& options) {
    return error_of([&] { ShiraImpl(some_linear(), options, {"q_proj", 1}); });
  };
  CHECK(contains(make({.rank = 0}), "[shira] rank must be at least 1; got rank=0"));
  CHECK(contains(
      make({.rank = 3}),
      "rank must be at most in * out / (in + out), all entries of the weight; got rank=3 for in=4, "
      "out=6 (layer 'q_proj')"));
  CHECK(contains(make({.rank = int64_t{1} << 62}), "got rank=4611686018427387904"));
  CHECK(contains(make({.rank = 1, .mask = "leading"}),
                 "mask must be random or magnitude to choose positions; got 'leading'"));
  ShiraImpl shira(some_linear(), {.rank = 1}, {"q_proj", 1});
  const auto check = [&](const at::Tensor& values) {
    return error_of([&] { shira.check_file_tensor("shira_indices", values); });
  };
  CHECK(contains(check(at::tensor({6, 0}, at::kInt).view({2, 1})),
                 "rows of trained entries must be whole numbers in [0, 6); got numbers from 6 to 6 "
                 "(layer 'q_proj')"));
  CHECK(contains(check(at::tensor({5, 4}, at::kInt).view({2, 1})), "columns of trained entries"));
  CHECK(contains(check(at::tensor({-1, 0}, at::kInt).view({2, 1})), "from -1"));
  CHECK(contains(check(at::tensor({0.5, 0.0}).view({2, 1})), "whole numbers"));
  CHECK(contains(check(at::full({2, 1}, std::nan(""))), "whole numbers"));
  shira.check_file_tensor("shira_indices", at::tensor({5.0, 3.0}).view({2, 1}));  // as on Windows
  // Without that check, the first use refuses.
  shira.shira_indices.fill_(7);
  const at::Tensor x = at::ones({1, 4}, at::kDouble);
  CHECK(contains(error_of([&] { shira.forward(some_linear(), x); }),
                 "rows must lie in [0, 6); got 7"));
  CHECK(contains(error_of([&] { shira.merged_weight(some_linear()); }), "got 7"));
}
