// What finetune hands to initialisers: blocks recomputed, logits left out where nobody reads them.
#include <ATen/ATen.h>
#include <graft/adapters/lora.h>

#include "examples/models/load.h"
#include "examples/trainer/initialisation.h"
#include "tests/programs/run_program.h"
#include "tests/support/gradcheck.h"

using namespace graft::testing;
using graft::adapters::LoraOptions;
using graft::trainer::RowOrder;
using graft::trainer::TokenData;

namespace {

// LoRA's start values on the tiny model, from init_data or, `plain`, from the loss as it is.
std::vector<at::Tensor> start(const std::string& init, const std::vector<std::string>& targets,
                              bool plain) {
  auto model = graft::models::load(golden("tiny"));
  const TokenData rows = TokenData::from_file(golden("text.txt"), model.tokenizer, 32, false);
  RowOrder order(rows.size(), 2, false, 0);
  graft::AttachOptions options;
  options.targets = graft::nn::Selector(targets);
  options.init_data = graft::trainer::init_data(*model.decoder, rows, order, 3, /*quiet=*/true);
  if (plain)
    options.init_data.loss = [&](int64_t i) {
      const auto batch = rows.batch(order.batch(i));
      return model.decoder->loss(batch.inputs, batch.targets);
    };
  const auto adapter = attach(*model.decoder, LoraOptions{.rank = 4, .init = init}, options);
  std::vector<at::Tensor> values;
  for (const auto& parameter : adapter.parameters()) values.push_back(parameter.detach().clone());
  return values;
}

}  // namespace

TEST_CASE("initialisers find with finetune's batches what they find with the plain loss",
          "[programs][init]") {
  for (const std::string init : {"lora_ga", "corda", "eva"}) {
    for (const bool output : {false, true}) {  // the output layer's input needs the loss
      INFO(init << (output ? ", output layer too" : ""));
      std::vector<std::string> targets = {"q_proj", "down_proj"};
      if (output) targets.push_back("lm_head");
      const auto got = start(init, targets, false), wanted = start(init, targets, true);
      REQUIRE(got.size() == wanted.size());
      for (size_t i = 0; i < got.size(); ++i)
        CHECK(distance(got[i], wanted[i]) <= 1e-5 * wanted[i].abs().max().item<double>());
    }
  }
}
