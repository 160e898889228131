#include <nlohmann/json.hpp>

#include "tests/moe/mixture_tests.h"

namespace {

using namespace graft::moe;
using graft::attach;
using graft::nn::FrozenLinear;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::testing::kMola;
using graft::testing::make_random;
using graft::testing::some_input;
using graft::testing::some_linear;
using graft::testing::some_tokens;

using Layers = std::vector<std::pair<std::string, graft::nn::FrozenLayer>>;

// "model.layers.<number>.q_proj" for each number.
Layers blocks(const std::vector<int64_t>& numbers) {
  Layers layers;
  for (const int64_t number : numbers)
    layers.emplace_back(graft::concat("model.layers.", number, ".q_proj"), some_linear());
  return layers;
}

std::vector<int64_t> counts_of(const std::vector<int64_t>& experts, const Layers& layers) {
  const auto counts = MolaImpl::make_shared_part({.experts = experts}, layers, {});
  std::vector<int64_t> in_order;
  for (const auto& [name, layer] : layers) in_order.push_back(counts->at(name));
  return in_order;
}

using List = std::vector<int64_t>;

}  // namespace

TEST_CASE("MoLA's gates are the softmax over the top k, renormalised", "[moe][mola]") {
  const FrozenLinear base = some_linear();
  auto mola = make_random<MolaImpl>(base, kMola);
  const at::Tensor x = some_input().view({10, 4});
  const at::Tensor p = at::softmax(x.mm(mola.router->weight.t()), -1);
  at::Tensor expected = at::linear(x, base.weight, base.bias).detach();
  for (int64_t t = 0; t < 10; ++t) {
    const auto [values, indices] = p[t].topk(2);
    for (int64_t slot = 0; slot < 2; ++slot) {
      const auto lora = mola.extract_expert(indices[slot].item<int64_t>());
      expected[t] += (values[slot] / values.sum() * 1.5 * lora.B.mv(lora.A.mv(x[t]))).detach();
    }
  }
  CHECK(distance(mola.forward(base, x), expected) < 1e-13);
}

TEST_CASE("MoLA's balance loss is a sum over layers of E sum_e (c_e / sum c) P_e", "[moe][mola]") {
  GraftDecoder model;
  model.to(at::kDouble);
  auto adapter = attach(model, MolaOptions{.rank = 2, .experts = {2, 4}, .balance_loss = 1.0},
                        {.targets = {"q_proj"}});
  const auto layer = [&](size_t i) -> MolaImpl& {
    return static_cast<MolaImpl&>(*adapter.layers()[i].adapter);
  };
  CHECK(layer(0).experts.count() == 2);
  CHECK(layer(1).experts.count() == 4);
  model.forward(some_tokens());
  at::Tensor expected = at::zeros({}, at::kDouble);
  for (size_t i = 0; i < 2; ++i) {
    const Routing& routing = layer(i).routing();
    const int64_t E = layer(i).experts.count();
    for (int64_t e = 0; e < E; ++e) {
      const double share = (routing.experts == e).sum().item<double>() / 20;  // 10 tokens, top 2
      expected += E * share * routing.probabilities.select(1, e).mean().detach();
    }
  }
  CHECK(distance(adapter.penalty(), expected) < 1e-14);
  for (size_t i = 0; i < 2; ++i) {
    const at::NoGradGuard no_grad;
    layer(i).router->weight.zero_();
  }
  model.forward(some_tokens());
  CHECK(distance(adapter.penalty(), at::full({}, 2.0, at::kDouble)) < 1e-14);  // 1 a layer
}

TEST_CASE("MoLA gives each block its number of experts", "[moe][mola]") {
  CHECK(counts_of({5}, blocks({0, 1, 2})) == List{5, 5, 5});
  CHECK(counts_of({2, 4, 6, 8}, blocks({0, 1, 2, 3, 4, 5, 6, 7})) == List{2, 2, 4, 4, 6, 6, 8, 8});
  CHECK(counts_of({2, 4, 6, 8}, blocks({0, 1, 2, 3, 4, 5})) == List{2, 2, 4, 6, 6, 8});
  CHECK(counts_of({1, 2, 3}, blocks({7, 3, 20})) == List{2, 1, 3});  // by number, not by order
  Layers layers = blocks({0, 1});
  layers.emplace_back("model.layers.1.up_proj", some_linear());
  CHECK(counts_of({3, 4}, layers) == List{3, 4, 4});
  CHECK(contains(error_of([&] {
                   counts_of({1, 2, 3}, layers);
                 }),
                 "[mola] there must be a block at least for each number of experts; got 3 numbers "
                 "for 2 blocks"));
  layers.emplace_back("lm_head", some_linear());
  CHECK(contains(error_of([&] { counts_of({3, 4}, layers); }), "got none (layer 'lm_head')"));
  CHECK(counts_of({3}, layers) == List{3, 3, 3, 3});
}

TEST_CASE("MoLA's top k falls to the experts that a block has", "[moe][mola]") {
  auto mola =
      make_random<MolaImpl>(some_linear(), MolaOptions{.rank = 1, .experts = {2}, .top_k = 3});
  CHECK(mola.router->options.top_k == 2);
  CHECK(distance(mola.gates(some_input()).sum(1), at::ones({10}, at::kDouble)) < 1e-15);
}

TEST_CASE("MoLA of rank 8 on Llama-2-7B trains what its paper's table says", "[moe][mola]") {
  // Seven linear layers a block, 32 blocks; weights without memory of their own.
  const auto layer = [](int64_t out, int64_t in) {
    return FrozenLinear{at::zeros({1}).expand({out, in}), {}};
  };
  const auto count = [&](int64_t experts, bool routers) {
    int64_t numbers = 0;
    for (const auto& [out, in, copies] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {4096, 4096, 4}, {11008, 4096, 2}, {4096, 11008, 1}}) {
      const MolaImpl mola(layer(out, in), {.rank = 8, .experts = {experts}},
                          {.name = "q", .initialise = false});
      for (const auto& item : mola.named_parameters())
        if (routers || !contains(item.key(), "router")) numbers += copies * item.value().numel();
    }
    return numbers;
  };
  const int64_t one = count(1, true), eight = count(8, true);
  CHECK(eight == 8 * one);
  CHECK(8 * one * (2 + 4 + 6 + 8) == 105'635'840);  // "105.6 M" with routers
  CHECK(32 * count(8, false) == 159'907'840);       // "159.9 M" without
  CHECK(32 * eight == 169'017'344);
}

TEST_CASE("MoLA reads experts as a number, a list or a text", "[moe][mola]") {
  const auto described = [](const char* experts) {
    nlohmann::json config = {{"num_experts", nlohmann::json::parse(experts)}, {"top_k", 1}};
    const auto recipe = graft::adapters::find_method("mola").read_config(config);
    CHECK(config.empty());
    recipe->validate();
    return recipe->describe();
  };
  CHECK(contains(described("6"), "experts 6, top 1, rank 8, alpha 16"));
  CHECK(contains(described("[2, 4]"), "experts 2-4, top 1"));
  CHECK(contains(described("\"2,4,6\""), "experts 2-4-6, top 1"));
  CHECK(contains(error_of([&] { described("\"2,x\""); }), "whole numbers with commas; got '2,x'"));
  CHECK(contains(error_of([&] { described("[1.5]"); }), "a whole number or a list of them"));
  CHECK(contains(error_of([&] { described("[2, 0]"); }), "at least 1 in every block; got 0"));
  CHECK(contains(error_of([] { MolaOptions{.top_k = 0}.validate(); }), "top_k must be at least 1"));
}
