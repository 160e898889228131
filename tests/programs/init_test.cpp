// Initialisers through `finetune`: the run, what it reports, its files, and a resumed run.
#include <cmath>
#include <nlohmann/json.hpp>

#include "tests/programs/run_program.h"
#include "tests/support/testing.h"

using namespace graft::testing;
using nlohmann::json;

namespace {

std::string flags(const std::string& init) {
  return "--model " + golden("tiny") + " --data " + golden("text.txt") +
         " --seq-len 32 --batch-size 2 --quiet --lr 1e-3 --schedule constant --rank 4 --alpha 8 "
         "--steps 6 --eval-fraction 0.2 --save-every 3 --init-batches 3 --init " +
         init + " ";
}

}  // namespace

TEST_CASE("finetune starts by every initialiser, reports it, and resumes to the same bytes",
          "[programs][init]") {
  double before = 0;
  for (const std::string init :
       {"kaiming", "pissa", "pissa_niter_4", "olora", "nystrom", "lora-ga", "corda", "eva"}) {
    INFO(init);
    const ScratchFolder scratch;
    const auto whole = run("finetune", flags(init) + "--output " + (scratch / "whole"));
    INFO(whole.err);
    REQUIRE(whole.code == 0);
    const json run_file = json::parse(slurp(scratch / "whole/run.json"));
    CHECK(run_file["eval_loss_after"] < run_file["eval_loss_before"]);
    if (init == "kaiming")
      before = run_file["eval_loss_before"];
    else  // the model starts as it was
      CHECK(std::abs(run_file["eval_loss_before"].get<double>() - before) < 1e-5);
    CHECK(run_file["init_seconds"] > 0);
    CHECK(run_file.contains("initialisation") == (init != "kaiming"));
    if (init != "kaiming") {
      const json& layer = run_file["initialisation"][0];
      CHECK(contains(layer["layer"], "layers.0."));
      CHECK(layer["rank"] >= 1);
      if (init != "olora" && init != "nystrom") {
        CHECK(layer["singular_values"].size() > 0);
        CHECK((layer["explained"] > 0.0 && layer["explained"] <= 1.0 + 1e-6));
      }
    }
    const auto rest = run("finetune", flags(init) + "--output " + (scratch / "rest") +
                                          " --resume " + (scratch / "whole/checkpoint-3"));
    INFO(rest.err);
    REQUIRE(rest.code == 0);
    CHECK(slurp(scratch / "whole/adapter_model.safetensors") ==
          slurp(scratch / "rest/adapter_model.safetensors"));
    CHECK(slurp(scratch / "whole/adapter_config.json") ==
          slurp(scratch / "rest/adapter_config.json"));
    CHECK(loss_of("--adapter " + (scratch / "whole")) < loss_of(""));
  }
}

TEST_CASE("options of initialisers come through --set and the adapter's config",
          "[programs][init]") {
  const ScratchFolder scratch;
  const auto ranks = [&](const std::string& name, const std::string& extra) {
    const auto result = run("finetune", flags("eva") + extra + " --output " + (scratch / name));
    INFO(result.err);
    REQUIRE(result.code == 0);
    std::vector<int64_t> list;
    const json run_file = json::parse(slurp(scratch / (name + "/run.json")));
    for (const auto& layer : run_file["initialisation"]) list.push_back(layer["rank"]);
    return list;
  };
  const auto even = ranks("even", "--set 'eva_config={\"rho\": 1.0}'");
  CHECK(std::all_of(even.begin(), even.end(), [](int64_t rank) { return rank == 4; }));
  const auto uneven = ranks("uneven", "");
  CHECK_FALSE(std::all_of(uneven.begin(), uneven.end(), [](int64_t rank) { return rank == 4; }));
}

TEST_CASE("contradictions about the start are refused before anything is written",
          "[programs][init]") {
  const ScratchFolder scratch;
  for (const auto& [options, words] :
       {std::pair("--init pissa --dropout 0.1", "got dropout=0.1"),
        {"--init lora-ga --init-batches 0", "init-batches must be at least 1; got 0"},
        {"--init pissa --method dora", "use it with lora"},
        {"--init lora-sb", "use it with lora-xs"},
        {"--init kaiming --method lora-xs", "init must be svd or lora_sb; got 'kaiming'"},
        {"--init lora-ga --set 'lora_ga_config={\"gamma\": 2}'", "got gamma"},
        {"--init lora-ga --set 'lora_ga_config={\"scale\": \"loud\"}'", "got 'loud'"}}) {
    INFO(options);
    const auto result =
        run("finetune", "--model " + golden("tiny") + " --data " + golden("text.txt") +
                            " --seq-len 32 --batch-size 2 --steps 1 --rank 4 " + options +
                            " --output " + (scratch / "o"));
    CHECK(result.code == 1);
    CHECK(contains(result.err, words));
    CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  }
}
