// X-LoRA through the programs: two passes in training, evaluation and generation.
#include <ATen/ATen.h>
#include <graft/attach/attach.h>
#include <graft/moe/xlora.h>

#include <nlohmann/json.hpp>

#include "examples/models/load.h"
#include "tests/programs/run_program.h"
#include "tests/support/testing.h"

using namespace graft::testing;
using nlohmann::json;

namespace {

void finetune(const std::string& flags) {
  const auto result = run("finetune", flags);
  INFO(result.err);
  REQUIRE(result.code == 0);
}

// Two adapters that pull apart, and the flags of an X-LoRA over them.
std::string xlora_over(const ScratchFolder& scratch) {
  json adapters;
  for (const char* number : {"0", "1"}) {
    finetune(
        on_tiny_model("lora") + "--rank 2 --target-modules q_proj,down_proj --eval-fraction 0 " +
        "--init random --steps 3 --lr 3e-2 --seed " + number + " --output " + (scratch / number));
    adapters[number] = scratch / number;
  }
  return on_tiny_model("xlora") + "--set 'adapters=" + adapters.dump() +
         "' --set hidden_size=32 --set xlora_depth=2 --set xlora_size=8 ";
}

double distance(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

}  // namespace

TEST_CASE("X-LoRA's classifier learns in finetune, and a resumed run ends with the same bytes",
          "[programs][xlora]") {
  const ScratchFolder scratch;
  const std::string flags = xlora_over(scratch) +
                            "--steps 8 --lr 3e-2 --save-every 4 --eval-data " + golden("text.txt") +
                            " ";
  finetune(flags + "--output " + (scratch / "whole"));
  const json whole = json::parse(slurp(scratch / "whole/run.json"));
  CHECK(whole["eval_loss_after"] < whole["eval_loss_before"]);
  finetune(flags + "--output " + (scratch / "rest") + " --resume " +
           (scratch / "whole/checkpoint-4"));  // the classifier's dropout included
  CHECK(slurp(scratch / "whole/adapter_model.safetensors") ==
        slurp(scratch / "rest/adapter_model.safetensors"));
  const double loss = loss_of("--adapter " + (scratch / "whole"));
  CHECK(std::abs(loss - whole["eval_loss_after"].get<double>()) < 1e-5);
  for (const std::string& other : {std::string(), "--adapter " + (scratch / "0")})
    CHECK(std::abs(loss - loss_of(other)) > 1e-3);
  const auto refused = run(
      "finetune", flags + "--gradient-checkpointing --eval-fraction 0 --output " + (scratch / "o"));
  CHECK(refused.code == 1);
  CHECK(contains(refused.err, "[xlora] a pass by trained scalings must keep its graph"));
}

TEST_CASE("X-LoRA's passes keep a cache each", "[programs][xlora]") {
  const ScratchFolder scratch;
  finetune(xlora_over(scratch) + "--steps 2 --lr 3e-2 --eval-fraction 0 --output " +
           (scratch / "x"));
  auto model = graft::models::load(golden("tiny"));
  auto adapter = graft::attach_from(*model.decoder, scratch / "x");
  model.decoder->eval();
  const at::NoGradGuard no_grad;
  const at::Tensor tokens = at::tensor({5, 9, 2, 40, 7, 11}, at::kLong).unsqueeze(0);
  const at::Tensor whole = model.decoder->logits(tokens);
  auto cache = model.decoder->make_cache(1, 6);
  CHECK(distance(model.decoder->next_logits(tokens.narrow(1, 0, 3), cache), whole.select(1, 2)) <
        1e-5);
  for (int64_t t = 3; t < 6; ++t)
    CHECK(distance(model.decoder->next_logits(tokens.narrow(1, t, 1), cache), whole.select(1, t)) <
          1e-5);
  CHECK(graft::moe::active_xlora(*model.decoder) != nullptr);
  adapter.disable();
  CHECK(graft::moe::active_xlora(*model.decoder) == nullptr);
  CHECK(distance(model.decoder->logits(tokens), whole) > 1e-3);
  adapter.enable();

  auto second = graft::attach_from(*model.decoder, scratch / "x", "second");
  second.set_active({"default", "second"});
  CHECK(contains(error_of([&] { model.decoder->hidden(tokens); }),
                 "[xlora] one X-LoRA can be active at a time; got two"));
  second.set_active();
  const auto rows = second.batch_rows({{"second", 1}});
  CHECK(contains(error_of([&] { model.decoder->hidden(tokens); }), "got a batch in parts"));
}
