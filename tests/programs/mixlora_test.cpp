// MixLoRA through the programs: figures, expert use, files, and what is refused.
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/programs/run_program.h"
#include "tests/support/testing.h"

using namespace graft::testing;
using nlohmann::json;

namespace {

std::string common(int batch_size = 2) {
  return "--method mixlora --model " + golden("tiny") + " --data " + golden("text.txt") +
         " --seq-len 32 --quiet --lr 1e-2 --schedule constant --rank 2 --batch-size " +
         std::to_string(batch_size) + " ";
}

std::vector<json> metrics(const std::string& folder) {
  std::vector<json> lines;
  std::stringstream stream(slurp(folder + "/metrics.jsonl"));
  for (std::string line; std::getline(stream, line);) lines.push_back(json::parse(line));
  return lines;
}

json evaluated(const std::string& adapter) {
  const auto result =
      run("evaluate", "--model " + golden("tiny") + " --data " + golden("text.txt") +
                          " --seq-len 32 --adapter " + adapter);
  INFO(result.err);
  REQUIRE(result.code == 0);
  return json::parse(result.out);
}

int64_t sum(const json& counts) {
  int64_t total = 0;
  for (const auto& count : counts) total += count.get<int64_t>();
  return total;
}

}  // namespace

TEST_CASE("a mixture's run reports its balance loss and the use of its experts",
          "[programs][mixlora]") {
  const ScratchFolder scratch;
  const std::string options = "--experts 4 --steps 4 --eval-fraction 0.2 ";
  const std::string flags = common() + options;
  const auto result = run("finetune", flags + "--output " + (scratch / "o"));
  INFO(result.err);
  REQUIRE(result.code == 0);
  for (const json& line : metrics(scratch / "o")) {
    const double balance = line["balance_loss"], penalty = line["penalty"];
    CHECK(std::abs(penalty - 0.01 * balance) < 1e-6);
    const double most = line["largest_expert_share"], least = line["smallest_expert_share"];
    CHECK((most >= 0.25 && least <= 0.25 && most <= 0.5 && least >= 0));
  }
  const json run_file = json::parse(slurp(scratch / "o/run.json"));
  CHECK(run_file["options"]["num_experts"] == 4);
  REQUIRE(run_file["expert_use"].size() == 2);
  // Two experts a token; a row of 32 has 31 inputs.
  CHECK(sum(run_file["expert_use"]["model.layers.1.mlp"]) == 2 * 4 * 2 * 31);
  const json loss = evaluated(scratch / "o");
  CHECK(loss["loss"].get<double>() < run_file["eval_loss_before"].get<double>());
  CHECK(loss["expert_use"].size() == 2);

  // Half the micro-batch twice is the same step; the balance loss is a mean over each.
  const auto halves =
      run("finetune", common(1) + options + "--grad-accum 2 --output " + (scratch / "halves"));
  REQUIRE(halves.code == 0);
  const json first = metrics(scratch / "o")[0], other = metrics(scratch / "halves")[0];
  CHECK(std::abs((first["loss"].get<double>() - first["penalty"].get<double>()) -
                 (other["loss"].get<double>() - other["penalty"].get<double>())) < 1e-5);
  CHECK(std::abs(other["penalty"].get<double>() - 0.01 * other["balance_loss"].get<double>()) <
        1e-6);

  const auto started = run("finetune", flags + "--init-adapter " + (scratch / "o") +
                                           " --balance-loss 0 --output " + (scratch / "second"));
  INFO(started.err);
  REQUIRE(started.code == 0);
  CHECK_FALSE(metrics(scratch / "second")[0].contains("penalty"));
  CHECK(metrics(scratch / "second")[0]["loss"].get<double>() < first["loss"].get<double>());
  const auto text = run("generate", "--model " + golden("tiny") + " --adapter " + (scratch / "o") +
                                        " --prompt The --max-new-tokens 3");
  CHECK(text.code == 0);
}

TEST_CASE("a resumed mixture repeats metrics, use and settings", "[programs][mixlora]") {
  const ScratchFolder scratch;
  const std::string flags =
      common() + "--experts 4 --dropout 0.1 --set jitter_noise=0.1 --steps 4 --eval-fraction 0 ";
  REQUIRE(run("finetune", flags + "--save-every 2 --output " + (scratch / "whole")).code == 0);
  const std::string resume = " --resume " + (scratch / "whole/checkpoint-2");
  REQUIRE(run("finetune", flags + "--output " + (scratch / "rest") + resume).code == 0);
  CHECK(slurp(scratch / "whole/adapter_model.safetensors") ==
        slurp(scratch / "rest/adapter_model.safetensors"));
  const json whole = metrics(scratch / "whole")[3], rest = metrics(scratch / "rest")[1];
  for (const char* key : {"loss", "balance_loss", "largest_expert_share", "smallest_expert_share"})
    CHECK(whole[key] == rest[key]);
  CHECK(json::parse(slurp(scratch / "whole/run.json"))["expert_use"] ==
        json::parse(slurp(scratch / "rest/run.json"))["expert_use"]);
  const auto other =
      run("finetune", flags + "--balance-loss 0.5 --output " + (scratch / "other") + resume);
  CHECK(other.code == 1);
  CHECK(contains(other.err, "a resumed run must repeat the options; got balance_loss=0.5"));
}

TEST_CASE("a mixture's plan is printed, and gradient checkpointing is told apart",
          "[programs][mixlora]") {
  const ScratchFolder scratch;
  const auto plan =
      run("finetune", common() + "--experts 4 --dry-run --json --output " + (scratch / "o"));
  REQUIRE(plan.code == 0);
  const int64_t block = 4 * 32 + 4 * 3 * 2 * (32 + 48);
  const int64_t attention = 2 * (2 * (32 + 32) + 2 * (32 + 16));
  CHECK(json::parse(plan.out)["trainable_parameters"] == 2 * (block + attention));
  const auto refused =
      run("finetune", common() + "--gradient-checkpointing --steps 1 --output " + (scratch / "o"));
  CHECK(refused.code == 1);
  CHECK(contains(refused.err, "gradient checkpointing"));
  CHECK(run("finetune", common() + "--gradient-checkpointing --balance-loss 0 --steps 1 --output " +
                            (scratch / "o"))
            .code == 0);
  for (const std::string& wrong : std::vector<std::string>{
           "--experts 1", "--top-k 9", "--router dense --top-k 2", "--balance-loss -1"})
    CHECK(run("finetune", common() + wrong + " --steps 1 --output " + (scratch / "o")).code == 1);
}

TEST_CASE("the adapter program knows mixtures and says what they are not", "[programs][mixlora]") {
  const ScratchFolder scratch;
  for (const char* name : {"a", "b"})
    REQUIRE(run("finetune", common() + "--experts 3 --steps 2 --eval-fraction 0 --seed " +
                                (name[0] == 'a' ? "1" : "2") + " --output " + (scratch / name))
                .code == 0);
  const auto info = run("adapter", "info --json " + (scratch / "a"));
  REQUIRE(info.code == 0);
  CHECK(json::parse(info.out)["method"] == "mixlora");
  CHECK(json::parse(info.out)["layers"] == 2 * 5);
  const json difference =
      json::parse(run("adapter", "diff --json " + (scratch / "a") + " " + (scratch / "b")).out);
  CHECK(difference["largest_difference"]["model.layers.0.mlp"].get<double>() > 0);
  CHECK(difference["largest_difference"].contains("model.layers.1.self_attn.q_proj"));
  CHECK(difference["missing_layers"].empty());

  const std::string pickled = scratch / "pickled";
  REQUIRE(run("adapter", "convert --to moe-peft " + (scratch / "a") + " " + pickled).code == 0);
  CHECK(std::filesystem::exists(pickled + "/adapter_model.bin"));
  CHECK(evaluated(pickled) == evaluated(scratch / "a"));

  const auto merged = run("adapter", "merge --model " + golden("tiny") + " --adapter " +
                                         (scratch / "a") + " --output " + (scratch / "m"));
  CHECK(merged.code == 1);
  CHECK(contains(merged.err, "a mixture cannot be merged"));
  const auto converted =
      run("adapter", "convert --to lora " + (scratch / "a") + " " + (scratch / "lora"));
  CHECK(converted.code == 1);
  CHECK(contains(converted.err, "must have a plain LoRA form; got mixlora"));
  const auto plain =
      run("adapter", "convert --to moe-peft " + golden("trained") + " " + (scratch / "no"));
  CHECK(plain.code == 1);
  CHECK(contains(plain.err, "MoE-PEFT's form holds mixtures (mixlora); got lora"));
}
