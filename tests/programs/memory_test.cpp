// The predicted memory against what a pass holds, and what is said when there is too little.
#include <ATen/ATen.h>
#include <graft/adapters/lora.h>

#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "examples/trainer/memory.h"
#include "examples/trainer/program.h"
#include "tests/programs/run_program.h"
#include "tests/support/live_bytes.h"
#include "tests/support/testing.h"

using namespace graft::testing;
using graft::trainer::PassShape;

namespace {

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
  CHECK(graft::trainer::weight_bytes(graft::models::read_config(golden("tiny")), at::kBFloat16) ==
        bytes);
}

TEST_CASE("a dry run says what memory goes where", "[programs][memory]") {
  const std::string flags = "--model " + golden("tiny") + " --data " + golden("text.txt") +
                            " --seq-len 32 --rank 4 --dry-run --output never-made ";
  CHECK(contains(run("finetune", flags).out, "memory      weights 0.1 MiB, adapter 0.0 MiB"));
  const auto plan = nlohmann::json::parse(run("finetune", flags + "--json --quiet").out);
  const auto& use = plan["predicted_memory"];
  CHECK(use["adapter"] == plan["bytes"]);
  CHECK(use["optimiser"] == 3 * plan["bytes"].get<int64_t>());
  CHECK(use["activations"].get<int64_t>() > 0);
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
  const auto result = run_shell("ulimit -v 1500000; " + (std::string(GRAFT_BIN) + "/finetune ") +
                                flags + "--seq-len 128 --batch-size 20000");
  INFO(result.err);
  CHECK(result.code == 1);
  CHECK(result.err.starts_with("error: [memory] the run must fit the memory of cpu; got no room "));
  CHECK(contains(result.err, " (predicted: weights 0.1 MiB, adapter "));
  CHECK(contains(result.err, ", activations "));
  CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  CHECK(slurp(file) == before);
}
#endif
