#include <graft/adapters/lora.h>
#include <graft/nn/adapter_slot.h>

#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::adapters::LoraImpl;
using graft::nn::AdapterSlot;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using Names = std::vector<std::string>;

std::shared_ptr<LoraImpl> some_adapter(const graft::nn::LinearImpl& layer,
                                       const std::string& name) {
  auto lora = std::make_shared<LoraImpl>(graft::nn::frozen_layer(layer),
                                         graft::adapters::LoraOptions{.rank = 2},
                                         graft::adapters::LayerContext{name, 1});
  graft::testing::randomise(lora->parameters(), name.size());
  return lora;
}

}  // namespace

TEST_CASE("a slot is a child of its layer, found again and removed", "[nn][slot]") {
  const auto graft_layer = std::make_shared<graft::nn::LinearImpl>(4, 4);
  const auto torch_layer = std::make_shared<torch::nn::LinearImpl>(4, 4);
  for (torch::nn::Module* layer :
       std::vector<torch::nn::Module*>{graft_layer.get(), torch_layer.get()}) {
    CHECK(AdapterSlot::find(*layer) == nullptr);
    const auto slot = AdapterSlot::ensure(*layer);
    CHECK(AdapterSlot::ensure(*layer) == slot);
    CHECK(AdapterSlot::find(*layer) == slot);
    CHECK(layer->named_children().contains("adapters"));
    if (layer == graft_layer.get()) CHECK(graft_layer->slot == slot);
    AdapterSlot::remove(*layer);
    AdapterSlot::remove(*layer);
    CHECK(AdapterSlot::find(*layer) == nullptr);
  }
  CHECK(graft_layer->slot == nullptr);
}

TEST_CASE("a slot knows its adapters and runs the active ones", "[nn][slot]") {
  at::manual_seed(1);
  const auto layer = std::make_shared<graft::nn::LinearImpl>(4, 4);
  const auto slot = AdapterSlot::ensure(*layer);
  const at::Tensor x = at::randn({3, 4});
  CHECK_FALSE(slot->engaged());
  const auto a = some_adapter(*layer, "a"), b = some_adapter(*layer, "bb");
  slot->add("a", a);
  slot->add("bb", b);
  CHECK(slot->names() == Names{"a", "bb"});
  CHECK(slot->get("bb") == b);
  CHECK(slot->get("c") == nullptr);
  CHECK_FALSE(slot->engaged());

  const auto base = graft::nn::frozen_layer(*layer);
  const at::Tensor plain = layer->forward(x);
  slot->set_active({"a"});
  CHECK(at::equal(layer->forward(x), a->apply(base, x)));
  slot->set_active({"bb", "unknown", "a"});
  CHECK(slot->active() == Names{"bb", "a"});
  CHECK(distance(layer->forward(x), a->apply(base, x) + b->apply(base, x) - plain) < 1e-5);
  CHECK(slot->runs == 2);

  slot->enabled = false;
  CHECK(at::equal(layer->forward(x), graft::nn::apply(base, x)));
  slot->enabled = true;
  slot->merged = true;
  CHECK_FALSE(slot->engaged());
  CHECK(contains(error_of([&] { slot->set_active({}); }), "while they are merged"));
  slot->merged = false;

  slot->erase("bb");
  CHECK(slot->active() == Names{"a"});
  CHECK(at::equal(layer->forward(x), a->apply(base, x)));
}

TEST_CASE("a slot's names are unique and known", "[nn][slot]") {
  const auto layer = std::make_shared<graft::nn::LinearImpl>(4, 4);
  const auto slot = AdapterSlot::ensure(*layer);
  slot->add("a", some_adapter(*layer, "a"));
  CHECK(contains(error_of([&] { slot->add("a", some_adapter(*layer, "a")); }),
                 "name must be new; got 'a'"));
  CHECK(contains(error_of([&] { slot->erase("b"); }), "no adapter of that name; got 'b'"));
}
