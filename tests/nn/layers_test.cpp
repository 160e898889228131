#include <graft/adapters/dora.h>
#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>
#include <graft/nn/adapter_slot.h>
#include <graft/nn/frozen_layer.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/normalization.h>

#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::nn::frozen_layer;
using graft::testing::contains;
using graft::testing::copy_parameters;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::holds_exactly;
using graft::testing::snapshot;
using torch::nn::Conv1dOptions;
using torch::nn::Conv2dOptions;
using torch::nn::Conv3dOptions;
using torch::nn::EmbeddingOptions;
using torch::nn::LinearOptions;

std::vector<std::string> keys(const torch::nn::Module& module) {
  return module.named_parameters().keys();
}

/// A layer of graft and of torch with the same values: same keys, same output, same gradients.
template <class Graft, class Torch, class Options>
void check_drop_in(const Options& options, const at::Tensor& input) {
  at::manual_seed(1);
  auto plain = std::make_shared<Torch>(options);
  auto layer = std::make_shared<Graft>(options);
  copy_parameters(*plain, *layer);
  REQUIRE(keys(*layer) == keys(*plain));
  const bool floating = input.is_floating_point();
  for (const bool frozen : {false, true}) {
    at::Tensor a = input.detach().clone(), b = input.detach().clone();
    for (auto& parameter : layer->parameters()) parameter.set_requires_grad(!frozen);
    for (auto& parameter : plain->parameters()) parameter.set_requires_grad(!frozen);
    if (floating) {
      a.set_requires_grad(true);
      b.set_requires_grad(true);
    }
    const at::Tensor y = layer->forward(a), expected = plain->forward(b);
    CHECK(distance(y, expected) < 1e-5);
    CHECK(distance(graft::nn::apply(frozen_layer(*plain), a), expected) < 1e-5);
    if (!y.requires_grad()) continue;
    graft::testing::uneven_sum(y).backward();
    graft::testing::uneven_sum(expected).backward();
    if (floating) CHECK(distance(a.grad(), b.grad()) < 1e-5);
    if (frozen) continue;
    for (const auto& name : keys(*layer))
      CHECK(distance(layer->named_parameters()[name].grad(),
                     plain->named_parameters()[name].grad()) < 1e-5);
  }
}

/// A clone has the values, the frozen flags, the mode and the output, and shares nothing.
template <class Layer>
void check_clone(const std::shared_ptr<Layer>& layer, const at::Tensor& input) {
  layer->weight.set_requires_grad(false);
  layer->eval();
  const auto before = snapshot(*layer);
  const auto copy = std::dynamic_pointer_cast<Layer>(layer->clone());
  REQUIRE(copy != nullptr);
  CHECK(holds_exactly(*copy, before));
  CHECK_FALSE(copy->weight.requires_grad());
  if (copy->parameters().size() > 1) CHECK(copy->parameters()[1].requires_grad());
  CHECK_FALSE(copy->is_training());
  CHECK(copy->weight.is_same(copy->named_parameters()["weight"]));
  CHECK(at::equal(copy->forward(input), layer->forward(input)));
  graft::testing::randomise(copy->parameters());
  CHECK(holds_exactly(*layer, before));
}

}  // namespace

TEST_CASE("graft's layers are torch's layers, frozen or trained", "[nn][layers]") {
  namespace tn = torch::nn;
  namespace gn = graft::nn;
  const at::Tensor rows = at::randn({2, 3, 5});
  check_drop_in<gn::LinearImpl, tn::LinearImpl>(LinearOptions(5, 7), rows);
  check_drop_in<gn::LinearImpl, tn::LinearImpl>(LinearOptions(5, 7).bias(false), rows[0]);
  check_drop_in<gn::EmbeddingImpl, tn::EmbeddingImpl>(EmbeddingOptions(9, 4),
                                                      at::tensor({0, 8, 8, 3}));
  check_drop_in<gn::EmbeddingImpl, tn::EmbeddingImpl>(
      EmbeddingOptions(9, 4).padding_idx(-1).scale_grad_by_freq(true), at::tensor({0, 8, 8, 0}));
  check_drop_in<gn::Conv1dImpl, tn::Conv1dImpl>(
      Conv1dOptions(4, 6, 3).stride(2).padding(1).dilation(2).groups(2), at::randn({2, 4, 9}));
  check_drop_in<gn::Conv1dImpl, tn::Conv1dImpl>(Conv1dOptions(4, 6, 4).padding(torch::kSame),
                                                at::randn({4, 9}));
  check_drop_in<gn::Conv2dImpl, tn::Conv2dImpl>(
      Conv2dOptions(2, 3, {3, 2}).padding(torch::kValid).bias(false), at::randn({1, 2, 5, 5}));
  check_drop_in<gn::Conv2dImpl, tn::Conv2dImpl>(
      Conv2dOptions(2, 3, 3).padding({2, 1}).padding_mode(torch::kReflect),
      at::randn({1, 2, 5, 6}));
  check_drop_in<gn::Conv2dImpl, tn::Conv2dImpl>(
      Conv2dOptions(2, 3, {2, 4}).padding(torch::kSame).padding_mode(torch::kReplicate),
      at::randn({1, 2, 5, 6}));
  check_drop_in<gn::Conv3dImpl, tn::Conv3dImpl>(
      Conv3dOptions(2, 2, 2).padding({0, 1, 1}).padding_mode(torch::kCircular),
      at::randn({1, 2, 3, 4, 3}));
}

TEST_CASE("graft's layers clone into layers of their own", "[nn][layers]") {
  at::manual_seed(2);
  check_clone(std::make_shared<graft::nn::LinearImpl>(5, 7), at::randn({2, 5}));
  check_clone(std::make_shared<graft::nn::LinearImpl>(LinearOptions(5, 7).bias(false)),
              at::randn({2, 5}));
  check_clone(std::make_shared<graft::nn::EmbeddingImpl>(9, 4), at::tensor({1, 8}));
  check_clone(std::make_shared<graft::nn::Conv1dImpl>(
                  Conv1dOptions(2, 4, 3).stride(2).padding(torch::kValid).groups(2)),
              at::randn({1, 2, 9}));
  check_clone(std::make_shared<graft::nn::Conv2dImpl>(
                  Conv2dOptions(2, 3, 3).padding(1).dilation(2).padding_mode(torch::kReflect)),
              at::randn({1, 2, 9, 9}));
  check_clone(std::make_shared<graft::nn::Conv3dImpl>(Conv3dOptions(2, 3, 2).bias(false)),
              at::randn({1, 2, 3, 3, 3}));
}

TEST_CASE("a Sequential of graft's layers clones", "[nn][layers]") {
  torch::nn::Sequential net(graft::nn::Linear(4, 5), graft::nn::Linear(5, 2));
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(net->clone());
  const at::Tensor x = at::randn({3, 4});
  CHECK(at::equal(copy->forward(x), net->forward(x)));
}

TEST_CASE("a layer with adapters is not cloned", "[nn][layers]") {
  torch::nn::Module model;
  auto linear = model.register_module("a", graft::nn::Linear(4, 4));
  auto embedding = model.register_module("b", graft::nn::Embedding(5, 4));
  auto conv = model.register_module("c", graft::nn::Conv1d(Conv1dOptions(4, 4, 2)));
  auto adapter =
      graft::attach(model, graft::adapters::LoraOptions{.rank = 2}, {.targets = {"a", "b", "c"}});
  for (const auto& layer : adapter.layers())
    CHECK(contains(error_of([&] { layer.module->clone(); }), "cannot be cloned; detach them"));
  adapter.detach();
  CHECK(linear->clone() != nullptr);
  CHECK(embedding->clone() != nullptr);
  CHECK(conv->clone() != nullptr);
}

TEST_CASE("the frozen view names kinds and refuses what it cannot describe", "[nn][layers]") {
  using graft::nn::is_adaptable;
  using graft::nn::kind_name;
  CHECK(kind_name(frozen_layer(torch::nn::LinearImpl(2, 3))) == "Linear");
  CHECK(kind_name(frozen_layer(graft::nn::EmbeddingImpl(2, 3))) == "Embedding");
  CHECK(kind_name(frozen_layer(torch::nn::Conv1dImpl(2, 3, 1))) == "Conv1d");
  CHECK(kind_name(frozen_layer(graft::nn::Conv3dImpl(2, 3, 1))) == "Conv3d");
  CHECK_FALSE(graft::nn::bias_of(frozen_layer(torch::nn::EmbeddingImpl(2, 3))).defined());
  const torch::nn::LayerNormImpl norm({4});
  CHECK(is_adaptable(torch::nn::Conv2dImpl(1, 1, 1)));
  CHECK_FALSE(is_adaptable(norm));
  CHECK(contains(error_of([&] { frozen_layer(norm); }),
                 "[attach] a layer must be Linear, Embedding, Conv1d, Conv2d or Conv3d; got"));
  for (const auto& options :
       {EmbeddingOptions(3, 2).max_norm(1.0), EmbeddingOptions(3, 2).sparse(true)})
    CHECK(contains(error_of([&] { frozen_layer(torch::nn::EmbeddingImpl(options)); }),
                   "max_norm or sparse gradients cannot be adapted"));
}

TEST_CASE("layers of one input together are those layers one by one", "[nn][layers]") {
  // Two layers with an adapter that joins, one with another kind, with two at once, with none.
  const auto outputs = [](bool together) {
    at::manual_seed(4);
    torch::nn::Sequential model;
    std::vector<graft::nn::Linear> layers;
    for (int i = 0; i < 5; ++i) {
      layers.emplace_back(LinearOptions(6, 3 + i));
      model->push_back(std::to_string(i), layers.back());
    }
    const auto on = [](const char* name, std::vector<std::string> targets) {
      graft::AttachOptions options;
      options.name = name;
      options.targets = graft::nn::Selector(std::move(targets));
      options.seed = 3;
      return options;
    };
    std::vector<graft::AttachedAdapter> adapters = {
        attach(*model, graft::adapters::LoraOptions{.rank = 2, .dropout = 0.4},
               on("a", {"0", "2", "3"})),
        attach(*model, graft::adapters::DoraOptions{.rank = 2}, on("b", {"1"})),
        attach(*model, graft::adapters::LoraOptions{.rank = 3}, on("c", {"2"}))};
    adapters[0].set_active({"a", "b", "c"});
    for (auto& adapter : adapters) graft::testing::randomise(adapter.parameters());
    model->train();
    const at::Tensor x = at::randn({2, 5, 6});
    std::vector<at::Tensor> results;
    for (int pass = 0; pass < 2; ++pass) {
      if (together) {
        for (const auto& y : forward_together(layers, x)) results.push_back(y.detach());
      } else {
        for (auto& layer : layers) results.push_back(layer->forward(x).detach());
      }
    }
    for (const auto& layer : layers)
      results.push_back(at::scalar_tensor(layer->slot ? layer->slot->runs : -1));
    return results;
  };
  const auto apart = outputs(false), joined = outputs(true);
  REQUIRE(joined.size() == 15);
  for (size_t i = 0; i < apart.size(); ++i) CHECK(at::equal(apart[i], joined[i]));
  CHECK_FALSE(at::equal(apart[0], apart[5]));  // each pass draws a mask of its own
}
