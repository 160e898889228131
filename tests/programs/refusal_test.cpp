// What bad input gets: one line on stderr, the right exit code, nothing lost.
#include <filesystem>

#include "tests/programs/run_program.h"
#include "tests/support/testing.h"

using namespace graft::testing;

namespace {

// One line "error: [area] ...", and every part in it.
void check_refusal(const ProgramResult& result, int code, const std::vector<std::string>& parts) {
  INFO(result.err);
  CHECK(result.code == code);
  CHECK(result.out.empty());
  CHECK(result.err.starts_with("error: ["));
  CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  for (const auto& part : parts) {
    INFO(part);
    CHECK(contains(result.err, part));
  }
}

// finetune on the golden model with these flags over the defaults; --quiet leaves nothing but the
// error.
ProgramResult finetune(const ScratchFolder& scratch, const std::string& flags,
                       const std::string& data = golden("text.txt")) {
  return run("finetune", "--model " + golden("tiny") + " --quiet --seq-len 32 --steps 2 --output " +
                             (scratch / "o") + " --data " + data + " " + flags);
}

// A copy of the golden model folder that may be spoilt.
std::string copy_model(const ScratchFolder& scratch) {
  std::filesystem::copy(golden("tiny"), scratch / "m");
  return scratch / "m";
}

}  // namespace

TEST_CASE("wrong usage exits with 2", "[programs][refusal]") {
  const ScratchFolder scratch;
  check_refusal(run("finetune", ""), 2, {"--model"});
  check_refusal(finetune(scratch, "--experts 4"), 2, {"--experts"});
  check_refusal(finetune(scratch, "--method nonsense"), 2, {"nonsense", "lora"});
  check_refusal(finetune(scratch, "--set nonsense=1"), 2, {"nonsense"});
  check_refusal(finetune(scratch, "--method mixlora --router nobody"), 2,
                {"--router", "softmax_top_k", "'nobody'"});
  check_refusal(finetune(scratch, "--init nonsense"), 2, {"--init", "kaiming", "nonsense"});
  check_refusal(finetune(scratch, "--method nlora --init pissa"), 1, {"slora, block", "pissa"});
  for (const char* flag : {"bias", "schedule", "device", "dtype"})
    check_refusal(finetune(scratch, "--" + std::string(flag) + " nonsense"), 2, {flag, "nonsense"});
  check_refusal(finetune(scratch, "--rank x"), 2, {"rank"});
  check_refusal(run("evaluate", "--model " + golden("tiny")), 2, {"--data"});
  check_refusal(run("adapter", ""), 2, {});
}

TEST_CASE("ranks and scales out of range", "[programs][refusal]") {
  const ScratchFolder scratch;
  check_refusal(finetune(scratch, "--rank 0"), 1, {"[lora]", "rank=0"});
  check_refusal(finetune(scratch, "--rank -3"), 1, {"rank=-3"});
  check_refusal(finetune(scratch, "--rank 64"), 1, {"rank=64", "model.layers.0"});
  check_refusal(finetune(scratch, "--alpha 0"), 1, {"alpha"});
  check_refusal(finetune(scratch, "--dropout 1"), 1, {"dropout"});
  check_refusal(finetune(scratch, "--lr 0"), 1, {"lr"});
  CHECK_FALSE(std::filesystem::exists(scratch / "o/adapter_model.safetensors"));
}

TEST_CASE("what fp16 cannot train", "[programs][refusal]") {
  const ScratchFolder scratch;
  check_refusal(finetune(scratch, "--dtype fp16 --init lora_ga"), 1,
                {"[finetune]", "lora_ga reads gradients", "--dtype bf16"});
  check_refusal(finetune(scratch, "--dtype fp16 --method adalora"), 1,
                {"[finetune] adalora needs every step", "--dtype fp16"});
  check_refusal(finetune(scratch, "--dtype fp8"), 2, {"fp8", "fp16"});
  CHECK_FALSE(std::filesystem::exists(scratch / "o"));
}

TEST_CASE("targets that match nothing print the nearest names", "[programs][refusal]") {
  const ScratchFolder scratch;
  check_refusal(finetune(scratch, "--target-modules q_porj"), 1,
                {"q_porj", "nearest names: q_proj"});
  check_refusal(finetune(scratch, "--target-modules q_proj,nothing"), 1, {"nothing"});
  check_refusal(finetune(scratch, "--target-modules '/[/'"), 1, {"regular expression"});
}

TEST_CASE("texts that cannot be trained on", "[programs][refusal]") {
  const ScratchFolder scratch;
  spill(scratch / "empty.txt", "");
  spill(scratch / "short.txt", "short");
  spill(scratch / "latin.txt", "caf\xe9 " + std::string(200, 'x'));
  check_refusal(finetune(scratch, "", scratch / "missing.txt"), 1, {"missing.txt"});
  check_refusal(finetune(scratch, "", scratch / "."), 1, {"folder"});
  check_refusal(finetune(scratch, "", scratch / "empty.txt"), 1, {"empty"});
  check_refusal(finetune(scratch, "", scratch / "short.txt"), 1,
                {"at least one chunk", "5 tokens"});
  check_refusal(finetune(scratch, "", scratch / "latin.txt"), 1, {"UTF-8", "latin.txt"});
}

TEST_CASE("models that are not what they say", "[programs][refusal]") {
  const ScratchFolder scratch;
  const std::string model = copy_model(scratch), config = slurp(model + "/config.json");
  const auto evaluate = [&] {
    return run("evaluate", "--model " + model + " --ids 1 --logits " + (scratch / "l"));
  };
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string text = config;
    const size_t at = text.find(from);
    REQUIRE(at != std::string::npos);
    spill(model + "/config.json", text.replace(at, from.size(), to));
  };
  with("\"model_type\": \"llama\"", "\"model_type\": \"gpt2\"");
  check_refusal(evaluate(), 1, {"model_type", "gpt2"});
  with("\"rope_type\": \"llama3\"", "\"rope_type\": \"yarn\"");
  check_refusal(evaluate(), 1, {"rope type", "yarn"});
  with("\"intermediate_size\": 48", "\"intermediate_size\": 40");
  check_refusal(evaluate(), 1, {"mis-shaped", "mlp.down_proj.weight [32, 48] for [32, 40]"});
  with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
  check_refusal(evaluate(), 1, {"missing", "model.layers.2."});
  with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
  check_refusal(evaluate(), 1, {"unexpected", "model.layers.1."});
  spill(model + "/config.json", config.substr(0, config.size() / 2));
  check_refusal(evaluate(), 1, {"JSON"});
  spill(model + "/config.json", config);
  const std::string weights = slurp(model + "/model.safetensors");
  spill(model + "/model.safetensors", weights.substr(0, weights.size() - 100));
  check_refusal(evaluate(), 1, {"safetensors"});
  std::filesystem::remove(model + "/model.safetensors");
  check_refusal(evaluate(), 1, {"safetensors"});
  spill(scratch / "x.gguf", "GGML not a model");
  check_refusal(
      run("evaluate", "--model " + (scratch / "x.gguf") + " --ids 1 --logits " + (scratch / "l")),
      1, {"x.gguf"});
}

TEST_CASE("adapters for another model and with unknown options", "[programs][refusal]") {
  const ScratchFolder scratch;
  std::filesystem::copy(golden("trained"), scratch / "a");
  const std::string config = slurp(scratch / "a/adapter_config.json");
  const auto evaluate = [&] {
    return run("evaluate", "--model " + golden("tiny") + " --adapter " + (scratch / "a") +
                               " --ids 1 --logits " + (scratch / "l"));
  };
  std::string other = config;
  other.replace(other.find("\"r\": 4"), 6, "\"r\": 8");
  spill(scratch / "a/adapter_config.json", other);
  check_refusal(evaluate(), 1, {"12 mis-shaped"});
  other = config;
  other.insert(1, "\"new_option\": 3,");
  spill(scratch / "a/adapter_config.json", other);
  check_refusal(evaluate(), 1, {"new_option=3"});
  other = config;
  other.replace(other.find("\"peft_type\": \"LORA\""), 19, "\"peft_type\": \"VERB\"");
  spill(scratch / "a/adapter_config.json", other);
  check_refusal(evaluate(), 1, {"VERB"});
  CHECK_FALSE(std::filesystem::exists(scratch / "l"));
}

TEST_CASE("outputs that cannot be written leave nothing behind", "[programs][refusal]") {
  const ScratchFolder scratch;
  spill(scratch / "file", "");
  check_refusal(
      run("finetune", "--model " + golden("tiny") + " --quiet --seq-len 32 --steps 1 --data " +
                          golden("text.txt") + " --output " + (scratch / "file/o")),
      1, {"file/o"});
  check_refusal(
      run("evaluate", "--model " + golden("tiny") + " --ids 1 --logits " + (scratch / "no/l")), 1,
      {"no/l"});
}

TEST_CASE("a loss that is not finite stops the run, names the step and keeps the last good adapter",
          "[programs][refusal]") {
  const ScratchFolder scratch;
  const auto result =
      run("finetune", "--model " + golden("tiny") +
                          " --quiet --seq-len 32 --steps 40 --lr 1e30 --rank 4 --data " +
                          golden("text.txt") + " --output " + (scratch / "o"));
  check_refusal(result, 1, {"finite", "in step "});
  CHECK(run("adapter", "info " + (scratch / "o")).code == 0);
}

TEST_CASE("a device that is not there", "[programs][refusal][cuda]") {
  // A build without kernels, one with them where LibTorch's CUDA part does not load, and one on a
  // machine without a GPU say different things; each is one line. With a GPU, nothing is refused.
  const ScratchFolder scratch;
  const std::string model = "--model " + golden("tiny");
  const auto probe = finetune(scratch, "--device cuda");
  if (probe.code == 0) return;
  check_refusal(probe, 1, {"[device]"});
  CHECK_FALSE(std::filesystem::exists(scratch / "o/adapter_model.safetensors"));
  check_refusal(run("generate", model + " --device cuda --prompt a"), 1, {"[device]"});
  check_refusal(run("evaluate", model + " --device cuda --data " + golden("text.txt")), 1,
                {"[device]"});
  check_refusal(finetune(scratch, "--device tpu"), 2, {"--device"});
}

TEST_CASE("a graph that cannot be", "[programs][refusal][cuda]") {
  const ScratchFolder scratch;
  check_refusal(finetune(scratch, "--cuda-graph"), 2, {"[usage]", "--device cuda"});
  check_refusal(finetune(scratch, "--cuda-graph --device cuda --jobs jobs.json"), 2,
                {"[usage]", "--jobs"});
}
