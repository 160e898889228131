#include <graft/adapters/lora.h>
#include <graft/attach/adapted.h>
#include <graft/nn/linear.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/normalization.h>

#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::AdaptableBy;
using graft::AdaptableLayer;
using graft::Adapted;
using graft::adapters::LoraImpl;
using graft::adapters::LoraOptions;
using graft::testing::distance;
using graft::testing::randomise;

using LoraLinear = Adapted<torch::nn::LinearImpl, LoraImpl>;

// A method for Linear alone.
struct OnlyLinear : graft::nn::Adapter {
  static constexpr const char* kName = "only_linear";
  at::Tensor forward(const graft::nn::FrozenLinear&, const at::Tensor& x) { return x; }
};

static_assert(AdaptableLayer<torch::nn::LinearImpl> && AdaptableLayer<graft::nn::LinearImpl>);
static_assert(AdaptableLayer<torch::nn::EmbeddingImpl>);
static_assert(AdaptableLayer<torch::nn::Conv1dImpl> && AdaptableLayer<torch::nn::Conv3dImpl>);
static_assert(!AdaptableLayer<torch::nn::LayerNormImpl>);
static_assert(!AdaptableLayer<torch::nn::Linear>, "the holder is no layer");
static_assert(AdaptableBy<torch::nn::LinearImpl, LoraImpl>);
static_assert(AdaptableBy<torch::nn::Conv2dImpl, LoraImpl>);
static_assert(!AdaptableBy<torch::nn::LayerNormImpl, LoraImpl>);
static_assert(AdaptableBy<torch::nn::LinearImpl, OnlyLinear>);
static_assert(!AdaptableBy<torch::nn::EmbeddingImpl, OnlyLinear>);
static_assert(!AdaptableBy<torch::nn::LinearImpl, torch::nn::LinearImpl>, "not an adapter");

template <class Layer>
std::vector<std::string> keys(const Layer& layer) {
  std::vector<std::string> names;
  for (const auto& item : layer.named_parameters()) names.push_back(item.key());
  return names;
}

std::shared_ptr<LoraLinear> some_layer(const LoraOptions& options = {.rank = 2, .alpha = 4}) {
  at::manual_seed(1);
  auto layer = std::make_shared<LoraLinear>(torch::nn::LinearOptions(5, 7), options, "fc", 3);
  randomise(layer->method().parameters());
  return layer;
}

}  // namespace

TEST_CASE("an adapted layer keeps the base's keys, frozen, and trains the method's",
          "[attach][adapted]") {
  const auto layer = some_layer();
  CHECK(keys(*layer) == std::vector<std::string>{"weight", "bias", "lora.lora_A", "lora.lora_B"});
  for (const auto& item : layer->named_parameters())
    CHECK(item.value().requires_grad() == item.key().starts_with("lora."));
  CHECK(layer->method().context.name == "fc");
}

TEST_CASE("an adapted layer computes base and update, of each kind", "[attach][adapted]") {
  const auto linear = some_layer();
  const at::Tensor x = at::randn({2, 3, 5});
  const auto merged = linear->merged();
  CHECK(distance(linear->forward(x), at::linear(x, merged.weight, merged.bias)) < 1e-5);
  CHECK(distance(linear->forward(x), at::linear(x, linear->weight, linear->bias)) > 1e-2);

  Adapted<torch::nn::EmbeddingImpl, LoraImpl> embedding(torch::nn::EmbeddingOptions(9, 4),
                                                        {.rank = 2}, "embed");
  randomise(embedding.method().parameters());
  const at::Tensor indices = at::tensor({0, 8, 8});
  CHECK(distance(embedding.forward(indices), at::embedding(embedding.merged().weight, indices)) <
        1e-5);

  Adapted<torch::nn::Conv2dImpl, LoraImpl> conv(
      torch::nn::Conv2dOptions(2, 3, 3).padding(1).padding_mode(torch::kCircular), {.rank = 2},
      "conv");
  randomise(conv.method().parameters());
  const at::Tensor image = at::randn({1, 2, 5, 5});
  torch::nn::Conv2d plain(
      torch::nn::Conv2dOptions(2, 3, 3).padding(1).padding_mode(torch::kCircular));
  plain->weight.set_data(conv.merged().weight);
  plain->bias.set_data(conv.merged().bias);
  CHECK(distance(conv.forward(image), plain->forward(image)) < 1e-5);
}

TEST_CASE("adapted layers work in a Sequential and learn there", "[attach][adapted]") {
  at::manual_seed(2);
  const LoraOptions lora{.rank = 2, .alpha = 4};
  torch::nn::Sequential net(
      std::make_shared<LoraLinear>(torch::nn::LinearOptions(5, 7), lora, "0"),
      std::make_shared<LoraLinear>(torch::nn::LinearOptions(7, 3).bias(false), lora, "1"));
  const at::Tensor x = at::randn({4, 5});
  net->forward(x).sum().backward();
  for (const auto& item : net->named_parameters())
    CHECK(item.value().grad().defined() == (item.key().find("lora") != std::string::npos));

  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(net->clone());
  REQUIRE(copy != nullptr);
  CHECK(at::equal(copy->forward(x), net->forward(x)));
}

TEST_CASE("a clone is equal and of its own", "[attach][adapted]") {
  const auto layer = some_layer({.rank = 2, .alpha = 4, .dropout = 0.5, .bias = true});
  const auto before = graft::testing::snapshot(*layer);
  const at::Tensor x = at::randn({6, 5});
  layer->forward(x);  // the mask counter moves
  layer->method().lora_A.set_requires_grad(false);
  layer->weight.set_requires_grad(true);
  const auto copy = std::dynamic_pointer_cast<LoraLinear>(layer->clone());
  REQUIRE(copy != nullptr);
  CHECK(graft::testing::holds_exactly(*copy, before));
  CHECK(graft::testing::holds_exactly(*layer, before));
  for (const auto& item : layer->named_parameters()) {
    const at::Tensor& twin = copy->named_parameters()[item.key()];
    CHECK(twin.requires_grad() == item.value().requires_grad());
    CHECK_FALSE(twin.is_alias_of(item.value()));
  }
  CHECK(copy->method().lora_A.is_same(copy->named_parameters()["lora.lora_A"]));
  CHECK(copy->weight.is_same(copy->named_parameters()["weight"]));
  CHECK(copy->method().counters() == layer->method().counters());
  CHECK(at::equal(copy->forward(x), layer->forward(x)));  // the same mask

  randomise(copy->parameters());
  CHECK(graft::testing::holds_exactly(*layer, before));
  layer->eval();
  CHECK_FALSE(std::dynamic_pointer_cast<LoraLinear>(layer->clone())->method().is_training());
}

TEST_CASE("a clone of a layer in another type keeps the type", "[attach][adapted]") {
  const auto layer = some_layer();
  layer->to(at::kDouble);
  const auto copy = std::dynamic_pointer_cast<LoraLinear>(layer->clone());
  const at::Tensor x = at::randn({6, 5}, at::kDouble);
  CHECK(at::equal(copy->forward(x), layer->forward(x)));
}

TEST_CASE("layers of different names start differently", "[attach][adapted]") {
  const auto A = [](const std::string& name, uint64_t seed) {
    LoraLinear layer(torch::nn::LinearOptions(5, 7), {.rank = 2}, name, seed);
    return layer.method().lora_A.detach();
  };
  CHECK(at::equal(A("a", 1), A("a", 1)));
  CHECK_FALSE(at::equal(A("a", 1), A("b", 1)));
  CHECK_FALSE(at::equal(A("a", 1), A("a", 2)));
}
