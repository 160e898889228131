// The predicted memory against what a pass holds, and what is said when there is too little.
#include <ATen/ATen.h>
#include <graft/adapters/lora.h>
#include <graft/ops/linear_cross_entropy.h>

#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "examples/trainer/memory.h"
#include "examples/trainer/program.h"
#include "tests/programs/run_program.h"
#include "tests/support/live_bytes.h"
#include "tests/support/testing.h"

using namespace graft::testing;
using graft::trainer::MemoryUse;
using graft::trainer::PassShape;
using graft::trainer::weight_bytes;

namespace {

constexpr int64_t kMiB = 1 << 20;

graft::models::DecoderConfig small_config() {
  graft::models::DecoderConfig c;
  c.vocab_size = 40;
  c.hidden_size = 10;
  c.intermediate_size = 20;
  c.layers = 3;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 3;
  c.tied = true;
  return c;
}

// What a dry run's plan predicts.
MemoryUse planned_memory(const nlohmann::json& plan) {
  const auto& use = plan.at("predicted_memory");
  return {use.at("weights"), use.at("adapter"), use.at("optimiser"), use.at("activations")};
}

// The most bytes of tensors that were alive at once.
struct PeakBytes : LiveBytes {
  void reportMemoryUsage(void* data, int64_t size, size_t allocated, size_t reserved,
                         c10::Device device) override {
    LiveBytes::reportMemoryUsage(data, size, allocated, reserved, device);
    peak = std::max(peak, count);
  }
  int64_t peak = 0;
};

int64_t measured_activations(const PassShape& shape) {
  auto model = graft::models::load(golden("tiny"), shape.type);
  model.decoder->gradient_checkpointing = shape.recompute;
  const auto adapter =
      graft::attach(*model.decoder, graft::adapters::LoraOptions{.rank = shape.rank});
  model.decoder->train();
  const at::Tensor ids = at::randint(256, {shape.rows, shape.tokens}, at::kLong);
  const auto step = [&] {
    model.decoder->loss(ids, ids).backward();
    for (auto& parameter : adapter.parameters()) parameter.mutable_grad() = at::Tensor();
  };
  step();  // tables of angles come to be
  const auto bytes = std::make_shared<PeakBytes>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, bytes);
  step();
  return bytes->peak;
}

// What run_program says of an error, and its exit code.
ProgramResult program_that_fails(const std::function<int()>& body) {
  CLI::App app{"", "test"};
  std::string name = "test";
  char* arguments[] = {name.data(), nullptr};
  const std::ostringstream said;
  std::streambuf* const stream = std::cerr.rdbuf(said.rdbuf());
  const int code = graft::trainer::run_program(app, 1, arguments, body);
  std::cerr.rdbuf(stream);
  return {code, "", said.str()};
}

}  // namespace

TEST_CASE("predicted activations are those of a pass, to a sixth", "[programs][memory]") {
  const PassShape shape = GENERATE(
      PassShape{.rows = 4, .tokens = 64, .rank = 8}, PassShape{.rows = 1, .tokens = 128, .rank = 8},
      PassShape{.rows = 4, .tokens = 64, .rank = 2, .recompute = true},
      PassShape{.rows = 4, .tokens = 64, .rank = 4, .type = at::kBFloat16});
  const auto config = graft::models::read_config(golden("tiny"));
  const auto predicted = static_cast<double>(activation_bytes(config, shape)),
             measured = static_cast<double>(measured_activations(shape));
  INFO(predicted << " predicted, " << measured << " measured");
  CHECK(std::abs(predicted - measured) < measured / 6);
}

TEST_CASE("predicted weights are the model's", "[programs][memory]") {
  auto model = graft::models::load(golden("tiny"), at::kBFloat16);
  int64_t bytes = -model.decoder->lm_head->weight.nbytes();  // tied
  for (const auto& parameter : model.decoder->parameters()) bytes += parameter.nbytes();
  CHECK(weight_bytes(graft::models::read_config(golden("tiny")), at::kBFloat16) == bytes);
}

TEST_CASE("predicted weights count biases and an output layer of its own", "[programs][memory]") {
  graft::models::DecoderConfig c = small_config();
  // Per block: queries and output 2 * 10 * 12, keys and values 2 * 10 * 6, gate, up and down
  // 3 * 10 * 20, two norms; then the last norm and one table of 40 tokens.
  CHECK(weight_bytes(c, at::kFloat) == 4 * (3 * (240 + 120 + 600 + 20) + 10 + 400));
  CHECK(weight_bytes(c, at::kHalf) == 2 * (3 * 980 + 410));
  c.tied = false;
  CHECK(weight_bytes(c, at::kFloat) == 4 * (3 * 980 + 10 + 800));
  c.attention_bias = true;
  CHECK(weight_bytes(c, at::kFloat) == 4 * (3 * (980 + 12 + 6 + 6 + 10) + 810));
  c.mlp_bias = true;
  CHECK(weight_bytes(c, at::kFloat) == 4 * (3 * (1014 + 20 + 20 + 10) + 810));
}

TEST_CASE("predicted activations are those of the formula", "[programs][memory]") {
  graft::models::DecoderConfig c = small_config();
  PassShape shape{.rows = 2, .tokens = 5, .rank = 7, .type = at::kBFloat16};
  // A token keeps 5 rows of 10 in bf16, and a block 10 + 3 * 12 + 2 * 6 + 2 * 20 numbers in bf16
  // and 4 + 7 * 7 in fp32; on the way back 20 + 80 numbers in fp32 are more than two copies of 40
  // logits.
  const int64_t block = 2 * 98 + 4 * 53, way_back = 400;
  CHECK(activation_bytes(c, shape) == 10 * (100 + 3 * block + way_back));
  shape.segments = true;  // 2 heads of keys have a mask of 5 positions each
  CHECK(activation_bytes(c, shape) == 10 * (100 + 3 * (block + 20) + way_back));
  shape.segments = false;
  shape.recompute = true;
  CHECK(activation_bytes(c, shape) == 10 * (100 + way_back + block));
  shape.recompute = false;
  shape.type = at::kFloat;
  CHECK(activation_bytes(c, shape) == 10 * (200 + 3 * (4 * 98 + 4 * 53) + way_back));
  shape.type = at::kBFloat16;
  c.vocab_size = 100;
  CHECK(activation_bytes(c, shape) == 10 * (100 + 3 * block + 2 * 400));
  c.vocab_size = int64_t{1} << 30;  // logits come in chunks
  CHECK(activation_bytes(c, shape) ==
        10 * (100 + 3 * block) + 2 * graft::ops::LinearCrossEntropyOptions().logits_bytes);
}

TEST_CASE("memory is told part by part and in all", "[programs][memory]") {
  CHECK(describe(MemoryUse{.weights = 513 * kMiB,
                           .adapter = 9 * kMiB + kMiB / 2,
                           .optimiser = 29 * kMiB,
                           .activations = 1228 * kMiB}) ==
        "weights 513 MiB, adapter 9.5 MiB, optimiser 29 MiB, activations 1228 MiB, in all 1780 "
        "MiB");
}

TEST_CASE("a dry run says what memory goes where", "[programs][memory]") {
  const ScratchFolder scratch;
  spill(scratch / "examples.jsonl", R"({"text": "one"})"
                                    "\n"
                                    R"({"text": "another"})"
                                    "\n");
  const std::string never = scratch / "never",
                    flags = "--model " + golden("tiny") + " --seq-len 32 --rank 4 --dry-run " +
                            "--eval-fraction 0 --output " + never + " ",
                    text = flags + "--data " + golden("text.txt") + " ",
                    examples = flags + "--data " + (scratch / "examples.jsonl") + " ";
  const auto config = graft::models::read_config(golden("tiny"));
  const auto check = [&](const std::string& arguments, const PassShape& shape) {
    INFO(arguments);
    const auto planned = run("finetune", arguments + "--json --quiet");
    REQUIRE(planned.code == 0);
    const MemoryUse use = planned_memory(nlohmann::json::parse(planned.out));
    const auto plan = nlohmann::json::parse(planned.out);
    CHECK(use.adapter == plan["trainable_parameters"].get<int64_t>() * 4);
    CHECK(plan["bytes"] == use.adapter);
    CHECK(use.optimiser == 3 * use.adapter);
    CHECK(use.weights == weight_bytes(config, shape.type));
    CHECK(use.activations == activation_bytes(config, shape));
    CHECK(contains(run("finetune", arguments).out,
                   "memory      " + describe(use) + " (predicted)\n"));
  };
  check(text + "--batch-size 3 ", {.rows = 3, .tokens = 32, .rank = 4});
  check(text + "--batch-size 2 --dtype bf16 --gradient-checkpointing ",
        {.rows = 2, .tokens = 32, .rank = 4, .recompute = true, .type = at::kBFloat16});
  check(examples + "--batch-size 2 ", {.rows = 2, .tokens = 32, .rank = 4, .segments = true});
  check(examples + "--batch-size 2 --no-packing ", {.rows = 2, .tokens = 32, .rank = 4});
  CHECK_FALSE(std::filesystem::exists(never));
}

TEST_CASE("memory that runs out is one line with what was asked for", "[programs][memory]") {
  const auto on_device = program_that_fails([] {
    TORCH_CHECK_WITH(OutOfMemoryError, false,
                     "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity "
                     "of 79.10 GiB of which 1.00 GiB is free.");
    return 0;
  });
  CHECK(on_device.code == 1);
  CHECK(on_device.err == "error: [memory] the run must fit the memory; got no room for 2.50 GiB\n");
  const auto on_host = program_that_fails([] {
    at::empty({int64_t{1} << 55});
    return 0;
  });
  CHECK(on_host.code == 1);
  CHECK(on_host.err ==
        "error: [memory] the run must fit the memory; got no room for 144115188075855872 bytes\n");
  CHECK(program_that_fails([]() -> int { throw std::bad_alloc(); }).err ==
        "error: [memory] the run must fit the memory; got no room for an allocation outside of "
        "tensors\n");
  CHECK(program_that_fails([] {
          TORCH_CHECK(false, "another error");
          return 0;
        }).err == "error: [libtorch] another error\n");
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they need address space
namespace {

ProgramResult run_without_memory(const std::string& arguments) {
  return run_shell("ulimit -v 1500000; " + (std::string(GRAFT_BIN) + "/finetune ") + arguments);
}

}  // namespace

TEST_CASE("finetune without enough memory says where it goes and keeps the last checkpoint",
          "[programs][memory]") {
  const ScratchFolder scratch;
  const std::string flags = "--model " + golden("tiny") + " --data " + golden("text.txt") +
                            " --eval-fraction 0 --quiet --threads 1 --save-every 1 --steps 2 "
                            "--output " +
                            (scratch / "o") + " ";
  REQUIRE(run("finetune", flags + "--seq-len 32").code == 0);
  const std::string file = scratch / "o/checkpoint-1/optimizer.safetensors", before = slurp(file);
  REQUIRE_FALSE(before.empty());
  const auto result = run_without_memory(flags + "--seq-len 128 --batch-size 20000");
  INFO(result.err);
  CHECK(result.code == 1);
  CHECK(result.err.starts_with("error: [memory] the run must fit the memory of cpu; got no room "));
  const auto plan = run("finetune", flags + "--seq-len 128 --batch-size 20000 --dry-run --json");
  CHECK(contains(result.err, " (predicted: " +
                                 describe(planned_memory(nlohmann::json::parse(plan.out))) + ";"));
  CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  CHECK(slurp(file) == before);
}

TEST_CASE("jobs without enough memory are predicted as far as they share a pass",
          "[programs][memory]") {
  const ScratchFolder scratch;
  const auto job = [&](const char* name, int64_t rank, int64_t rows) {
    return nlohmann::json{{"output", scratch / name}, {"rank", rank}, {"batch-size", rows}};
  };
  spill(scratch / "jobs.json",
        nlohmann::json{job("a", 14, 10000), job("b", 16, 20000), job("c", 15, 15000)}.dump());
  const std::string flags = "--model " + golden("tiny") + " --data " + golden("text.txt") +
                            " --eval-fraction 0 --quiet --threads 1 --steps 2 --seq-len 128 "
                            "--jobs " +
                            (scratch / "jobs.json") + " ";
  std::istringstream plans(run("finetune", flags + "--dry-run --json").out);
  std::vector<MemoryUse> uses;
  for (std::string line; std::getline(plans, line);)
    uses.push_back(planned_memory(nlohmann::json::parse(line)));
  REQUIRE(uses.size() == 3);
  MemoryUse all{uses[0].weights};
  for (const MemoryUse& use : uses) {
    all.adapter += use.adapter;
    all.optimiser += use.optimiser;
    all.activations += use.activations;
  }
  const auto check = [&](const std::string& more) {
    const auto result = run_without_memory(flags + more);
    INFO(result.err);
    CHECK(result.code == 1);
    CHECK(contains(result.err, " (predicted: " + describe(all) + ";"));
  };
  check("--jobs-per-pass 3");
  all.activations = uses[1].activations + uses[2].activations;
  check("--jobs-per-pass 2");
  all.activations = uses[1].activations;
  check("--jobs-per-pass 1");
  check("");  // these are too long for sharing
}
#endif
