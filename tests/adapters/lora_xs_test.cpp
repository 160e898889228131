#include <ATen/ATen.h>
#include <graft/adapters/lora_xs.h>
#include <graft/core/random.h>
#include <graft/init/named_start.h>
#include <graft/io/safetensors.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/support/adapter_kit.h"
#include "tests/support/method_tests.h"

namespace {

using namespace graft::adapters;
using namespace graft::testing;
using graft::nn::FrozenConv;
using graft::nn::FrozenEmbedding;
using graft::nn::FrozenLinear;
using nlohmann::json;

LoraXsImpl make(const graft::nn::FrozenLayer& base, const LoraXsOptions& options) {
  return make_random<LoraXsImpl>(base, options);
}

MethodCase kit_case(double r_std) {
  MethodCase method;
  method.method = "lora-xs";
  method.recipe = [r_std](int64_t rank) {
    return make_recipe(LoraXsOptions{.rank = rank, .alpha = 3, .r_std = r_std});
  };
  method.count = [](const graft::nn::FrozenLayer&, int64_t rank) { return rank * rank; };
  method.zero_at_first = [](const std::string&) { return std::vector<std::string>{}; };
  method.unfit_layers = {"groups"};
  return method;
}

// The layer as a matrix [out, in (* kernel)].
at::Tensor dense(const graft::nn::FrozenLayer& base) {
  const at::Tensor& weight = graft::nn::weight_of(base);
  return std::holds_alternative<FrozenEmbedding>(base) ? weight.t() : weight.flatten(1);
}

}  // namespace

TEST_CASE("LoRA-XS from R = 0 keeps the promises of adapters", "[adapters][lora-xs]") {
  run_adapter_kit(kit_case(0.0));
}

TEST_CASE("LoRA-XS from a random R keeps all but the start", "[adapters][lora-xs]") {
  MethodCase method = kit_case(0.1);
  method.starts_as_base = false;
  run_adapter_kit(method);
}

TEST_CASE("LoRA-XS on a Linear is W x + b + s B R A x", "[adapters][lora-xs]") {
  const FrozenLinear base = some_linear();
  LoraXsImpl adapter = make(base, {.rank = 3, .alpha = 6});
  const at::Tensor x = random({2, 5, 4});
  const at::Tensor weight =
      base.weight + 2.0 * adapter.lora_B.mm(adapter.lora_R).mm(adapter.lora_A);
  CHECK(distance(adapter.forward(base, x), at::linear(x, weight, base.bias)) < 1e-13);
  CHECK(distance(adapter.merged_weight(base), weight) < 1e-13);
}

TEST_CASE("B A is the best approximation of W of its rank, on every kind of layer",
          "[adapters][lora-xs]") {
  at::manual_seed(4);
  const std::vector<std::pair<graft::nn::FrozenLayer, std::vector<int64_t>>> layers = {
      {some_linear(), {3, 4}},
      {some_linear(4, 7), {3, 7}},
      {FrozenEmbedding{random({7, 5})}, {3, 7}},
      {FrozenConv{random({4, 3, 2}), {}, {1}, {0}, {1}}, {3, 3, 2}},
      {FrozenConv{random({5, 2, 2, 3}), {}, {1, 1}, {0, 0}, {1, 1}}, {3, 2, 2, 3}}};
  for (const auto& [base, shape] : layers) {
    INFO(graft::nn::kind_name(base));
    const auto report = std::make_shared<graft::init::LayerReport>();
    const LoraXsImpl adapter(base, {.rank = 3}, {"q_proj", 1, true, nullptr, nullptr, report});
    const at::Tensor A = adapter.lora_A.flatten(1), B = adapter.lora_B.flatten(1), W = dense(base);
    CHECK(adapter.lora_A.sizes() == at::IntArrayRef(shape));
    CHECK(distance(B.t().mm(B), at::eye(3)) < 1e-13);
    const at::Tensor gram = A.mm(A.t());  // S_r^2
    CHECK(distance(gram, gram.diagonal().diag()) < 1e-12);
    CHECK(gram.diagonal().diff().max().item<double>() < 0);
    const at::Tensor values = at::linalg_svdvals(W), rest = W - B.mm(A);
    CHECK(distance(gram.diagonal().sqrt(), values.narrow(0, 0, 3)) < 1e-12);
    // Eckart-Young: what is left over has the other singular values.
    CHECK(distance(rest.square().sum(), values.slice(0, 3).square().sum()) < 1e-12);
    const double left = (rest.square().sum() / W.square().sum()).item<double>();
    CHECK(std::abs(report->explained - (1 - left)) < 1e-12);
  }
}

TEST_CASE("LoRA-XS on a Conv1d is the convolution with W + s B R A", "[adapters][lora-xs]") {
  at::manual_seed(5);
  const FrozenConv base{random({4, 3, 3}), random({4}), {2}, {1}, {2}};
  LoraXsImpl adapter = make(base, {.rank = 2, .alpha = 4});
  const at::Tensor x = random({2, 3, 9});
  const at::Tensor delta =
      adapter.lora_B.flatten(1).mm(adapter.lora_R).mm(adapter.lora_A.flatten(1)).view({4, 3, 3});
  const std::vector<int64_t> stride = {2}, padding = {1}, dilation = {2};
  const at::Tensor expected =
      at::conv1d(x, base.weight + 2.0 * delta, base.bias, stride, padding, dilation, 1);
  CHECK(distance(adapter.forward(base, x), expected) < 1e-13);
  CHECK(distance(adapter.merged_weight(base), base.weight + 2.0 * delta) < 1e-13);
}

TEST_CASE("LoRA-XS trains R alone, from N(0, r_std^2)", "[adapters][lora-xs]") {
  at::manual_seed(6);
  const FrozenLinear base{random({70, 90}), {}};
  const LoraXsImpl adapter(base, {.rank = 64}, {"q_proj", 1});
  CHECK(adapter.parameters().size() == 1);
  CHECK(adapter.lora_R.numel() == 64 * 64);
  CHECK_FALSE((adapter.lora_A.requires_grad() || adapter.lora_B.requires_grad()));
  CHECK(std::abs(adapter.lora_R.std().item<double>() / 1e-5 - 1) < 0.05);
  CHECK(std::abs(adapter.lora_R.mean().item<double>()) < 1e-6);
  const LoraXsImpl other(base, {.rank = 64}, {"k_proj", 1}),
      again(base, {.rank = 64}, {"q_proj", 1});
  CHECK_FALSE(at::equal(other.lora_R, adapter.lora_R));
  CHECK(at::equal(again.lora_R, adapter.lora_R));
  const LoraXsImpl zero(base, {.rank = 4, .r_std = 0}, {"q_proj", 1});
  CHECK(zero.lora_R.count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("R moves the weight linearly, and along orthonormal factors", "[adapters][lora-xs]") {
  const FrozenLinear base = some_linear();
  LoraXsImpl adapter = make(base, {.rank = 2, .alpha = 5});
  const at::Tensor before = adapter.merged_weight(base), dR = random({2, 2});
  {
    const at::NoGradGuard no_grad;
    adapter.lora_R.add_(dR);
  }
  CHECK(distance(adapter.merged_weight(base) - before,
                 2.5 * adapter.lora_B.mm(dR).mm(adapter.lora_A)) < 1e-13);
}

TEST_CASE("values about to be loaded need no decomposition", "[adapters][lora-xs]") {
  const FrozenLinear base{at::full({4, 4}, std::numeric_limits<double>::quiet_NaN()), {}};
  LayerContext context{"q_proj", 1};
  context.initialise = false;
  const LoraXsImpl adapter(base, {.rank = 2}, context);
  CHECK(adapter.lora_A.count_nonzero().item<int64_t>() == 0);
  CHECK(adapter.lora_R.count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("a LoRA-XS folder holds R and both factors", "[adapters][lora-xs]") {
  GraftDecoder model;
  auto adapter = graft::attach(model, LoraXsOptions{.rank = 2}, {.targets = {"q_proj", "embed"}});
  std::string folder = (std::filesystem::temp_directory_path() / "graft-xs-XXXXXX").string();
  REQUIRE(::mkdtemp(folder.data()) != nullptr);
  adapter.save(folder);
  const auto names =
      graft::io::SafetensorsFile::open(folder + "/adapter_model.safetensors").names();
  std::filesystem::remove_all(folder);
  const auto has = [&](const std::string& name) {
    return std::count(names.begin(), names.end(), "base_model.model.model." + name) == 1;
  };
  CHECK(names.size() == 9);
  for (const char* key : {"lora_A.weight", "lora_B.weight", "lora_R"})
    CHECK(has(std::string("layers.1.q_proj.") + key));
  for (const char* key : {"lora_embedding_A", "lora_embedding_B", "lora_R"})
    CHECK(has(std::string("embed.") + key));
}

TEST_CASE("LoRA-XS folds into plain LoRA", "[adapters][lora-xs]") {
  at::manual_seed(7);
  const auto to_lora = lora_xs_entry().to_lora;
  const std::vector<graft::nn::FrozenLayer> layers = {
      some_linear(), FrozenEmbedding{random({7, 5})},
      FrozenConv{random({5, 2, 2, 3}), {}, {1, 1}, {0, 0}, {1, 1}}};
  for (const auto& base : layers) {
    INFO(graft::nn::kind_name(base));
    LoraXsImpl adapter = make(base, {.rank = 3, .alpha = 6});
    StoredLayer stored;
    for (const auto& [key, tensor] : adapter.file_tensors()) stored[key] = tensor.detach();
    // The options may speak of another rank: rank_pattern gave this layer its own.
    const PlainLora plain = to_lora(*make_recipe(LoraXsOptions{.rank = 2, .alpha = 6}), stored, 0);
    CHECK(plain.scale == 2.0);
    CHECK(plain.A.sizes() == adapter.lora_A.sizes());
    const at::Tensor delta = plain.scale * plain.B.flatten(1).mm(plain.A.flatten(1));
    const at::Tensor merged = adapter.merged_weight(base);
    CHECK(distance(dense(base) + delta,
                   std::holds_alternative<FrozenEmbedding>(base) ? merged.t() : merged.flatten(1)) <
          1e-13);
    CHECK(contains(error_of([&] { to_lora(*make_recipe(LoraXsOptions{}), stored, 1); }),
                   "do not nest; got rank=1"));
    stored.erase("lora_R");
    CHECK(contains(error_of([&] { to_lora(*make_recipe(LoraXsOptions{}), stored, 0); }),
                   "must hold lora_R"));
    stored["lora_R"] = at::ones({2, 2}, at::kDouble);
    CHECK(contains(error_of([&] { to_lora(*make_recipe(LoraXsOptions{}), stored, 0); }),
                   "must fit each other"));
  }
}

TEST_CASE("LoRA-XS's dropout hits the branch alone, in training alone", "[adapters][lora-xs]") {
  const FrozenLinear base = some_linear();
  LoraXsImpl adapter = make(base, {.rank = 2, .alpha = 2, .dropout = 0.5});
  const at::Tensor x = random({8, 4});
  const auto site = static_cast<uint32_t>(graft::random::hash_name("q_proj"));
  const auto branch = [&](const at::Tensor& input) {
    return at::linear(x, base.weight, base.bias) +
           input.mm(adapter.lora_A.t()).mm(adapter.lora_R.t()).mm(adapter.lora_B.t());
  };
  CHECK(distance(adapter.forward(base, x),
                 branch(graft::ops::apply_dropout(x, {0.5, {1, site, 0}}))) < 1e-13);
  CHECK(adapter.counters() == std::vector<int64_t>{1});
  adapter.eval();
  CHECK(distance(adapter.forward(base, x), branch(x)) < 1e-13);
  CHECK(contains(error_of([&] { adapter.set_counters({}); }), "one counter a layer"));
}

TEST_CASE("LoRA-XS's options go through a config and back", "[adapters][lora-xs]") {
  const MethodEntry entry = lora_xs_entry();
  CHECK(entry.peft_type == "LORA_XS");
  CHECK(entry.keys.rslora.empty());
  json config;
  make_recipe(LoraXsOptions{.rank = 3, .alpha = 2.5, .dropout = 0.1, .r_std = 0.5})
      ->write_config(config);
  const auto recipe = entry.read_config(config);
  CHECK(config.empty());
  const auto options = dynamic_cast<const RecipeOf<LoraXsImpl>&>(*recipe).options();
  CHECK((options.rank == 3 && options.alpha == 2.5 && options.dropout == 0.1));
  CHECK(options.r_std == 0.5);
  CHECK(recipe->describe() == "rank 3, alpha 2.5, dropout 0.1, R starts with deviation 0.5");
  make_recipe(LoraXsOptions{.init = "LoRA-SB", .sb_step = 0.25})->write_config(config);
  const auto sb = entry.read_config(config);
  CHECK(config.empty());
  const auto stored = dynamic_cast<const RecipeOf<LoraXsImpl>&>(*sb).options();
  CHECK((stored.init == "lora_sb" && stored.sb_step == 0.25));
  CHECK(sb->describe() == "rank 8, alpha 16, start by lora_sb with a step of 0.25");
  CHECK(sb->start_plan().kind.needs == graft::init::Needs::gradient);
  json before_there_were_two = {{"r", 2}, {"r_std", 0.5}};
  CHECK(entry.read_config(before_there_were_two)->start_plan().kind.name == "svd");
}

TEST_CASE("LoRA-XS refuses what it cannot do", "[adapters][lora-xs]") {
  const auto error = [](const LoraXsOptions& options) {
    return error_of([&] { options.validate(); });
  };
  CHECK(contains(error({.rank = 0}), "[lora-xs] rank must be in [1, min(in, out)]; got rank=0"));
  CHECK(contains(error({.alpha = 0}), "got 0"));
  CHECK(contains(error({.dropout = -0.1}), "[lora-xs]"));
  CHECK(contains(error({.r_std = -1}), "r_std must be >= 0; got -1"));
  CHECK(contains(error({.r_std = std::nan("")}), "r_std must be >= 0"));
  CHECK(contains(error({.init = "eva"}), "init must be svd or lora_sb; got 'eva'"));
  CHECK(contains(error({.sb_step = 0}), "sb_step must be > 0; got 0"));
  CHECK(contains(error_of([] { make(some_linear(), {.rank = 2, .init = "lora_sb"}); }),
                 "lora_sb needs gradients, gathered over some batches; got none (layer 'q_proj')"));
  CHECK(contains(error_of([] { make(some_linear(), {.rank = 5}); }), "got rank=5 for in=4"));
  const FrozenLinear broken{at::full({4, 4}, std::nan(""), at::kDouble), {}};
  CHECK(contains(error_of([&] { make(broken, {.rank = 1}); }),
                 "the base weight must be finite to be decomposed"));
  const FrozenConv grouped{random({4, 2, 2}), {}, {1}, {0}, {1}, 2};
  CHECK(contains(error_of([&] { make(grouped, {.rank = 2}); }), "got groups=2 (layer 'q_proj')"));
}
