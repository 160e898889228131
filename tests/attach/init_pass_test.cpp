// What runs while batches gather what an initialiser needs.
#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>

#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

using namespace graft::testing;
using graft::attach;
using graft::AttachOptions;
using graft::adapters::LoraImpl;
using graft::adapters::LoraOptions;

namespace {

at::Tensor loss_on(GraftDecoder& model, const at::Tensor& tokens) {
  return at::cross_entropy_loss(model.forward(tokens).flatten(0, 1), tokens.roll(1, 1).flatten());
}

}  // namespace

TEST_CASE("the gradient is a mean: the same batch three times gives the start of one",
          "[attach][init]") {
  LoraOptions lora{.rank = 2, .init = "lora_ga"};
  lora.start.lora_ga.peft_variant = true;  // the one whose size follows the gradient's
  const auto start_B = [&](int64_t batches) {
    GraftDecoder model;
    model.to(at::kDouble);
    AttachOptions options{.targets = {"q_proj"}};
    options.init_data.batches = batches;
    options.init_data.loss = [&](int64_t) { return loss_on(model, some_tokens()); };
    return dynamic_cast<LoraImpl&>(*attach(model, lora, options).layers()[0].adapter)
        .start_B.clone();
  };
  CHECK(distance(start_B(3), start_B(1)) < 1e-12);
}

TEST_CASE("other adapters are off while batches run, on layers that are not chosen too",
          "[attach][init]") {
  GraftDecoder model;
  const at::Tensor plain = model.forward(some_tokens());
  auto other = attach(model, LoraOptions{.rank = 2}, {.targets = {"lm_head"}, .name = "other"});
  randomise(other.parameters());
  AttachOptions options{.targets = {"q_proj"}};
  options.init_data.batches = 1;
  bool alone = false;
  options.init_data.loss = [&](int64_t) {
    alone = distance(model.forward(some_tokens()), plain) < 1e-6;
    return loss_on(model, some_tokens());
  };
  attach(model, LoraOptions{.rank = 2, .init = "lora_ga"}, options);
  CHECK(alone);
}

TEST_CASE("an adapter does not keep the gradient that it started from", "[attach][init]") {
  GraftDecoder model;
  AttachOptions options{.targets = {"q_proj"}};
  options.init_data.batches = 1;
  options.init_data.loss = [&](int64_t) { return loss_on(model, some_tokens()); };
  const auto adapter = attach(model, LoraOptions{.rank = 2, .init = "lora_ga"}, options);
  for (const auto& layer : adapter.layers()) {
    const auto& facts = dynamic_cast<LoraImpl&>(*layer.adapter).context.facts;
    CHECK((facts == nullptr || !facts->gradient.defined()));
  }
}

TEST_CASE("initialisers that read inputs run every batch once", "[attach][init]") {
  for (const char* init : {"eva", "corda"}) {
    INFO(init);
    GraftDecoder model;
    AttachOptions options{.targets = {"q_proj", "v_proj", "o_proj"}};
    options.init_data.batches = 1;
    int64_t runs = 0;
    options.init_data.loss = [&](int64_t) {
      ++runs;
      return loss_on(model, some_tokens());
    };
    attach(model, LoraOptions{.rank = 2, .init = init}, options);
    CHECK(runs == 1);
  }
}
