#include <ATen/ATen.h>
#include <graft/adapters/lora.h>
#include <graft/adapters/paca.h>
#include <graft/io/safetensors.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "tests/adapters/random_bases.h"
#include "tests/support/adapter_kit.h"
#include "tests/support/method_tests.h"

namespace {

using namespace graft::adapters;
using namespace graft::testing;
using graft::nn::FrozenLinear;
using nlohmann::json;

// A of the plain LoRA with the same update: row a is the unit vector of column c_a.
at::Tensor unit_rows(const at::Tensor& columns, int64_t in) {
  at::Tensor A = at::zeros({columns.numel(), in}, at::kDouble);
  for (int64_t a = 0; a < columns.numel(); ++a) A[a][columns[a].item<int64_t>()] = 1.0;
  return A;
}

}  // namespace

TEST_CASE("PaCA keeps the promises of adapters", "[adapters][paca]") {
  MethodCase method;
  method.method = "paca";
  method.recipe = [](int64_t rank) { return make_recipe(PacaOptions{.rank = rank, .alpha = 3}); };
  method.count = [](const graft::nn::FrozenLayer& layer, int64_t rank) {
    return rank * graft::nn::weight_of(layer).size(0);
  };
  method.zero_at_first = [](const std::string&) { return std::vector<std::string>{}; };
  method.unfit = {"Embedding", "Conv"};
  run_adapter_kit(method);
}

TEST_CASE("PaCA trains columns of the weight", "[adapters][paca]") {
  const FrozenLinear base = some_linear(5, 7);
  PacaImpl paca(base, {.rank = 3, .alpha = 6}, {"q_proj", 1});
  randomise(paca.parameters());
  at::Tensor weight = base.weight.clone();
  for (int64_t a = 0; a < 3; ++a)
    weight.select(1, paca.paca_indices[a].item<int64_t>())
        .add_(paca.paca_weight.detach().select(1, a), 2.0);
  const at::Tensor x = random({2, 3, 7});
  CHECK(distance(paca.forward(base, x), at::linear(x, weight, base.bias)) < 1e-13);
  CHECK(distance(paca.merged_weight(base), weight) < 1e-14);
}

TEST_CASE("PaCA is LoRA with A frozen at unit vectors", "[adapters][paca]") {
  const FrozenLinear base = some_linear(5, 7);
  PacaImpl paca(base, {.rank = 2, .alpha = 5}, {"q_proj", 1});
  LoraImpl lora(base, {.rank = 2, .alpha = 5}, {"q_proj", 1});
  randomise(paca.parameters());
  {
    const at::NoGradGuard no_grad;
    lora.lora_A.copy_(unit_rows(paca.paca_indices, 7));
    lora.lora_B.copy_(paca.paca_weight);
  }
  const at::Tensor x = random({4, 7}), y = paca.forward(base, x), z = lora.forward(base, x);
  CHECK(distance(y, z) < 1e-13);
  uneven_sum(y).backward();
  uneven_sum(z).backward();
  CHECK(distance(paca.paca_weight.grad(), lora.lora_B.grad()) < 1e-13);
}

TEST_CASE("PaCA keeps r numbers a token, LoRA x itself", "[adapters][paca]") {
  const FrozenLinear base{at::ones({6, 40}), {}};
  PacaImpl paca(base, {.rank = 2}, {"q_proj", 1});
  LoraImpl lora(base, {.rank = 2}, {"q_proj", 1});
  const auto keeps_input = [&](auto& adapter) {
    at::Tensor x = at::ones({50, 40});
    const c10::weak_intrusive_ptr<c10::StorageImpl> storage(x.storage().getWeakStorageImpl());
    const at::Tensor y = adapter.forward(base, x);
    x = at::Tensor();
    return !storage.expired();
  };
  CHECK_FALSE(keeps_input(paca));
  CHECK(keeps_input(lora));
}

TEST_CASE("PaCA's columns are distinct, even and the same on every platform", "[adapters][paca]") {
  const auto columns = [](const std::string& name, uint64_t seed, int64_t rank, int64_t in) {
    return PacaImpl(FrozenLinear{at::ones({2, in}), {}}, {.rank = rank}, {name, seed}).paca_indices;
  };
  const at::Tensor found = columns("q_proj", 1, 8, 100);
  CHECK(found.scalar_type() == at::kInt);
  CHECK(found.diff().min().item<int>() > 0);
  CHECK((found.min().item<int>() >= 0 && found.max().item<int>() < 100));
  CHECK(at::equal(found, at::tensor({0, 11, 12, 16, 20, 28, 30, 79}, at::kInt)));
  CHECK_FALSE(at::equal(found, columns("k_proj", 1, 8, 100)));
  CHECK_FALSE(at::equal(found, columns("q_proj", 2, 8, 100)));
  CHECK(at::equal(columns("q_proj", 1, 9, 9), at::arange(9, at::kInt)));
  at::Tensor counts = at::zeros({10}, at::kDouble);
  for (uint64_t seed = 0; seed < 1000; ++seed)
    counts.index_add_(0, columns("q_proj", seed, 2, 10), at::ones({2}, at::kDouble));
  // 200 each: 5 deviations of a binomial with 1000 draws at 1/5.
  CHECK((counts - 200).abs().max().item<double>() < 5 * 12.7);
}

TEST_CASE("a PaCA folder holds the columns, their numbers and the size", "[adapters][paca]") {
  TwoLayers model, other;
  auto adapter = graft::attach(model, PacaOptions{.rank = 3}, {.rank_pattern = {{"second", 2}}});
  randomise(adapter.parameters());
  const at::Tensor expected = model.forward(model.input());
  const TempFolder folder;
  adapter.save(folder.path());
  const auto file = graft::io::SafetensorsFile::open(folder / "adapter_model.safetensors");
  const auto shape = [&](const std::string& key) {
    return file.tensor("base_model.model." + key).sizes().vec();
  };
  CHECK(file.names().size() == 6);
  CHECK(shape("first.paca_weight") == std::vector<int64_t>{10, 3});
  CHECK(shape("second.paca_indices") == std::vector<int64_t>{2});
  CHECK(file.tensor("base_model.model.second.paca_in_features").item<int>() == 10);
  auto loaded = graft::attach_from(other, folder.path());
  CHECK(at::equal(other.forward(other.input()), expected));
}

TEST_CASE("a stored PaCA layer is a plain LoRA layer", "[adapters][paca]") {
  const FrozenLinear base = some_linear(5, 7);
  PacaImpl paca(base, {.rank = 3, .alpha = 6}, {"q_proj", 1});
  randomise(paca.parameters());
  StoredLayer stored;
  for (const auto& [suffix, tensor] : paca.file_tensors()) stored[suffix] = tensor.detach();
  const auto to_lora = paca_entry().to_lora;
  // The options may speak of another rank: rank_pattern gave this layer its own.
  const auto recipe = make_recipe(PacaOptions{.rank = 2, .alpha = 6});
  const PlainLora plain = to_lora(*recipe, stored, 0);
  CHECK(plain.scale == 2.0);
  CHECK(at::equal(plain.A, unit_rows(paca.paca_indices, 7)));
  CHECK(distance(base.weight + plain.scale * plain.B.mm(plain.A), paca.merged_weight(base)) <
        1e-13);
  const auto error = [&](const char* key, const at::Tensor& value) {
    StoredLayer broken = stored;
    if (value.defined())
      broken[key] = value;
    else
      broken.erase(key);
    return error_of([&] { to_lora(*recipe, broken, 0); });
  };
  CHECK(contains(error_of([&] { to_lora(*recipe, stored, 1); }), "do not nest; got rank=1"));
  CHECK(contains(error("paca_indices", {}), "must hold paca_indices"));
  CHECK(contains(error("paca_indices", at::tensor({0, 1, 7}, at::kInt)),
                 "columns must be whole numbers in [0, 7)"));
  CHECK(contains(error("paca_indices", at::tensor({0, 1}, at::kInt)), "must be stored"));
}

TEST_CASE("PaCA's options go through a config and back", "[adapters][paca]") {
  const MethodEntry entry = paca_entry();
  CHECK(entry.peft_type == "PACA");
  CHECK((entry.keys.rank == "r" && entry.keys.alpha == "paca_alpha" && entry.keys.dropout.empty()));
  CHECK((entry.keys.rslora.empty() && entry.keys.init.empty()));
  json config;
  make_recipe(PacaOptions{.rank = 3, .alpha = 2.5})->write_config(config);
  const auto recipe = entry.read_config(config);
  CHECK(config.empty());
  const auto options = dynamic_cast<const RecipeOf<PacaImpl>&>(*recipe).options();
  CHECK((options.rank == 3 && options.alpha == 2.5));
  CHECK(recipe->describe() == "rank 3, alpha 2.5");
}

TEST_CASE("a converted module keeps PaCA's columns", "[adapters][paca]") {
  PacaImpl paca(some_linear(), {.rank = 3}, {"q_proj", 1});
  const at::Tensor before = paca.paca_indices.clone();
  paca.to(at::kFloat);
  for (const size_t i : {1, 2}) CHECK(paca.file_tensors()[i].tensor.scalar_type() == at::kInt);
  CHECK(at::equal(paca.paca_indices, before));
  CHECK(paca.paca_in_features.item<int>() == 4);
}

TEST_CASE("PaCA refuses what it cannot do", "[adapters][paca]") {
  const auto make = [](const PacaOptions& options) {
    return error_of([&] { PacaImpl(some_linear(), options, {"q_proj", 1}); });
  };
  CHECK(contains(make({.rank = 0}), "[paca] rank must be in [1, in]; got rank=0"));
  CHECK(
      contains(make({.rank = 5}), "rank must be in [1, in]; got rank=5 for in=4 (layer 'q_proj')"));
  CHECK(contains(make({.alpha = 0}), "alpha must be finite and not 0"));
  CHECK(contains(make({.alpha = std::nan("")}), "alpha must be finite"));
  PacaImpl paca(some_linear(), {.rank = 2}, {"q_proj", 1});
  const auto check = [&](const char* suffix, const at::Tensor& values) {
    return error_of([&] { paca.check_file_tensor(suffix, values); });
  };
  CHECK(contains(
      check("paca_indices", at::tensor({0, 4}, at::kInt)),
      "columns must be whole numbers in [0, 4); got numbers from 0 to 4 (layer 'q_proj')"));
  CHECK(contains(check("paca_in_features", at::tensor({5}, at::kInt)),
                 "a file's number of inputs must be the layer's, in=4; got 5"));
  paca.paca_indices.fill_(4);
  const at::Tensor x = at::ones({1, 4}, at::kDouble);
  CHECK(contains(error_of([&] { paca.forward(some_linear(), x); }),
                 "columns must lie in [0, 4); got 4"));
  CHECK(contains(error_of([&] { paca.merged_weight(some_linear()); }), "[paca] columns"));
}
