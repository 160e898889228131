// The programs end to end, against what transformers and PEFT computed (goldens/make_programs.py).
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

std::string common() {
  return "--model " + golden("tiny") + " --data " + golden("text.txt") +
         " --seq-len 32 --batch-size 2 --quiet ";
}

const char* const kParity =
    "--steps 8 --schedule constant --lr 1e-2 --no-shuffle --eval-fraction 0 ";

double logits_difference(const std::string& arguments, const std::string& which) {
  const ScratchFolder scratch;
  const auto result = run("evaluate", arguments + " --ids 1,5,9,200,33,44,17,99 --logits " +
                                          (scratch / "l.safetensors"));
  INFO(result.err);
  REQUIRE(result.code == 0);
  const at::Tensor ours =
      graft::io::SafetensorsFile::open(scratch / "l.safetensors").tensor("logits");
  const at::Tensor theirs =
      graft::io::SafetensorsFile::open(golden("logits.safetensors")).tensor(which);
  REQUIRE(ours.sizes() == theirs.sizes());
  return (ours - theirs).abs().max().item<double>();
}

}  // namespace

TEST_CASE("logits equal those of transformers and PEFT", "[programs][evaluate]") {
  CHECK(logits_difference("--model " + golden("tiny"), "base") < 1e-5);
  CHECK(logits_difference("--model " + golden("tiny") + " --adapter " + golden("trained"),
                          "adapted") < 1e-5);
  CHECK(logits_difference("--model " + golden("tiny") + " --adapter " + golden("start"),
                          "adapted") > 1e-3);
}

TEST_CASE("every step's loss equals PEFT's, and so does the trained adapter",
          "[programs][finetune]") {
  const ScratchFolder scratch;
  const auto result = run("finetune", common() + kParity + "--init-adapter " + golden("start") +
                                          " --output " + (scratch / "o"));
  INFO(result.err);
  REQUIRE(result.code == 0);
  const auto lines = metrics(scratch / "o");
  const json expected = json::parse(slurp(golden("expected.json")));
  REQUIRE(lines.size() == expected["losses"].size());
  for (size_t i = 0; i < lines.size(); ++i) {
    const double loss = lines[i]["loss"], theirs = expected["losses"][i];
    CHECK(std::abs(loss - theirs) < 1e-5 * theirs);
    CHECK(lines[i]["tokens"] == 64);
  }
  CHECK(logits_difference("--model " + golden("tiny") + " --adapter " + (scratch / "o"),
                          "adapted") < 1e-3);
  const json config = json::parse(slurp(scratch / "o/adapter_config.json"));
  CHECK(config["r"] == 4);
  CHECK(config["peft_type"] == "LORA");
  CHECK(config["target_modules"] == json({"down_proj", "q_proj", "v_proj"}));
}

TEST_CASE("two micro-batches of half the size take the step of the whole batch",
          "[programs][finetune]") {
  const ScratchFolder scratch;
  const std::string start = kParity + ("--init-adapter " + golden("start"));
  REQUIRE(run("finetune", common() + start + " --output " + (scratch / "a")).code == 0);
  REQUIRE(run("finetune",
              common() + start + " --batch-size 1 --grad-accum 2 --output " + (scratch / "b"))
              .code == 2);
  const std::string halves = "--model " + golden("tiny") + " --data " + golden("text.txt") +
                             " --seq-len 32 --batch-size 1 --grad-accum 2 --quiet " + start;
  REQUIRE(run("finetune", halves + " --output " + (scratch / "b")).code == 0);
  const auto a = metrics(scratch / "a"), b = metrics(scratch / "b");
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i)
    CHECK(std::abs(a[i]["loss"].get<double>() - b[i]["loss"].get<double>()) < 1e-5);
}

TEST_CASE("a resumed run ends with the same bytes as one that was not interrupted",
          "[programs][finetune]") {
  const ScratchFolder scratch;
  const std::string flags =
      common() + "--steps 6 --dropout 0.1 --lr 1e-2 --eval-fraction 0.1 --save-every 3 --rank 4 ";
  REQUIRE(run("finetune", flags + "--output " + (scratch / "whole")).code == 0);
  REQUIRE(run("finetune", flags + "--output " + (scratch / "rest") + " --resume " +
                              (scratch / "whole/checkpoint-3"))
              .code == 0);
  CHECK(slurp(scratch / "whole/adapter_model.safetensors") ==
        slurp(scratch / "rest/adapter_model.safetensors"));
  CHECK(metrics(scratch / "rest").size() == 3);
  CHECK(metrics(scratch / "rest")[0]["step"] == 3);
  const auto other = run("finetune", flags + "--weight-decay 0.5 --output " + (scratch / "no") +
                                         " --resume " + (scratch / "whole/checkpoint-3"));
  CHECK(other.code == 1);
  CHECK(contains(other.err, "weight_decay=0.5 for 0.0"));
}

TEST_CASE("fp16 takes the steps of fp32, with the loss scaled and the figures as they are unscaled",
          "[programs][finetune][fp16]") {
  // Where the method's term outweighs the loss, a term without the scale would show in the norm.
  const std::string flags = GENERATE(
      std::string("--rank 4"), std::string("--rank 4 --grad-accum 2"),
      std::string("--method dora --rank 4 --target-modules q_proj,down_proj,lm_head"),
      std::string("--method mixlora --rank 2 --experts 4 --balance-loss 20 --grad-accum 2"),
      std::string("--method sora --set l1_penalty=200 --rank 4"));
  INFO(flags);
  const ScratchFolder scratch;
  const auto steps = [&](const std::string& type) {
    const auto result =
        run("finetune", common() + kParity + flags + " --max-grad-norm 0.5 --dtype " + type +
                            " --output " + (scratch / type));
    INFO(result.err);
    REQUIRE(result.code == 0);
    return metrics(scratch / type);
  };
  const auto half = steps("fp16"), single = steps("fp32");
  REQUIRE(half.size() == 8);
  for (size_t i = 0; i < half.size(); ++i) {
    const auto off = [&](const char* figure) {
      return std::abs(half[i][figure].get<double>() / single[i][figure].get<double>() - 1);
    };
    INFO("step " << i);
    CHECK(off("loss") < 0.02);
    // Later, a mixture's tokens near the edge of two experts go their own ways.
    CHECK(off("grad_norm") < (i == 0 ? 0.01 : 0.2));
    CHECK(half[i]["loss_scale"] == 65536);
    CHECK(half[i]["skipped_steps"] == 0);
    CHECK_FALSE(single[i].contains("loss_scale"));
  }
  const json file = json::parse(slurp(scratch / "fp16/run.json"));
  CHECK(file["loss_scale"] == 65536);
  CHECK(file["skipped_steps"] == 0);
}

TEST_CASE("fp16 skips steps that overflow, which change nothing, and resumes with the same bytes",
          "[programs][finetune][fp16]") {
  const ScratchFolder scratch;
  const std::string flags = common() +
                            "--steps 16 --dropout 0.1 --lr 1e-2 --eval-fraction 0.1 "
                            "--save-every 1 --rank 4 --dtype fp16 ";
  const auto resumed = [&](const std::string& checkpoint, const std::string& output) {
    const auto result = run("finetune", flags + "--output " + (scratch / output) + " --resume " +
                                            (scratch / checkpoint));
    INFO(result.err);
    REQUIRE(result.code == 0);
    return result.out;
  };
  REQUIRE(run("finetune", flags + "--output " + (scratch / "start")).code == 0);
  const std::string state = scratch / "start/checkpoint-2/trainer_state.json";
  json edited = json::parse(slurp(state));
  CHECK(edited["loss_scale"] == json({65536.0, 2, 0}));
  edited["loss_scale"] = {1 << 26, 7, 3};  // a gradient's largest part is over 1 / 62 of it
  spill(state, edited.dump());
  const std::string out = resumed("start/checkpoint-2", "whole");
  const auto steps = metrics(scratch / "whole");
  REQUIRE(steps.size() == 14);
  const auto same = [&](const std::string& a, const std::string& b, const char* file) {
    return slurp(scratch / (a + "/" + file)) == slurp(scratch / (b + "/" + file));
  };
  double scale = 1 << 26;
  int64_t skipped = 3;
  for (int64_t i = 0; i < 14; ++i) {
    INFO("after checkpoint-" << i + 2);
    const json& step = steps[static_cast<size_t>(i)];
    const bool skips = step["grad_norm"].is_null();
    if (i < 3) CHECK(skips);
    skipped += skips;
    CHECK(step["loss_scale"] == scale);
    CHECK(step["skipped_steps"] == skipped);
    if (skips) scale /= 2;
    if (i == 13) break;  // the last step leaves no checkpoint
    const std::string before =
        i == 0 ? "start/checkpoint-2" : "whole/checkpoint-" + std::to_string(i + 2);
    const std::string after = "whole/checkpoint-" + std::to_string(i + 3);
    for (const char* file : {"adapter_model.safetensors", "optimizer.safetensors"})
      CHECK(same(before, after, file) == skips);
  }
  CHECK(skipped < 3 + 14);
  CHECK(contains(out, std::to_string(skipped) + " of 16 steps skipped"));
  for (const char* checkpoint : {"whole/checkpoint-3", "whole/checkpoint-10"}) {
    resumed(checkpoint, "rest");
    for (const char* file : {"adapter_model.safetensors", "checkpoint-15/trainer_state.json",
                             "checkpoint-15/optimizer.safetensors"})
      CHECK(same("rest", "whole", file));
  }
  edited.erase("loss_scale");
  spill(state, edited.dump());
  const auto without = run("finetune", flags + "--output " + (scratch / "no") + " --resume " +
                                           (scratch / "start/checkpoint-2"));
  CHECK(without.code == 1);
  CHECK(contains(without.err, "must hold its loss scale; got null"));
}

TEST_CASE("fp16 that overflows at the least scale ends with one line",
          "[programs][finetune][fp16]") {
  const ScratchFolder scratch;
  const auto result = run("finetune", common() +
                                          "--eval-fraction 0 --steps 40 --lr 1e30 --rank 4 "
                                          "--dtype fp16 --output " +
                                          (scratch / "o"));
  INFO(result.err);
  CHECK(result.code == 1);
  CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  CHECK(contains(result.err, "at the least loss scale, 1, after 16 skipped steps (the adapter of"));
  CHECK(run("adapter", "info " + (scratch / "o")).code == 0);
}

TEST_CASE("weights beyond fp16 are refused by name", "[programs][evaluate][fp16]") {
  const ScratchFolder scratch;
  std::filesystem::copy(golden("tiny"), scratch / "m");
  const auto file = graft::io::SafetensorsFile::open(golden("tiny/model.safetensors"));
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& name : file.names()) {
    tensors.emplace_back(name, file.tensor(name).clone());
    if (name == "model.norm.weight") tensors.back().second[0] = 1e5;
  }
  graft::io::write_safetensors(scratch / "m/model.safetensors", tensors);
  const auto evaluate = [&](const std::string& type) {
    return run("evaluate", "--model " + (scratch / "m") + " --seq-len 32 --data " +
                               golden("text.txt") + " --dtype " + type);
  };
  CHECK(evaluate("bf16").code == 0);
  const auto result = evaluate("fp16");
  CHECK(result.code == 1);
  CHECK(contains(result.err, "whose largest is 65504; got others in model.norm.weight (folder"));
}

TEST_CASE("fp16 evaluates and generates", "[programs][evaluate][fp16]") {
  const std::string adapted = "--model " + golden("tiny") + " --adapter " + golden("trained");
  const auto loss = [&](const std::string& type) {
    return json::parse(run("evaluate", adapted + " --seq-len 32 --data " + golden("text.txt") +
                                           " --dtype " + type)
                           .out)["loss"]
        .get<double>();
  };
  CHECK(std::abs(loss("fp16") - loss("fp32")) < 5e-3);
  CHECK(loss("fp16") != loss("fp32"));
  const auto text = run("generate", adapted + " --prompt Entry --max-new-tokens 4 --dtype fp16");
  CHECK(text.code == 0);
  CHECK_FALSE(text.out.empty());
}

TEST_CASE("a signal ends the run after its step, with a checkpoint to go on from",
          "[programs][finetune]") {
  const ScratchFolder scratch;
  const std::string flags = common() + "--lr 1e-3 --eval-fraction 0 --rank 4 --steps 1000000 ";
  const auto stopped =
      run_shell(std::string(GRAFT_BIN) + "/finetune " + flags + "--output " + (scratch / "o") +
                " & run=$!; while [ ! -s " + (scratch / "o/metrics.jsonl") +
                " ]; do :; done; kill -TERM $run; wait $run");
  CHECK(stopped.code == 143);
  const auto steps = metrics(scratch / "o");
  REQUIRE_FALSE(steps.empty());
  const std::string last = std::to_string(steps.size());
  CHECK(std::filesystem::exists(scratch / ("o/checkpoint-" + last + "/optimizer.safetensors")));
  CHECK(slurp(scratch / "o/adapter_model.safetensors") ==
        slurp(scratch / ("o/checkpoint-" + last + "/adapter_model.safetensors")));
  CHECK(json::parse(slurp(scratch / "o/run.json"))["steps"] == steps.size());
}

TEST_CASE("recomputed blocks give the same steps, with dropout", "[programs][finetune]") {
  const ScratchFolder scratch;
  const std::string flags =
      common() + "--steps 4 --dropout 0.2 --lr 1e-2 --eval-fraction 0 --rank 4 ";
  REQUIRE(run("finetune", flags + "--output " + (scratch / "a")).code == 0);
  REQUIRE(run("finetune", flags + "--gradient-checkpointing --output " + (scratch / "b")).code ==
          0);
  const auto a = metrics(scratch / "a"), b = metrics(scratch / "b");
  for (size_t i = 0; i < 4; ++i)
    CHECK(std::abs(a[i]["loss"].get<double>() - b[i]["loss"].get<double>()) < 1e-5);
}

TEST_CASE("the run file, the sample and the held-out loss", "[programs][finetune]") {
  const ScratchFolder scratch;
  const auto result =
      run("finetune",
          common() +
              "--steps 20 --lr 2e-2 --rank 8 --eval-fraction 0.2 --sample Entry --json --output " +
              (scratch / "o"));
  REQUIRE(result.code == 0);
  const json file = json::parse(slurp(scratch / "o/run.json"));
  CHECK(json::parse(result.out) == file);
  CHECK(file["eval_loss_after"].get<double>() < file["eval_loss_before"].get<double>() - 0.5);
  CHECK(file["sample_before"] != file["sample_after"]);
  CHECK(file["trainable_parameters"] == 2 * 8 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)));
  CHECK(file["steps"] == 20);
  CHECK(file["options"]["lora_alpha"] == 16);
  for (const char* key : {"load_seconds", "train_seconds", "tokens_per_second", "peak_rss_mib",
                          "first_step_seconds", "tokens"})
    CHECK(file[key].is_number());
}

TEST_CASE("a merged folder is the adapted model", "[programs][adapter]") {
  const ScratchFolder scratch;
  const auto result = run("adapter", "merge --model " + golden("tiny") + " --adapter " +
                                         golden("trained") + " --output " + (scratch / "m"));
  INFO(result.err);
  REQUIRE(result.code == 0);
  CHECK(logits_difference("--model " + (scratch / "m"), "adapted") < 1e-5);
  const auto text = [](const std::string& arguments) {
    return run("generate", arguments + " --prompt Entry --max-new-tokens 12").out;
  };
  const std::string adapted = "--model " + golden("tiny") + " --adapter " + golden("trained");
  CHECK(text(adapted) == text(adapted + " --merge"));
  CHECK(text(adapted) == text("--model " + (scratch / "m")));
  CHECK(text(adapted) != text("--model " + golden("tiny")));
}

TEST_CASE("adapter info and diff", "[programs][adapter]") {
  const json info = json::parse(run("adapter", "info --json " + golden("trained")).out);
  CHECK(info["method"] == "lora");
  CHECK(info["layers"] == 6);
  CHECK(info["parameters"] == 2 * 4 * ((32 + 32) + (32 + 16) + (32 + 48)));
  const json diff =
      json::parse(run("adapter", "diff --json " + golden("start") + " " + golden("trained")).out);
  CHECK(diff["options"].empty());
  CHECK(diff["missing_layers"].empty());
  CHECK(diff["largest_difference"].size() == 6);
  CHECK(diff["largest_difference"]["model.layers.0.self_attn.q_proj"].get<double>() > 1e-3);
}

TEST_CASE("token ids of lines, and of a folder that holds nothing but the tokenizer",
          "[programs][evaluate]") {
  const ScratchFolder scratch;
  std::filesystem::create_directories(scratch / "t");
  std::filesystem::copy(golden("tiny/tokenizer.json"), scratch / "t/tokenizer.json");
  spill(scratch / "lines.txt", "ab\n\nz");
  const auto result = run(
      "evaluate", "--tokenize --model " + (scratch / "t") + " --data " + (scratch / "lines.txt"));
  INFO(result.err);
  CHECK(result.code == 0);
  CHECK(result.out == "[97,98]\n[]\n[122]\n");
}
