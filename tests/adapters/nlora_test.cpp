#include <ATen/ATen.h>
#include <graft/adapters/nlora.h>
#include <graft/core/random.h>
#include <graft/init/start.h>
#include <graft/io/safetensors.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/io/file_helpers.h"
#include "tests/support/adapter_kit.h"
#include "tests/support/method_tests.h"

namespace {

using namespace graft::adapters;
using namespace graft::testing;
using graft::nn::FrozenConv;
using graft::nn::FrozenEmbedding;
using graft::nn::FrozenLayer;
using graft::nn::FrozenLinear;
using nlohmann::json;

// The layer as a matrix [out, in (* kernel)].
at::Tensor dense(const FrozenLayer& base) {
  const at::Tensor& weight = graft::nn::weight_of(base);
  return std::holds_alternative<FrozenEmbedding>(base) ? weight.t() : weight.flatten(1);
}

at::Tensor merged(const NloraImpl& adapter, const FrozenLayer& base) {
  const at::Tensor weight = adapter.merged_weight(base);
  return std::holds_alternative<FrozenEmbedding>(base) ? weight.t() : weight.flatten(1);
}

std::vector<FrozenLayer> layers() {
  at::manual_seed(4);
  return {some_linear(), some_linear(4, 7), FrozenEmbedding{random({7, 5})},
          FrozenConv{random({4, 3, 2}), {}, {1}, {0}, {1}},
          FrozenConv{random({5, 2, 2, 3}), {}, {1, 1}, {0, 0}, {1, 1}}};
}

MethodCase kit_case(const NloraOptions& options) {
  MethodCase method;
  method.method = "nlora";
  method.recipe = [options](int64_t rank) {
    NloraOptions of_rank = options;
    of_rank.rank = rank;
    of_rank.alpha = 3;
    return make_recipe(of_rank);
  };
  const bool core = options.train == "core", slora = options.start_by == "slora";
  method.count = [core](const FrozenLayer& base, int64_t rank) {
    const at::Tensor W = dense(base);
    return rank * rank + (core ? 0 : rank * (W.size(0) + W.size(1)));
  };
  method.zero_at_first = [slora](const std::string& kind) -> std::vector<std::string> {
    if (!slora) return {};
    return {kind == "Embedding" ? "lora_B" : "lora_A", "lora_N"};
  };
  method.unfit_layers = {"groups"};
  method.starts_as_base = slora || options.subtracts();
  method.starts_to_rounding = options.subtracts() && !core;  // (N - N0) is zero itself
  return method;
}

}  // namespace

TEST_CASE("SLoRA keeps the promises of adapters", "[adapters][nlora]") {
  run_adapter_kit(kit_case({}));
}

TEST_CASE("NLoRA from the block keeps all but the start", "[adapters][nlora]") {
  run_adapter_kit(kit_case({.start_by = "block"}));
}

TEST_CASE("NLoRA from a subtracted start keeps the promises of adapters", "[adapters][nlora]") {
  run_adapter_kit(kit_case({.start_by = "block", .subtract = true}));
}

TEST_CASE("IntTune keeps the promises of adapters", "[adapters][nlora]") {
  run_adapter_kit(kit_case({.start_by = "pinv", .train = "core"}));
}

TEST_CASE("NLoRA on every layer is W + s (B N A - B0 N0 A0)", "[adapters][nlora]") {
  for (const auto& base : layers()) {
    for (const NloraOptions& options :
         {NloraOptions{.rank = 3, .alpha = 6},
          {.rank = 3, .alpha = 6, .start_by = "block"},
          {.rank = 3, .alpha = 6, .start_by = "cur"},
          {.rank = 3, .alpha = 6, .start_by = "cur", .train = "core"},
          {.rank = 3, .alpha = 6, .start_by = "block", .train = "core"}}) {
      INFO(graft::nn::kind_name(base) << " " << options.start_by << " " << options.train);
      NloraImpl adapter(base, options, {"q_proj", 1});
      const auto product = [&] {
        return 2.0 * adapter.lora_B.flatten(1).mm(adapter.lora_N).mm(adapter.lora_A.flatten(1));
      };
      const at::Tensor start =
          options.subtracts() ? product().detach().clone() : at::zeros_like(dense(base));
      randomise(adapter.parameters());
      CHECK(distance(merged(adapter, base), dense(base) + product() - start) < 1e-12);
    }
  }
}

TEST_CASE("SLoRA starts with uniform A and N, and B zero", "[adapters][nlora]") {
  at::manual_seed(6);
  const FrozenLinear base{random({70, 90}), {}};
  const NloraImpl adapter(base, {.rank = 64}, {"q_proj", 1}),
      again(base, {.rank = 64}, {"q_proj", 1}), other(base, {.rank = 64}, {"k_proj", 1});
  const auto is_uniform = [](const at::Tensor& t, double bound) {
    CHECK(t.abs().max().item<double>() <= bound);
    CHECK(t.abs().max().item<double>() > 0.99 * bound);
    CHECK(std::abs(t.std().item<double>() / (bound / std::sqrt(3.0)) - 1) < 0.05);
  };
  is_uniform(adapter.lora_A, 1 / std::sqrt(90.0));
  is_uniform(adapter.lora_N, 1 / std::sqrt(64.0));
  CHECK(adapter.lora_B.count_nonzero().item<int64_t>() == 0);
  CHECK(at::equal(again.lora_N, adapter.lora_N));
  CHECK_FALSE(at::equal(other.lora_N, adapter.lora_N));
  // N's numbers are not A's over again.
  const at::Tensor first = adapter.lora_A.flatten().narrow(0, 0, 64 * 64) * std::sqrt(90.0),
                   core = adapter.lora_N.flatten() * 8;
  CHECK(distance(first, core) > 0.1);
}

TEST_CASE("the Nystrom starts take rows, columns and their core from the weight",
          "[adapters][nlora]") {
  for (const auto& base : layers()) {
    const at::Tensor W = dense(base);
    for (const std::string start_by : {"block", "pinv", "cur"}) {
      INFO(graft::nn::kind_name(base) << " " << start_by);
      const NloraImpl adapter(base, {.rank = 2, .alpha = 5, .start_by = start_by, .rcond = 0.05},
                              {"q_proj", 1});
      CHECK(at::equal(adapter.lora_A.flatten(1), W.narrow(0, 0, 2)));
      CHECK(at::equal(adapter.lora_B.flatten(1), W.narrow(1, 0, 2)));
      const bool subtract = start_by != "block";
      const auto start =
          graft::init::nystrom(W, 2, 2.5, {.core = start_by, .rcond = 0.05, .subtract = subtract});
      CHECK(at::equal(adapter.lora_N, start.core));
      CHECK(adapter.start_A.defined() == subtract);
    }
  }
}

TEST_CASE("a start can be subtracted from the block and left in for cur", "[adapters][nlora]") {
  const FrozenLinear base = some_linear();
  const NloraImpl block(base, {.rank = 2, .start_by = "block", .subtract = true}, {"q_proj", 1}),
      cur(base, {.rank = 2, .start_by = "cur", .subtract = false}, {"q_proj", 1});
  CHECK(distance(block.merged_weight(base), base.weight) < 1e-13);
  // The projection on both spans once more.
  const at::Tensor A = base.weight.narrow(0, 0, 2), B = base.weight.narrow(1, 0, 2);
  const at::Tensor projected =
      B.mm(at::linalg_pinv(B)).mm(base.weight).mm(at::linalg_pinv(A)).mm(A);
  CHECK(distance(cur.merged_weight(base), base.weight + projected) < 1e-12);
}

TEST_CASE("IntTune trains r^2 numbers a layer and keeps A and B", "[adapters][nlora]") {
  GraftDecoder model;
  const auto adapter =
      graft::attach(model, NloraOptions{.rank = 3, .start_by = "cur", .train = "core"},
                    {.targets = {"q_proj", "v_proj", "o_proj"}});
  CHECK(adapter.parameter_count() == 6 * 9);
  for (const auto& [name, tensor] : adapter.named_parameters()) CHECK(name.ends_with(".lora_N"));
}

TEST_CASE("NLoRA's dropout hits the branch alone, in training alone", "[adapters][nlora]") {
  const FrozenLinear base = some_linear();
  NloraImpl adapter =
      make_random<NloraImpl>(base, NloraOptions{.rank = 2, .alpha = 2, .dropout = 0.5});
  const at::Tensor x = random({8, 4});
  const auto site = static_cast<uint32_t>(graft::random::hash_name("q_proj"));
  const auto branch = [&](const at::Tensor& input) {
    return at::linear(x, base.weight, base.bias) +
           input.mm(adapter.lora_A.t()).mm(adapter.lora_N.t()).mm(adapter.lora_B.t());
  };
  CHECK(distance(adapter.forward(base, x),
                 branch(graft::ops::apply_dropout(x, {0.5, {1, site, 0}}))) < 1e-13);
  adapter.eval();
  CHECK(distance(adapter.forward(base, x), branch(x)) < 1e-13);
}

TEST_CASE("values about to be loaded need nothing of the weight", "[adapters][nlora]") {
  const FrozenLinear base{at::full({4, 4}, std::numeric_limits<double>::quiet_NaN()), {}};
  LayerContext context{"q_proj", 1};
  context.initialise = false;
  for (const std::string start_by : {"slora", "cur"}) {
    const NloraImpl adapter(base, {.rank = 2, .start_by = start_by}, context);
    for (const auto& tensor : {adapter.lora_A, adapter.lora_B, adapter.lora_N})
      CHECK(tensor.count_nonzero().item<int64_t>() == 0);
  }
}

TEST_CASE("NLoRA's folders hold the factors and what is subtracted", "[adapters][nlora]") {
  const auto names_of = [](const NloraOptions& options) {
    GraftDecoder model;
    const TempFolder folder;
    graft::attach(model, options, {.targets = {"q_proj", "embed"}}).save(folder.path());
    return graft::io::SafetensorsFile::open(folder.path() / "adapter_model.safetensors").names();
  };
  const auto expected = [](std::vector<std::string> suffixes) {
    std::vector<std::string> keys;
    for (std::string layer : {"embed", "layers.0.q_proj", "layers.1.q_proj"})
      for (std::string suffix : suffixes) {
        if (suffix.size() == 1)
          suffix = layer == "embed" ? "lora_embedding_" + suffix : "lora_" + suffix + ".weight";
        keys.push_back("base_model.model.model." + layer + "." + suffix);
      }
    std::sort(keys.begin(), keys.end());
    return keys;
  };
  const auto sorted = [](std::vector<std::string> names) {
    std::sort(names.begin(), names.end());
    return names;
  };
  CHECK(sorted(names_of({.rank = 2})) == expected({"A", "B", "lora_N"}));
  CHECK(sorted(names_of({.rank = 2, .start_by = "cur"})) ==
        expected({"A", "B", "lora_N", "lora_start_A", "lora_start_B"}));
  CHECK(sorted(names_of({.rank = 2, .start_by = "cur", .train = "core"})) ==
        expected({"A", "B", "lora_N", "lora_start_N"}));
}

TEST_CASE("NLoRA converts into plain LoRA: rank r, or 2r with a subtracted start",
          "[adapters][nlora]") {
  const auto to_lora = nlora_entry().to_lora;
  for (const auto& base : layers()) {
    for (const auto& [options, rank] :
         {std::pair(NloraOptions{.rank = 3, .alpha = 6}, 3),
          {NloraOptions{.rank = 3, .alpha = 6, .start_by = "cur"}, 6},
          {NloraOptions{.rank = 3, .alpha = 6, .start_by = "cur", .train = "core"}, 3}}) {
      INFO(graft::nn::kind_name(base) << " " << options.start_by << " " << options.train);
      NloraImpl adapter = make_random<NloraImpl>(base, options);
      StoredLayer stored;
      for (const auto& [key, tensor] : adapter.file_tensors()) stored[key] = tensor.detach();
      NloraOptions two = options;  // the options may speak of another rank: rank_pattern
      two.rank = 2;
      const PlainLora plain = to_lora(*make_recipe(two), stored, 0);
      CHECK(plain.scale == 2.0);
      CHECK(plain.A.size(0) == rank);
      const at::Tensor delta = plain.scale * plain.B.flatten(1).mm(plain.A.flatten(1));
      CHECK(distance(dense(base) + delta, merged(adapter, base)) < 1e-12);

      const auto error = [&](int64_t nested = 0) {
        return error_of([&] { to_lora(*make_recipe(options), stored, nested); });
      };
      CHECK(contains(error(1), "do not nest; got rank=1"));
      if (options.start_by == "cur") {
        const std::string start = options.train == "core" ? "lora_start_N" : "lora_start_A";
        const at::Tensor good = stored[start];
        stored[start] = at::ones({2, 2}, at::kDouble);
        CHECK(contains(error(), start + " must fit the other factors"));
        stored.erase(start);
        CHECK(contains(error(), "must hold " + start));
        stored[start] = good;
      }
      stored["lora_N"] = at::ones({2, 2}, at::kDouble);
      CHECK(contains(error(), "lora_N must fit the other factors; got [2, 2] for [3, 3]"));
    }
  }
}

TEST_CASE("a resumed NLoRA takes the start from the file", "[adapters][nlora]") {
  for (const std::string train : {"all", "core"}) {
    const NloraOptions options{.rank = 3, .start_by = "cur", .train = train};
    graft::AttachOptions where{.targets = {"q_proj", "embed"}};
    GraftDecoder model, other(2);  // another base: the start does not follow from it
    const TempFolder folder;
    auto adapter = graft::attach(model, options, where);
    randomise(adapter.parameters());
    model.forward(some_tokens());
    adapter.save(folder.path());
    where.initialise = false;
    auto resumed = graft::attach(other, options, where);
    resumed.load(folder.path());
    for (size_t i = 0; i < adapter.layers().size(); ++i) {
      const auto ours = adapter.layers()[i].adapter->file_tensors(),
                 theirs = resumed.layers()[i].adapter->file_tensors();
      for (size_t t = 0; t < ours.size(); ++t) CHECK(at::equal(ours[t].tensor, theirs[t].tensor));
    }
  }
}

TEST_CASE("NLoRA's options go through a config and back", "[adapters][nlora]") {
  const MethodEntry entry = nlora_entry();
  CHECK(entry.peft_type == "NLORA");
  CHECK(entry.keys.rslora.empty());
  json config;
  make_recipe(
      NloraOptions{.rank = 3, .alpha = 2.5, .start_by = "pinv", .rcond = 0.2, .train = "core"})
      ->write_config(config);
  CHECK(config["init_lora_weights"] == "pinv");
  CHECK(config["subtract"] == true);
  const auto recipe = entry.read_config(config);
  CHECK(config.empty());
  const auto options = dynamic_cast<const RecipeOf<NloraImpl>&>(*recipe).options();
  CHECK((options.rank == 3 && options.alpha == 2.5 && options.rcond == 0.2));
  CHECK((options.start_by == "pinv" && options.subtracts() && options.train == "core"));
  CHECK(recipe->describe() == "rank 3, alpha 2.5, start by pinv, subtracted, core alone");
  json few = {{"init_lora_weights", "block"}, {"lora_dropout", 0.1}};
  const auto block = entry.read_config(few);
  CHECK_FALSE(dynamic_cast<const RecipeOf<NloraImpl>&>(*block).options().subtracts());
  CHECK(block->describe() == "rank 8, alpha 16, dropout 0.1, start by block");
}

TEST_CASE("NLoRA refuses what it cannot do", "[adapters][nlora]") {
  const auto error = [](const NloraOptions& options) {
    return error_of([&] { options.validate(); });
  };
  CHECK(contains(error({.rank = 0}), "[nlora] rank must be in [1, min(in, out)]; got rank=0"));
  CHECK(contains(error({.alpha = 0}), "[nlora] alpha"));
  CHECK(
      contains(error({.start_by = "nystrom"}), "must be slora, block, pinv or cur; got 'nystrom'"));
  CHECK(contains(error({.train = "N"}), "train must be all or core; got 'N'"));
  CHECK(contains(error({.start_by = "pinv", .rcond = 1}), "rcond must be in [0, 1); got 1"));
  CHECK(contains(error({.start_by = "pinv", .subtract = false}),
                 "'pinv' needs subtract, since its product can be many times the weight"));
  CHECK(contains(error({.subtract = true}), "nothing to subtract"));
  CHECK(contains(error({.train = "core"}), "with slora B is zero"));
  CHECK(contains(error({.dropout = 0.1, .start_by = "cur"}), "got dropout=0.1"));
  CHECK_NOTHROW(NloraOptions{.dropout = 0.1, .start_by = "block"}.validate());
  CHECK_NOTHROW(NloraOptions{.dropout = 0.1}.validate());
  const auto refusal = [](const FrozenLayer& base, const NloraOptions& options) {
    return error_of([&] { NloraImpl(base, options, {"q_proj", 1}); });
  };
  CHECK(contains(refusal(some_linear(), {.rank = 5}), "got rank=5 for in=4"));
  const FrozenConv grouped{random({4, 2, 2}), {}, {1}, {0}, {1}, 2};
  CHECK(contains(refusal(grouped, {.rank = 2}), "got groups=2 (layer 'q_proj')"));
  const FrozenLinear broken{at::full({4, 4}, std::nan(""), at::kDouble), {}};
  CHECK(contains(refusal(broken, {.rank = 1, .start_by = "cur"}), "(layer 'q_proj')"));
}
