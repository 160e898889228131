// Loss of a model on a text, logits of given tokens, or token ids of a text.
#include <ATen/ATen.h>
#include <graft/adapters/dylora.h>
#include <graft/core/error.h>
#include <graft/io/safetensors.h>
#include <graft/moe/token_scope.h>
#include <graft/ops/frozen_product.h>

#include <cmath>
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "examples/trainer/data.h"
#include "examples/trainer/program.h"

namespace {

using namespace graft;

struct Options {
  trainer::CommonOptions common;
  std::string data, ids, logits;
  bool tokenize = false;
  std::optional<int64_t> rank;  // of a DyLoRA adapter
  int64_t seq_len = 256, batch_size = 4;
};

// The adapters of --adapter, DyLoRA's at --rank.
auto attach_at_rank(models::LoadedModel& model, const Options& o) {
  auto adapter = trainer::attach_adapters(*model.decoder, o.common);
  if (o.rank) adapters::set_dylora_rank(*model.decoder, *o.rank);
  return adapter;
}

int print_loss(const Options& o) {
  models::LoadedModel model = models::load(o.common.model, trainer::compute_dtype(o.common),
                                           trainer::compute_device(o.common));
  const auto data =
      trainer::TokenData::from_file(o.data, model.tokenizer, o.seq_len, /*packing=*/false);
  const auto adapter = attach_at_rank(model, o);
  const at::NoGradGuard no_grad;
  double sum = 0;
  int64_t counted = 0;
  for (int64_t first = 0; first < data.size(); first += o.batch_size) {
    std::vector<int64_t> rows;
    for (int64_t i = first; i < std::min(first + o.batch_size, data.size()); ++i) rows.push_back(i);
    const auto batch = data.batch(rows);
    if (batch.counted == 0) continue;
    const moe::TokenScope padding({.valid = batch.valid});
    sum += model.decoder->loss(batch.inputs, batch.targets, 1.0, {}, batch.valid).item<double>();
    counted += batch.counted;
  }
  GRAFT_CHECK(counted > 0, "data", "the file must hold a token that counts; got none (file '",
              o.data, "')");
  const double loss = sum / static_cast<double>(counted);
  nlohmann::ordered_json result = {
      {"loss", loss}, {"perplexity", std::exp(loss)}, {"tokens", data.tokens()}};
  if (adapter)
    if (const auto use = adapter->expert_use(/*training=*/false); !use.empty())
      result["expert_use"] = use;
  std::cout << result.dump() << std::endl;
  return 0;
}

std::vector<int64_t> parse_ids(const std::string& text, int64_t vocabulary) {
  std::vector<int64_t> ids;
  std::stringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) {
    size_t used = 0;
    int64_t id = -1;
    try {
      id = std::stoll(item, &used);
    } catch (const std::exception&) {
    }
    GRAFT_CHECK(!item.empty() && used == item.size() && id >= 0 && id < vocabulary, "evaluate",
                "ids must be numbers in [0, ", vocabulary, ") with commas; got '", item, "'");
    ids.push_back(id);
  }
  GRAFT_CHECK(!ids.empty(), "evaluate", "ids must hold at least one number; got '", text, "'");
  return ids;
}

// Logits are written to be compared: MKL's order of summation errs less than oneDNN's, and speed
// does not matter here.
int write_logits(const Options& o) {
  if (std::getenv("GRAFT_PRODUCTS") == nullptr) ops::set_product_library(ops::ProductLibrary::mkl);
  models::LoadedModel model = models::load(o.common.model, trainer::compute_dtype(o.common),
                                           trainer::compute_device(o.common));
  const auto adapter = attach_at_rank(model, o);
  const auto ids = parse_ids(o.ids, model.decoder->config.vocab_size);
  const at::NoGradGuard no_grad;
  const at::Tensor logits =
      model.decoder->logits(at::tensor(ids).unsqueeze(0)).squeeze(0).to(at::kFloat);
  io::write_safetensors(o.logits, {{"logits", logits}});
  if (o.common.json)
    std::cout << nlohmann::ordered_json{{"logits", o.logits},
                                        {"tokens", ids.size()},
                                        {"vocabulary", logits.size(1)}}
                     .dump()
              << std::endl;
  return 0;
}

int print_ids(const Options& o) {
  const auto tokenizer = models::load_tokenizer(o.common.model);
  std::stringstream lines(trainer::read_file(o.data, "data"));
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    try {
      std::cout << nlohmann::json(tokenizer.encode(line)).dump() << "\n";
    } catch (const Error& error) {
      throw Error(std::string(error.what()) + " (file '" + o.data + "', line " +
                  std::to_string(number) + ")");
    }
  }
  std::cout << std::flush;
  return 0;
}

int evaluate(const Options& o) {
  const bool logits = !o.ids.empty() || !o.logits.empty();
  if (logits && (o.ids.empty() || o.logits.empty()))
    throw trainer::UsageError("[usage] --ids and --logits go together");
  if (logits == !o.data.empty())
    throw trainer::UsageError("[usage] give either --data, or --ids with --logits");
  if (o.rank && o.common.adapters.empty())
    throw trainer::UsageError("[usage] --rank needs --adapter");
  if (o.tokenize && o.data.empty()) throw trainer::UsageError("[usage] --tokenize needs --data");
  GRAFT_CHECK(o.batch_size >= 1, "evaluate", "batch-size must be at least 1; got ", o.batch_size);
  trainer::apply_common(o.common);
  if (o.tokenize) return print_ids(o);
  return logits ? write_logits(o) : print_loss(o);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{
      "Loss of a model on a text, logits of given tokens, or token ids of a text.\n\n"
      "Example: evaluate --model model.gguf --adapter out --data devil.txt",
      "evaluate"};
  Options options;
  trainer::add_common_flags(app, options.common, /*adapter=*/true);
  const char* group = "Evaluation";
  app.add_option("--data", options.data, "text file: prints loss, perplexity and tokens as JSON")
      ->group(group);
  app.add_option("--seq-len", options.seq_len, "tokens a chunk")
      ->capture_default_str()
      ->group(group);
  app.add_option("--batch-size", options.batch_size, "chunks at once")
      ->capture_default_str()
      ->group(group);
  app.add_option("--rank", options.rank, "rank at which a DyLoRA adapter runs")->group(group);
  app.add_option("--ids", options.ids, "token ids with commas")->group(group);
  app.add_option("--logits", options.logits,
                 "safetensors file to write: float32 `logits` [T, vocabulary]")
      ->group(group);
  app.add_flag("--tokenize", options.tokenize,
               "print the token ids of each line of --data as a JSON array")
      ->group(group);
  return trainer::run_program(app, argc, argv, [&] { return evaluate(options); });
}
