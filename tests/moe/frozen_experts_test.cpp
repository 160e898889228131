// Mixtures of adapters that were trained before: the library, Arrow and MeteoRA.
#include <graft/adapters/lora.h>
#include <graft/io/safetensors.h>
#include <graft/moe/arrow.h>
#include <graft/moe/meteora.h>
#include <graft/moe/token_scope.h>

#include <nlohmann/json.hpp>

#include "tests/moe/mixture_tests.h"

namespace {

using namespace graft::moe;
using graft::attach;
using graft::attach_from;
using graft::adapters::LoraOptions;
using graft::adapters::PlainLora;
using graft::nn::FrozenLinear;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::testing::random;
using graft::testing::randomise;
using graft::testing::some_input;
using graft::testing::some_linear;
using graft::testing::some_tokens;
using graft::testing::TempFolder;

using Library = std::shared_ptr<const ExpertLibrary>;

// Adapters of these ranks and scales on one layer; values as training might leave them.
Library library_of(const std::string& layer, int64_t out, int64_t in, std::vector<int64_t> ranks,
                   std::vector<double> scales) {
  at::manual_seed(31);
  std::vector<ExpertLibrary::Adapter> adapters;
  for (size_t e = 0; e < ranks.size(); ++e)
    adapters.push_back({{layer, {random({ranks[e], in}), random({out, ranks[e]}), scales[e]}}});
  return std::make_shared<ExpertLibrary>(std::move(adapters));
}

const std::vector<int64_t> kRanks = {2, 1, 3, 2};
const std::vector<double> kScales = {1.5, 0.5, 2.0, 1.5};

Library some_library() {
  return library_of("q_proj", 6, 4, kRanks, kScales);
}

// Saves plain LoRA adapters of the decoder's q_proj and o_proj, and returns the folders.
std::vector<std::filesystem::path> save_adapters(const TempFolder& folder, int64_t count) {
  std::vector<std::filesystem::path> folders;
  for (int64_t e = 0; e < count; ++e) {
    GraftDecoder model;
    auto adapter = attach(model, LoraOptions{.rank = 1 + e, .alpha = 3.0 + e},
                          {.targets = {"q_proj", "o_proj"}});
    randomise(adapter.parameters(), 50 + e);
    model.forward(some_tokens());
    folders.push_back(folder / std::to_string(e));
    adapter.save(folders.back());
  }
  return folders;
}

}  // namespace

// Arrow, MeteoRA and X-LoRA do not join the kit of adapters, which makes a recipe before it knows
// the layer: theirs comes with adapters for one layer. I1 and I2 do not hold, since trained
// adapters are at work from the start; I3 is refused; I6 and the lowered loss mean nothing where
// nothing is trained. Gradients, files and the frozen base are tested below and in xlora_test.cpp.
TEST_CASE("mixtures of stored adapters must be given some", "[moe][library]") {
  CHECK(contains(error_of([] { MeteoraOptions{}.validate(); }),
                 "[meteora] the experts must be given (ExpertLibrary::read); got none"));
  CHECK(contains(error_of([] { ArrowOptions{}.validate(); }), "[arrow] the experts must be given"));
}

TEST_CASE("a library's adapters are the experts, with their own ranks and scales",
          "[moe][library]") {
  const FrozenLinear base = some_linear();
  const Library library = some_library();
  MeteoraImpl method(base, {.experts = library, .top_k = 4}, {"q_proj", 1});
  randomise(method.router->parameters());
  const at::Tensor x = some_input();
  const at::Tensor g = method.gates(x);
  CHECK(distance(g, at::softmax(at::linear(x.view({10, 4}), method.router->weight), -1)) < 1e-14);
  CHECK(distance(method.forward(base, x), graft::testing::sum_over_experts(method, base, x, g)) <
        1e-13);
  for (int64_t e = 0; e < 4; ++e) {
    CHECK(method.extract_expert(e).scale == kScales[e]);
    CHECK(method.extract_expert(e).A.size(0) == kRanks[e]);
  }
}

TEST_CASE("a library refuses adapters that cannot stand side by side", "[moe][library]") {
  const auto lora = [](int64_t rank, double scale = 1.0) {
    return PlainLora{random({rank, 4}), random({6, rank}), scale};
  };
  using Adapter = ExpertLibrary::Adapter;
  const auto refused = [](std::vector<Adapter> adapters) {
    return error_of([&] { ExpertLibrary library(std::move(adapters)); });
  };
  CHECK(contains(refused({}), "[experts] there must be at least one adapter; got none"));
  CHECK(contains(refused({Adapter{}}), "must have layers; got none in adapter 0"));
  CHECK(contains(refused({{{"a", lora(1)}, {"b", lora(1)}}, {{"a", lora(1)}}}),
                 "got 'b' in adapter 0 and not in adapter 1"));
  CHECK(contains(refused({{{"a", lora(1)}}, {{"a", lora(1)}, {"c", lora(1)}}}),
                 "got 'c' in adapter 1 and not in adapter 0"));
  CHECK(contains(refused({{{"a", lora(1)}, {"b", lora(2)}}}), "one rank and one scale"));
  CHECK(contains(refused({{{"a", lora(1)}, {"b", lora(1, 2.0)}}}), "one rank and one scale"));
  CHECK(contains(refused({{{"a", {random({1, 4, 3}), random({6, 1, 1}), 1.0}}}}),
                 "experts sit on linear layers"));
  CHECK(contains(error_of([] { ExpertLibrary({1, 2}, {1.0}); }), "as many ranks as scales"));
  const FrozenLinear base = some_linear();
  CHECK(contains(error_of([&] {
                   MeteoraImpl(base, {.experts = some_library()}, {"k_proj", 1});
                 }),
                 "[meteora] the adapters must have the layer; got none for it (layer 'k_proj')"));
  CHECK(contains(error_of([&] {
                   MeteoraImpl({some_linear(6, 5)}, {.experts = some_library()}, {"q_proj", 1});
                 }),
                 "must fit the layer, in=5 and out=6; got [2, 4] and [6, 2]"));
  CHECK(
      contains(error_of([&] { MeteoraOptions{.experts = some_library(), .top_k = 5}.validate(); }),
               "top_k must be in [1, experts]; got top_k=5 for experts=4"));
}

TEST_CASE("a library is read from folders, and each expert is its folder",
          "[moe][library][files]") {
  const TempFolder folder;
  const auto folders = save_adapters(folder, 3);
  const Library library = ExpertLibrary::read(folders);
  CHECK(library->ranks() == std::vector<int64_t>{1, 2, 3});
  CHECK(library->scales() == std::vector<double>{3.0, 2.0, 5.0 / 3});
  CHECK(library->layers() ==
        std::vector<std::string>{"model.layers.0.o_proj", "model.layers.0.q_proj",
                                 "model.layers.1.o_proj", "model.layers.1.q_proj"});
  GraftDecoder model, one;
  auto adapter = attach(model, MeteoraOptions{.experts = library, .top_k = 1},
                        {.targets = graft::nn::Selector(library->layers())});
  for (size_t e = 0; e < 3; ++e) {
    for (const auto& layer : adapter.layers()) {
      // A gate that says e whatever the token: with one expert left to choose.
      auto& method = static_cast<MeteoraImpl&>(*layer.adapter);
      const auto lora = method.extract_expert(static_cast<int64_t>(e));
      const at::NoGradGuard no_grad;
      const auto file = graft::io::SafetensorsFile::open(folders[e] / "adapter_model.safetensors");
      const std::string key = "base_model.model." + layer.name;
      CHECK(at::equal(lora.A, file.tensor(key + ".lora_A.weight")));
      CHECK(at::equal(lora.B, file.tensor(key + ".lora_B.weight")));
    }
  }
  // Two equal adapters: whatever the gate says, the folder's own output.
  GraftDecoder twice;
  attach(twice, MeteoraOptions{.experts = ExpertLibrary::read({folders[1], folders[1]})},
         {.targets = graft::nn::Selector(library->layers())});
  auto plain = attach_from(one, folders[1]);
  CHECK(distance(twice.forward(some_tokens()), one.forward(some_tokens())) < 1e-5);
}

TEST_CASE("GenKnowSub takes the general adapters' means from A and from B", "[moe][library]") {
  const Library tasks = library_of("q_proj", 6, 4, {2, 2}, {1.0, 2.0}),
                general = library_of("q_proj", 6, 4, {2, 2, 2}, {1.0, 1.0, 1.0});
  const Library pure = tasks->without_general(*general);
  const FrozenLinear base = some_linear();
  const graft::adapters::LayerContext context{"q_proj", 1};
  const Experts before = tasks->experts("t", base, context),
                after = pure->experts("t", base, context),
                mean = general->experts("t", base, context);
  CHECK(distance(after.A, before.A - mean.A.view({3, 2, 4}).mean(0).repeat({2, 1})) < 1e-14);
  CHECK(distance(after.B, before.B - mean.B.view({6, 3, 2}).mean(1).repeat({1, 2})) < 1e-14);
  CHECK(after.scales == before.scales);
  CHECK(contains(error_of([&] { some_library()->without_general(*general); }),
                 "adapters of one rank"));
}

TEST_CASE("MeteoRA trains the gate alone, on the best k", "[moe][meteora]") {
  const FrozenLinear base = some_linear();
  MeteoraImpl method(base, {.experts = some_library(), .top_k = 2, .temperature = 3.0},
                     {"q_proj", 1});
  randomise(method.parameters());
  CHECK(method.parameters().size() == 1);
  const at::Tensor x = some_input();
  const at::Tensor l = at::linear(x.view({10, 4}), method.router->weight);
  const auto [values, indices] = l.topk(2);
  const at::Tensor expected = at::zeros_like(l).scatter(1, indices, at::softmax(values / 3.0, -1));
  CHECK(distance(method.gates(x), expected) < 1e-14);
  graft::testing::check_leaf_gradients([&] { return method.forward(base, x); },
                                       {{"gate", method.router->weight}});
}

TEST_CASE("MeteoRA's loss of labels is the mean over labelled tokens and layers",
          "[moe][meteora]") {
  const TempFolder folder;
  const Library library = ExpertLibrary::read(save_adapters(folder, 3));
  GraftDecoder model;
  auto adapter = attach(model, MeteoraOptions{.experts = library, .label_loss = 50.0},
                        {.targets = graft::nn::Selector(library->layers())});
  at::Tensor kinds = at::arange(10).remainder(3).view({2, 5});
  kinds[1][4] = -100;
  const TokenScope scope({.kinds = kinds});
  model.forward(some_tokens());
  at::Tensor expected = at::zeros({});
  for (const auto& layer : adapter.layers()) {
    const at::Tensor logits = static_cast<MeteoraImpl&>(*layer.adapter).routing().logits;
    expected = expected + at::cross_entropy_loss(logits, kinds.view({-1})) * 50.0 / 4;
  }
  CHECK(distance(adapter.penalty(), expected) < 1e-5);
  {
    at::Tensor valid = at::ones({2, 5}, at::kBool), left = kinds.clone();
    valid[0][2] = false;
    left[0][2] = -100;
    const TokenScope labels({.kinds = left});
    model.forward(some_tokens());
    const at::Tensor without = adapter.penalty();
    const TokenScope padded({.valid = valid, .kinds = kinds});
    model.forward(some_tokens());
    CHECK(distance(adapter.penalty(), without) < 1e-5);
  }
  {
    const TokenScope nothing({});
    CHECK(contains(error_of([&] { adapter.penalty(); }), "needs kinds of tokens (TokenScope)"));
    const TokenScope others({.kinds = kinds.narrow(0, 0, 1)});
    CHECK(contains(error_of([&] { adapter.penalty(); }),
                   "one kind a token, 10; got kinds of [1, 5]"));
  }
  adapter.end_step({});
  for (const auto& layer : adapter.layers())
    CHECK_FALSE(static_cast<MeteoraImpl&>(*layer.adapter).routing().logits.requires_grad());
  CHECK(adapter.figures().size() == 3);
  CHECK(contains(error_of([&] { adapter.merge(); }), "a mixture cannot be merged"));
}

TEST_CASE("T18 Arrow's prototype is the leading right singular vector of B A", "[moe][arrow]") {
  at::manual_seed(5);
  for (const auto& [out, in, rank] :
       std::vector<std::tuple<int64_t, int64_t, int64_t>>{{20, 12, 3}, {5, 9, 5}, {7, 4, 1}}) {
    const at::Tensor A = random({rank, in}), B = random({out, rank});
    const auto [U, S, Vh] = at::linalg_svd(B.mm(A), false);
    const at::Tensor v = arrow_prototype(A, B);
    if (rank > 1) REQUIRE((S[0] - S[1]).item<double>() > 1e-2 * S[0].item<double>());
    CHECK(std::abs(std::abs(v.dot(Vh[0]).item<double>()) - 1) < 1e-10);
    CHECK(std::abs(v.norm().item<double>() - 1) < 1e-14);
    CHECK(v[v.abs().argmax()].item<double>() > 0);
    if (rank == 1) CHECK(distance(v.abs(), (A[0] / A[0].norm()).abs()) < 1e-14);
  }
  CHECK(arrow_prototype(at::ones({2, 4}), at::zeros({3, 2})).count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("T18 Arrow's gates are the softmax of the largest |<x, v>|", "[moe][arrow]") {
  const FrozenLinear base = some_linear();
  ArrowImpl arrow(base, {.experts = some_library(), .top_k = 2, .temperature = 0.7}, {"q_proj", 1});
  CHECK(arrow.parameters().empty());
  const at::Tensor x = some_input();
  const at::Tensor scores = x.view({10, 4}).mm(arrow.prototypes.t()).abs();
  const auto [values, indices] = scores.topk(2);
  const at::Tensor g = at::zeros_like(scores).scatter(1, indices, at::softmax(values / 0.7, -1));
  CHECK(distance(arrow.gates(x), g) < 1e-14);
  CHECK(distance(arrow.forward(base, x), graft::testing::sum_over_experts(arrow, base, x, g)) <
        1e-12);
  {
    at::Tensor valid = at::ones({2, 5}, at::kBool);
    valid[0][3] = false;
    const TokenScope padded({.valid = valid});
    CHECK(arrow.gates(x)[3].count_nonzero().item<int64_t>() == 0);
  }
  // The sign of v says nothing; what the adapters add is odd in x; a longer x is routed sharper.
  const at::Tensor y = arrow.forward(base, x);
  arrow.prototypes.neg_();
  CHECK(at::equal(arrow.forward(base, x), y));
  const at::Tensor added = y - at::linear(x, base.weight, base.bias),
                   other = arrow.forward(base, -x) - at::linear(-x, base.weight, base.bias);
  CHECK(distance(other, -added) < 1e-12);
  CHECK((arrow.gates(3 * x).amax(1) > g.amax(1)).all().item<bool>());
  // All adapters at an infinite temperature: their average.
  ArrowImpl average(base, {.experts = some_library(), .top_k = 4, .temperature = 1e12},
                    {"q_proj", 1});
  CHECK(distance(average.gates(x), at::full({10, 4}, 0.25, at::kDouble)) < 1e-10);
}

TEST_CASE("Arrow and MeteoRA read back from their own folders", "[moe][arrow][meteora][files]") {
  const TempFolder folder;
  const Library library = ExpertLibrary::read(save_adapters(folder, 3));
  const auto check = [&](const auto& options) {
    const TempFolder saved;
    GraftDecoder model, other;
    auto adapter = attach(model, options, {.targets = graft::nn::Selector(library->layers())});
    // Arrow has nothing to train, and the handle refuses to give it out for training.
    const bool trained = !adapter.layers()[0].adapter->parameters().empty();
    if (trained) randomise(adapter.parameters());
    const at::Tensor expected = model.forward(some_tokens());
    adapter.save(saved.path());
    auto read = attach_from(other, saved.path());
    CHECK(distance(other.forward(some_tokens()), expected) < 1e-6);
    CHECK(read.recipe().describe() == adapter.recipe().describe());
    if (trained) CHECK(read.parameter_count() == adapter.parameter_count());
    nlohmann::json before, after;
    adapter.recipe().write_config(before);
    read.recipe().write_config(after);
    CHECK(before == after);
  };
  check(ArrowOptions{.experts = library, .top_k = 2, .temperature = 0.5});
  check(MeteoraOptions{.experts = library, .top_k = 2, .temperature = 0.5, .label_loss = 3});
}

TEST_CASE("a configuration names the adapters' folders", "[moe][library][files]") {
  const TempFolder folder;
  const auto folders = save_adapters(folder, 2);
  const auto described = [](nlohmann::json config) {
    const auto recipe = graft::adapters::find_method("arrow").read_config(config);
    CHECK(config.empty());
    recipe->validate();
    return recipe->describe();
  };
  const std::string a = folders[0].string(), b = folders[1].string();
  CHECK(described({{"adapters", {a, b}}, {"top_k", 2}}) ==
        "2 adapters, top 2 by their main directions");
  CHECK(contains(described({{"adapters", a + "," + b}, {"top_k", 1}}), "2 adapters, top 1"));
  CHECK(contains(error_of([&] {
                   described({{"adapters", 3}});
                 }),
                 "[arrow] adapters must be a list of folders; got 3"));
  CHECK(contains(error_of([&] { described(nlohmann::json::object()); }),
                 "[arrow] adapters must name the folders of the adapters that are the experts"));
  CHECK(contains(error_of([&] {
                   described({{"expert_ranks", {2}}});
                 }),
                 "as many ranks as scales, one at least; got 1 and 0"));
  CHECK(contains(error_of([&] {
                   described({{"expert_ranks", {1.5}}, {"expert_scales", {1.0}}});
                 }),
                 "expert_ranks must be whole numbers of at least 1; got 1.5"));
}
