// Every method through the programs: it trains, resumes bit for bit, and turns into plain LoRA.
#include <ATen/ATen.h>
#include <graft/io/safetensors.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/programs/run_program.h"
#include "tests/support/testing.h"

using namespace graft::testing;
using nlohmann::json;

namespace {

std::vector<json> metrics(const std::string& folder) {
  std::vector<json> lines;
  std::stringstream stream(slurp(folder + "/metrics.jsonl"));
  for (std::string line; std::getline(stream, line);) lines.push_back(json::parse(line));
  return lines;
}

// A method with options that make it do what is its own within six steps.
struct Case {
  const char *method, *options;
};
const Case kCases[] = {
    {"lora", "--rank 4 --set loraplus_lr_ratio=4"},
    {"dora", "--rank 4 --dropout 0.1"},
    {"sora", "--rank 4 --dropout 0.1 --set sparse_lambda=2"},
    {"dylora", "--rank 4 --dropout 0.1"},
    {"mixlora", "--experts 4 --top-k 2 --rank 2 --dropout 0.1 --set jitter_noise=0.1"},
    {"mixlora", "--experts 4 --router biased --balance-loss 0 --rank 2 --set use_dora=true"},
    {"adalora", "--rank 4 --set target_r=2 --set tinit=1 --set tfinal=2 --dropout 0.1"},
    {"lora-fa", "--rank 4 --dropout 0.1"},
    {"lora-xs", "--rank 4"},
    {"lora-xs", "--rank 4 --init lora-sb --init-batches 2 --set sb_step=1e-4"},
    {"nlora", "--rank 4 --init cur"},
    {"vera", "--rank 8 --dropout 0.1"},
    {"randlora", "--rank 8 --dropout 0.1"},
    {"shira", "--rank 2"},
    {"paca", "--rank 4"},
};

}  // namespace

TEST_CASE("every method trains, and a resumed run ends with the same bytes",
          "[programs][methods]") {
  for (const auto& [method, options] : kCases) {
    INFO(method);
    const ScratchFolder scratch;
    const std::string flags = on_tiny_model(method) + "--lr 1e-2 " + options +
                              " --steps 6 --eval-fraction 0.2 --save-every 3 ";
    const auto whole = run("finetune", flags + "--output " + (scratch / "whole"));
    INFO(whole.err);
    REQUIRE(whole.code == 0);
    const json run_file = json::parse(slurp(scratch / "whole/run.json"));
    CHECK(run_file["eval_loss_after"] < run_file["eval_loss_before"]);
    const auto rest = run("finetune", flags + "--output " + (scratch / "rest") + " --resume " +
                                          (scratch / "whole/checkpoint-3"));
    INFO(rest.err);
    REQUIRE(rest.code == 0);
    CHECK(slurp(scratch / "whole/adapter_model.safetensors") ==
          slurp(scratch / "rest/adapter_model.safetensors"));
    CHECK(loss_of("--adapter " + (scratch / "whole")) < loss_of(""));
  }
}

TEST_CASE("methods report their own figures", "[programs][methods]") {
  const ScratchFolder scratch;
  const auto figure = [&](const std::string& method, const std::string& options, const char* name) {
    INFO(method);
    const auto result =
        run("finetune", on_tiny_model(method) + "--lr 1e-2 " + options +
                            " --steps 3 --eval-fraction 0 --output " + (scratch / method));
    INFO(result.err);
    REQUIRE(result.code == 0);
    const auto lines = metrics(scratch / method);
    REQUIRE(lines.size() == 3);
    return lines.back().value(name, -1.0);
  };
  CHECK(figure("sora", "--rank 4", "active_rank") > 0);
  const double rank = figure("dylora", "--rank 4", "rank");
  CHECK((rank >= 1 && rank <= 4 && rank == std::floor(rank)));
  CHECK(figure("adalora", "--rank 4 --set target_r=2", "penalty") > 0);
  CHECK(figure("lora", "--rank 4", "rank") == -1.0);
}

TEST_CASE("convert, prune and truncate keep what the adapter computes", "[programs][methods]") {
  const ScratchFolder scratch;
  for (const auto& [method, options, command] :
       {std::tuple("sora", "--rank 4 --set sparse_lambda=20", std::string("prune")),
        {"lora-xs", "--rank 4", "convert --to lora"},
        {"nlora", "--rank 4 --init cur", "convert --to lora"},
        {"paca", "--rank 4", "convert --to lora"},
        {"vera", "--rank 8", "convert --to lora --model " + golden("tiny")},
        {"dylora", "--rank 4", "truncate --rank 3"}}) {
    INFO(method);
    const std::string own = scratch / method, plain = scratch / (std::string(method) + "-plain");
    const auto trained = run("finetune", on_tiny_model(method) + "--lr 1e-2 " + options +
                                             " --steps 6 --eval-fraction 0 --output " + own);
    INFO(trained.err);
    REQUIRE(trained.code == 0);
    const auto converted = run("adapter", command + " --json " + own + " " + plain);
    INFO(converted.err);
    REQUIRE(converted.code == 0);
    const json done = json::parse(converted.out);
    const std::string at_rank = method == std::string("dylora") ? " --rank 3" : "";
    CHECK(std::abs(loss_of("--adapter " + own + at_rank) - loss_of("--adapter " + plain)) < 1e-5);
    CHECK(json::parse(slurp(plain + "/adapter_config.json"))["peft_type"] == "LORA");
    if (method == std::string("dylora")) CHECK(done["largest_rank"] == 3);
  }
  CHECK(run("adapter", "truncate --rank 9 " + (scratch / "dylora") + " " + (scratch / "no")).code ==
        1);
  CHECK(run("adapter", "truncate --rank 2 " + (scratch / "sora") + " " + (scratch / "no")).code ==
        1);
  CHECK(run("adapter", "convert --to dora " + (scratch / "sora") + " " + (scratch / "no")).code ==
        2);
  CHECK_FALSE(std::filesystem::exists(scratch / "no"));
}

TEST_CASE("a flag that the method does not know is wrong usage", "[programs][methods]") {
  const ScratchFolder scratch;
  for (const auto& [method, flag] : {std::pair("vera", "--alpha 3"),
                                     {"randlora", "--init gaussian"},
                                     {"sora", "--rslora"},
                                     {"lora", "--set sparse_lambda=1"},
                                     {"lora", "--experts 4"},
                                     {"dora", "--top-k 2"},
                                     {"sora", "--router top-k"},
                                     {"lora", "--balance-loss 0.1"}}) {
    const auto result = run("finetune", on_tiny_model(method) + "--lr 1e-2 " + flag +
                                            " --steps 1 --output " + (scratch / "o"));
    CHECK(result.code == 2);
    CHECK(contains(result.err, method));
  }
  const auto evaluated =
      run("evaluate", "--model " + golden("tiny") + " --data " + golden("text.txt") + " --rank 2");
  CHECK(evaluated.code == 2);
}
