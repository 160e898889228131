// finetune --jobs: each job ends with the bytes of a run of its own.
#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "examples/trainer/joint_pass.h"
#include "tests/programs/run_program.h"
#include "tests/support/testing.h"

using namespace graft::testing;
using nlohmann::json;

namespace {

std::string model_and_data() {
  return "--model " + golden("tiny") + " --data " + golden("text.txt") +
         " --eval-fraction 0.1 --quiet ";
}

const std::string kUsual = "--seq-len 32 --batch-size 2 --lr 1e-2 --steps 4 ";

// One matrix library for all runs: left to itself, each run measures and may choose another.
ProgramResult finetune(const std::string& arguments) {
  return run_shell(std::string("GRAFT_PRODUCTS=mkl ") + GRAFT_BIN + "/finetune " + arguments);
}

// A job as an entry of the file, whose gaps kUsual fills, and as the flags of a run of its own.
struct Job {
  json entry;
  std::string flags;
};

// Methods, ranks, layers, seeds, lengths and batches of all kinds.
std::vector<Job> four_jobs() {
  return {
      {{{"rank", 4}, {"dropout", 0.1}, {"seed", 3}}, kUsual + "--rank 4 --dropout 0.1 --seed 3"},
      {{{"method", "dora"}, {"rank", 2}, {"target_modules", {"q_proj", "down_proj"}}, {"steps", 6}},
       "--seq-len 32 --batch-size 2 --lr 1e-2 --steps 6 --method dora --rank 2 "
       "--target-modules q_proj,down_proj"},
      {{{"lr", 3e-3},
        {"seq-len", 24},
        {"batch-size", 3},
        {"grad-accum", 2},
        {"shuffle", false},
        {"rslora", true}},
       "--seq-len 24 --batch-size 3 --lr 3e-3 --steps 4 --grad-accum 2 --no-shuffle --rslora"},
      {{{"method", "sora"},
        {"set", {"sparse_lambda=0.5", "threshold=constant"}},
        {"dropout", 0.3},
        {"save_every", 2},
        {"eval_every", 2},
        {"max-grad-norm", 0.1}},
       kUsual + "--method sora --set sparse_lambda=0.5 --set threshold=constant --dropout 0.3 "
                "--save-every 2 --eval-every 2 --max-grad-norm 0.1"},
  };
}

std::string write_jobs(const ScratchFolder& scratch, const std::vector<Job>& jobs) {
  json file = json::array();
  for (size_t i = 0; i < jobs.size(); ++i) {
    file.push_back(jobs[i].entry);
    file.back()["output"] = scratch / ("job" + std::to_string(i));
  }
  spill(scratch / "jobs.json", file.dump());
  return scratch / "jobs.json";
}

// metrics.jsonl without the times.
std::string steps_of(const std::string& folder) {
  std::string text;
  std::stringstream stream(slurp(folder + "/metrics.jsonl"));
  for (std::string line; std::getline(stream, line);) {
    json step = json::parse(line);
    step.erase("seconds");
    text += step.dump() + "\n";
  }
  return text;
}

json results_of(const std::string& folder) {
  json run = json::parse(slurp(folder + "/run.json"));
  for (const char* measured : {"load_seconds", "init_seconds", "init_peak_rss_mib", "train_seconds",
                               "tokens_per_second", "peak_rss_mib", "first_step_seconds"})
    run.erase(measured);
  return run;
}

void check_same_run(const std::string& found, const std::string& expected) {
  INFO(found);
  CHECK_FALSE(steps_of(expected).empty());
  CHECK(steps_of(found) == steps_of(expected));
  CHECK(results_of(found) == results_of(expected));
  for (const char* file : {"adapter_model.safetensors", "adapter_config.json"})
    CHECK(slurp(found + "/" + file) == slurp(expected + "/" + file));
}

void check_against_solo(const std::string& run_flags, const std::string& jobs_flags,
                        const std::string& library) {
  const ScratchFolder scratch;
  const std::string program = "GRAFT_PRODUCTS=" + library + " " + GRAFT_BIN + "/finetune " +
                              model_and_data() + run_flags + " ";
  const auto jobs = four_jobs();
  const auto result =
      run_shell(program + kUsual + jobs_flags + " --jobs " + write_jobs(scratch, jobs));
  INFO(result.err);
  REQUIRE(result.code == 0);
  for (size_t i = 0; i < jobs.size(); ++i) {
    const std::string number = std::to_string(i), solo = scratch / ("solo" + number);
    const auto alone = run_shell(program + jobs[i].flags + " --output " + solo);
    INFO(alone.err);
    REQUIRE(alone.code == 0);
    check_same_run(scratch / ("job" + number), solo);
  }
  for (const char* file : {"optimizer.safetensors", "trainer_state.json"})
    CHECK(slurp(scratch / ("job3/checkpoint-2/" + std::string(file))) ==
          slurp(scratch / ("solo3/checkpoint-2/" + std::string(file))));
}

// One line "error: [area] ...", and every part in it.
void check_refusal(const std::string& flags, const std::string& file, const std::string& name,
                   int code, const std::vector<std::string>& parts) {
  const ScratchFolder scratch;
  spill(scratch / name, file);
  const auto result = finetune(model_and_data() + kUsual + flags + " --jobs " + (scratch / name));
  INFO(result.err);
  CHECK(result.code == code);
  CHECK(result.err.starts_with("error: ["));
  CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  for (const auto& part : parts) {
    INFO(part);
    CHECK(contains(result.err, part));
  }
}

}  // namespace

TEST_CASE("jobs in one batch leave the bytes of runs of their own", "[programs][jobs]") {
  for (const char* library : {"mkl", "onednn"}) check_against_solo("", "", library);
}

TEST_CASE("so do jobs one after the other, two and two, and with recomputed blocks",
          "[programs][jobs]") {
  check_against_solo("", "--jobs-per-pass 1", "mkl");
  check_against_solo("", "--jobs-per-pass 2", "mkl");
  check_against_solo("--gradient-checkpointing", "", "mkl");
}

TEST_CASE("so do jobs in fp16, each with a loss scale of its own", "[programs][jobs]") {
  check_against_solo("--dtype fp16", "", "mkl");
}

TEST_CASE("jobs share a pass up to 256 tokens on the CPU, unless told otherwise",
          "[programs][jobs]") {
  using graft::trainer::pass_limit;
  CHECK(pass_limit(0, true).has_room(0, 0, 1000));  // one job always
  CHECK(pass_limit(0, true).has_room(1, 128, 128));
  CHECK_FALSE(pass_limit(0, true).has_room(1, 128, 129));
  CHECK(pass_limit(0, false).has_room(9, 10000, 10000));
  CHECK(pass_limit(2, true).has_room(1, 10000, 10000));
  CHECK_FALSE(pass_limit(2, true).has_room(2, 1, 1));

  const ScratchFolder scratch;
  spill(scratch / "jobs.json",
        json({{{"output", "a"}}, {{"output", "b"}}, {{"output", "c"}}}).dump());
  // The activations among the predicted memory of all jobs, in MiB.
  const auto activations = [&](const std::string& flags) {
    const std::string out =
        finetune("--model " + golden("tiny") + " --data " + golden("text.txt") +
                 " --batch-size 2 --dry-run " + flags + " --jobs " + (scratch / "jobs.json"))
            .out;
    const size_t at = out.rfind("activations ");
    REQUIRE(at != std::string::npos);
    REQUIRE(contains(out.substr(out.rfind("\nall jobs")), "activations "));
    return std::stod(out.substr(at + 12));
  };
  const double one = activations("--seq-len 128 --jobs-per-pass 1");
  CHECK(one > 0.5);
  CHECK(activations("--seq-len 128") == one);
  CHECK(std::abs(activations("--seq-len 128 --jobs-per-pass 2") - 2 * one) < 0.15);
  const double short_one = activations("--seq-len 32 --jobs-per-pass 1");
  CHECK(std::abs(activations("--seq-len 32") - 3 * short_one) < 0.25);
}

TEST_CASE("jobs that cannot share a pass go through the model alone", "[programs][jobs]") {
  const ScratchFolder scratch;
  const std::string parts = scratch / "part";
  REQUIRE(finetune(model_and_data() + kUsual + "--rank 2 --target-modules q_proj --output " + parts)
              .code == 0);
  const std::string adapters = json({{"0", parts}, {"1", parts}}).dump();
  const std::vector<Job> jobs = {
      {{{"rank", 4}}, kUsual + "--rank 4"},
      {{{"method", "mixlora"}, {"rank", 2}, {"experts", 3}},
       kUsual + "--method mixlora --rank 2 --experts 3"},
      {{{"method", "xlora"},
        {"set", {"adapters=" + adapters, "hidden_size=32", "enable_softmax=false"}}},
       kUsual + "--method xlora --set 'adapters=" + adapters +
           "' --set hidden_size=32 --set enable_softmax=false"},
      {{{"bias", "all"}, {"rank", 2}}, kUsual + "--rank 2 --bias all"},
      {{{"rank", 3}, {"dropout", 0.1}}, kUsual + "--rank 3 --dropout 0.1"},
  };
  const auto result = finetune(model_and_data() + kUsual + "--jobs " + write_jobs(scratch, jobs));
  INFO(result.err);
  REQUIRE(result.code == 0);
  for (size_t i = 0; i < jobs.size(); ++i) {
    const std::string number = std::to_string(i), solo = scratch / ("solo" + number);
    REQUIRE(finetune(model_and_data() + jobs[i].flags + " --output " + solo).code == 0);
    check_same_run(scratch / ("job" + number), solo);
  }
}

TEST_CASE("jobs of a .jsonl file, on examples of all lengths", "[programs][jobs]") {
  const ScratchFolder scratch;
  std::string examples;
  for (int i = 0; i < 12; ++i)
    examples +=
        json{{"text", std::string(static_cast<size_t>(5 + i * i % 17), 'a' + i)}}.dump() + "\n";
  spill(scratch / "data.jsonl", examples);
  const auto entry = [&](const char* name, bool packing) {
    return json{{"output", scratch / name}, {"data", scratch / "data.jsonl"}, {"packing", packing}}
        .dump();
  };
  spill(scratch / "jobs.jsonl", entry("a", true) + "\n\n" + entry("b", false) + "\n");
  REQUIRE(finetune(model_and_data() + kUsual + "--jobs " + (scratch / "jobs.jsonl")).code == 0);
  const std::string solo = "--model " + golden("tiny") + " --eval-fraction 0.1 --quiet " + kUsual +
                           " --data " + (scratch / "data.jsonl");
  REQUIRE(finetune(solo + " --output " + (scratch / "solo-a")).code == 0);
  REQUIRE(finetune(solo + " --no-packing --output " + (scratch / "solo-b")).code == 0);
  check_same_run(scratch / "a", scratch / "solo-a");
  check_same_run(scratch / "b", scratch / "solo-b");
}

TEST_CASE("a job whose loss is not finite stops alone", "[programs][jobs]") {
  const ScratchFolder scratch;
  auto jobs = four_jobs();
  jobs[0].entry["lr"] = 1e30;
  const auto result = finetune(model_and_data() + kUsual + "--jobs " + write_jobs(scratch, jobs));
  CHECK(result.code == 1);
  CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 2);
  CHECK(contains(result.err, "job '" + (scratch / "job0") + "' stopped: [finetune] the "));
  CHECK(contains(result.err, "error: [jobs] every job must end; got 1 of 4 stopped: '" +
                                 (scratch / "job0") + "'"));
  CHECK(std::filesystem::exists(scratch / "job0/adapter_model.safetensors"));
  for (size_t i = 1; i < jobs.size(); ++i) {
    const std::string number = std::to_string(i), solo = scratch / ("solo" + number);
    REQUIRE(finetune(model_and_data() + jobs[i].flags + " --output " + solo).code == 0);
    check_same_run(scratch / ("job" + number), solo);
  }
}

TEST_CASE("a job goes on from its own checkpoint, also from that of a run of its own",
          "[programs][jobs]") {
  const ScratchFolder scratch;
  auto jobs = four_jobs();
  REQUIRE(finetune(model_and_data() + kUsual + "--jobs " + write_jobs(scratch, jobs)).code == 0);
  const std::string whole = slurp(scratch / "job3/adapter_model.safetensors");
  const std::string checkpoint = scratch / "job3/checkpoint-2";
  REQUIRE(finetune(model_and_data() + jobs[3].flags + " --output " + (scratch / "solo") +
                   " --resume " + checkpoint)
              .code == 0);
  CHECK(slurp(scratch / "solo/adapter_model.safetensors") == whole);
  jobs[3].entry["resume"] = checkpoint;
  REQUIRE(finetune(model_and_data() + kUsual + "--jobs " + write_jobs(scratch, jobs)).code == 0);
  CHECK(slurp(scratch / "job3/adapter_model.safetensors") == whole);
}

TEST_CASE("a signal ends all jobs after their step, each with a checkpoint", "[programs][jobs]") {
  const ScratchFolder scratch;
  json entries = json::array({{{"output", scratch / "a"}}, {{"output", scratch / "b"}}});
  spill(scratch / "jobs.json", entries.dump());
  const auto stopped = run_shell(std::string(GRAFT_BIN) + "/finetune " + model_and_data() +
                                 "--seq-len 32 --steps 1000000 --jobs " + (scratch / "jobs.json") +
                                 " & run=$!; while [ ! -s " + (scratch / "b/metrics.jsonl") +
                                 " ]; do :; done; kill -TERM $run; wait $run");
  CHECK(stopped.code == 143);
  for (const char* name : {"a", "b"}) {
    const auto steps = results_of(scratch / name)["steps"].get<int64_t>();
    CHECK(steps > 0);
    CHECK(std::filesystem::exists(scratch / (std::string(name) + "/checkpoint-" +
                                             std::to_string(steps) + "/optimizer.safetensors")));
  }
}

TEST_CASE("job files that cannot be meant", "[programs][jobs]") {
  const auto refuse = [](const std::string& file, const std::vector<std::string>& parts) {
    check_refusal("", file, "jobs.json", 1, parts);
  };
  refuse("{", {"[jobs]", "must be JSON"});
  refuse("{}", {"must hold an array of objects; got object"});
  refuse("[]", {"must hold a job; got none"});
  refuse("[3]", {"must be an object; got 3 (entry 1 of"});
  refuse(R"([{"output": "never-made", "rnak": 3}])", {"flags of finetune; got 'rnak' (entry 1 of"});
  refuse(R"([{"output": "never-made", "dtype": "bf16"}])",
         {"'dtype' holds for all jobs and belongs on the command line"});
  refuse(R"([{"output": "never-made", "rank": "x"}])", {"--rank", "(entry 1 of"});
  refuse(R"([{"output": "never-made", "rank": {}}])", {"the value of 'rank'", "got {}"});
  refuse(R"([{"output": "never-made", "rank": 0}])", {"[lora]", "rank=0", "(job 'never-made')"});
  refuse(R"([{"output": "never-made", "lr": 0}])", {"lr must be positive", "(entry 1 of"});
  refuse(R"([{"rank": 3}])", {"must have an output; got none (entry 1 of"});
  refuse(R"([{"output": "never-made/a"}, {"output": "never-made/b/../a/"}])",
         {"an output of its own; got 'never-made/b/../a/' as entry 1 has (entry 2 of"});
  check_refusal("", "{\"output\": \"never-made\"}\n{", "jobs.jsonl", 1,
                {"must be JSON", "line 2 of"});
  check_refusal("--output never-made", "[]", "jobs.json", 2, {"--output is each job's own"});
  check_refusal("--resume never-made", "[]", "jobs.json", 2, {"--resume is each job's own"});
  CHECK_FALSE(std::filesystem::exists("never-made"));
  const auto without = finetune("--model " + golden("tiny") + " --jobs-per-pass 1");
  CHECK(without.code == 2);
  CHECK(contains(without.err, "--jobs"));
}
