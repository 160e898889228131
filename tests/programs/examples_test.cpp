// Examples of a .jsonl file: which tokens are learnt, how rows are made, and training on them.
#include <ATen/ATen.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "examples/models/load.h"
#include "examples/trainer/data.h"
#include "examples/trainer/examples.h"
#include "tests/programs/run_program.h"
#include "tests/support/testing.h"

using namespace graft::testing;
using graft::trainer::Batch;
using graft::trainer::read_examples;
using graft::trainer::TokenData;
using nlohmann::json;

namespace {

// The tiny model's tokenizer is byte level: a token's id is its byte. It names no special token.
graft::text::Tokenizer bytes_tokenizer() {
  return graft::text::Tokenizer::from_json_file(golden("tiny") + "/tokenizer.json");
}

// The same with a chat template and an end-of-sequence token ("~", byte 126) beside it.
graft::text::Tokenizer chat_tokenizer(const ScratchFolder& scratch) {
  std::filesystem::create_directories(scratch / "tok");
  spill(scratch / "tok/tokenizer.json", slurp(golden("tiny") + "/tokenizer.json"));
  const json config = {{"eos_token", "~"},
                       {"chat_template",
                        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}~{% endfor %}"
                        "{% if add_generation_prompt %}[assistant]{% endif %}"}};
  spill(scratch / "tok/tokenizer_config.json", config.dump());
  return graft::text::Tokenizer::from_json_file(scratch / "tok/tokenizer.json");
}

std::string learnt_text(const graft::trainer::Example& example) {
  std::string text;
  for (size_t i = 0; i < example.ids.size(); ++i)
    if (example.learnt[i]) text += static_cast<char>(example.ids[i]);
  return text;
}

std::string whole_text(const graft::trainer::Example& example) {
  return {example.ids.begin(), example.ids.end()};
}

TokenData load(const ScratchFolder& scratch, const std::string& lines, int64_t seq_len,
               bool packing) {
  spill(scratch / "e.jsonl", lines);
  return TokenData::from_file(scratch / "e.jsonl", bytes_tokenizer(), seq_len, packing);
}

const std::string kThree =
    "{\"prompt\": \"ab\", \"completion\": \"cd\"}\n\n{\"text\": \"xyz\"}\n"
    "{\"prompt\": \"q\", \"completion\": \"rstuvw\"}\n";

std::vector<int64_t> list(const at::Tensor& tensor) {
  return {tensor.data_ptr<int64_t>(), tensor.data_ptr<int64_t>() + tensor.numel()};
}

}  // namespace

TEST_CASE("a text is learnt whole, of a prompt and completion only the completion",
          "[programs][examples]") {
  const ScratchFolder scratch;
  const auto tokenizer = chat_tokenizer(scratch);
  const auto examples = read_examples(kThree, tokenizer);
  REQUIRE(examples.size() == 3);
  CHECK(whole_text(examples[0]) == "abcd~");
  CHECK(learnt_text(examples[0]) == "cd~");
  CHECK(learnt_text(examples[1]) == "xyz~");
  CHECK(whole_text(read_examples(kThree, bytes_tokenizer())[0]) == "abcd");  // it has no end token
}

TEST_CASE("of messages the assistant's turns are learnt", "[programs][examples]") {
  const ScratchFolder scratch;
  const auto tokenizer = chat_tokenizer(scratch);
  const auto example = read_examples(
      "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}, {\"role\": "
      "\"assistant\", \"content\": \"yes\"}, {\"role\": \"user\", \"content\": "
      "\"so\"}, {\"role\": \"assistant\", \"content\": \"no\"}, {\"role\": "
      "\"user\", \"content\": \"ah\"}]}",
      tokenizer)[0];
  CHECK(whole_text(example) == "[user]hi~[assistant]yes~[user]so~[assistant]no~[user]ah~");
  CHECK(learnt_text(example) == "yes~no~");
}

TEST_CASE("without packing every example is a row, padded to the batch's longest",
          "[programs][examples]") {
  const ScratchFolder scratch;
  const TokenData data = load(scratch, kThree, 6, false);
  REQUIRE(data.size() == 3);
  CHECK(data.cut() == 1);
  const Batch batch = data.batch({0, 2});
  CHECK_FALSE(batch.segments.defined());
  CHECK(batch.inputs.sizes() == at::IntArrayRef({2, 5}));
  CHECK(list(batch.inputs) == std::vector<int64_t>{'a', 'b', 'c', 0, 0, 'q', 'r', 's', 't', 'u'});
  CHECK(list(batch.targets) ==
        std::vector<int64_t>{-100, 'c', 'd', -100, -100, 'r', 's', 't', 'u', 'v'});
  CHECK(batch.counted == 7);
}

TEST_CASE("packed rows hold whole examples and count no target across a border",
          "[programs][examples]") {
  const ScratchFolder scratch;
  const TokenData data = load(scratch, kThree, 7, true);
  REQUIRE(data.size() == 2);
  const Batch batch = data.batch({0});
  CHECK(list(batch.inputs) == std::vector<int64_t>{'a', 'b', 'c', 'd', 'x', 'y'});
  CHECK(list(batch.targets) == std::vector<int64_t>{-100, 'c', 'd', -100, 'y', 'z'});
  CHECK(list(batch.segments) == std::vector<int64_t>{0, 0, 0, 0, 1, 1});
  CHECK(batch.counted == 4);
  const auto [first, last] = data.split_last(1);
  CHECK(first.size() == 1);
  CHECK(list(last.batch({0}).inputs) == list(data.batch({1}).inputs));
}

TEST_CASE(
    "examples packed into one row lose nothing to each other: loss and gradients are those "
    "of rows of their own",
    "[programs][examples]") {
  const ScratchFolder scratch;
  auto model = graft::models::load(golden("tiny"));
  auto weight = model.decoder->model->layers[0]->named_parameters()["self_attn.k_proj.weight"];
  weight.set_requires_grad(true);
  const auto run = [&](bool packing) {
    const TokenData data = load(scratch, kThree, 16, packing);
    std::vector<int64_t> rows(static_cast<size_t>(data.size()));
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int64_t>(i);
    const Batch batch = data.batch(rows);
    CHECK(batch.segments.defined() == packing);
    const at::Tensor loss =
        model.decoder->loss(batch.inputs, batch.targets, std::nullopt, batch.segments);
    weight.mutable_grad() = at::Tensor();
    loss.backward();
    return std::pair(loss.item<double>(), weight.grad().clone());
  };
  const auto [packed, packed_gradient] = run(true);
  const auto [apart, apart_gradient] = run(false);
  CHECK(std::abs(packed - apart) < 1e-6);
  CHECK((packed_gradient - apart_gradient).abs().max().item<double>() < 1e-6);
}

TEST_CASE("finetune and evaluate take examples", "[programs][examples]") {
  const ScratchFolder scratch;
  std::string lines;
  for (int i = 0; i < 40; ++i)
    lines += json{{"prompt", "What is " + std::to_string(i) + "? "},
                  {"completion", "It is " + std::to_string(i * i) + "."}}
                 .dump() +
             "\n";
  spill(scratch / "e.jsonl", lines);
  for (const std::string packing : {"--packing", "--no-packing"}) {
    INFO(packing);
    const auto result =
        run("finetune", "--model " + golden("tiny") + " --data " + (scratch / "e.jsonl") +
                            " --seq-len 64 --batch-size 2 --grad-accum 2 --steps 8 --lr 1e-2 "
                            "--eval-fraction 0.1 --quiet " +
                            packing + " --output " + (scratch / "o"));
    INFO(result.err);
    REQUIRE(result.code == 0);
    const json run_file = json::parse(slurp(scratch / "o/run.json"));
    CHECK(run_file["eval_loss_after"] < run_file["eval_loss_before"].get<double>() - 0.1);
  }
  const auto loss = [&](const std::string& more) {
    const auto result = run("evaluate", "--model " + golden("tiny") + " --data " +
                                            (scratch / "e.jsonl") + " --seq-len 64" + more);
    INFO(result.err);
    REQUIRE(result.code == 0);
    return json::parse(result.out)["loss"].get<double>();
  };
  CHECK(loss(" --adapter " + (scratch / "o")) < loss("") - 0.1);
}

TEST_CASE("lines that are no examples are refused with their number", "[programs][examples]") {
  for (const auto& [lines, words] :
       {std::pair("{\"text\": \"ab\"}\n{\"text\": \n", "a line must be JSON; got {\"text\": "),
        {"[1]\n", "a line must be a JSON object; got [1]"},
        {"{\"prompt\": \"a\"}\n", "must hold 'text', 'prompt' and 'completion', or 'messages'"},
        {"{\"text\": 3}\n", "'text' must be a string; got 3"},
        {"{\"text\": \"a\"}\n", "at least two tokens; got 1"},
        {"{\"messages\": []}\n", "at least one message"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n",
         "a chat template; got none"},
        {" \n\n", "got only empty lines"}}) {
    INFO(lines);
    const ScratchFolder scratch;
    const std::string message = error_of([&] { load(scratch, lines, 16, true); });
    CHECK(contains(message, words));
    CHECK(contains(message, "e.jsonl"));
  }
  const ScratchFolder scratch;
  CHECK(contains(error_of([&] { load(scratch, "{\"text\": \"ab\"}\n{\"text\": 3}\n", 16, true); }),
                 "(line 2)"));
  CHECK(contains(error_of([&] {
                   load(scratch, "{\"prompt\": \"a long prompt\", \"completion\": \"b\"}\n", 4,
                        true);
                 }),
                 "some token within seq-len must be learnt; got none in 1 examples for seq-len 4"));
}
