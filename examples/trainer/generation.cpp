#include "examples/trainer/generation.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/core/error.h>

#include <algorithm>

namespace graft::trainer {
namespace {

int64_t choose(const at::Tensor& logits, const GenerationOptions& options,
               const at::Generator& generator) {
  if (options.temperature == 0.0) return logits.argmax().item<int64_t>();
  const at::Tensor p = at::softmax(logits.to(at::kDouble) / options.temperature, -1);
  auto [sorted, order] = p.sort(/*stable=*/true, -1, /*descending=*/true);
  // A token stays while those before it hold less than top_p: the likeliest one always does.
  sorted.masked_fill_(sorted.cumsum(-1) - sorted >= options.top_p, 0.0);
  return order[at::multinomial(sorted, 1, false, generator).item<int64_t>()].item<int64_t>();
}

}  // namespace

void GenerationOptions::validate() const {
  GRAFT_CHECK(max_new_tokens >= 1, "generate", "max-new-tokens must be at least 1; got ",
              max_new_tokens);
  GRAFT_CHECK(temperature >= 0.0 && temperature < 1e6, "generate", "temperature must be >= 0; got ",
              temperature);
  GRAFT_CHECK(top_p > 0.0 && top_p <= 1.0, "generate", "top-p must be in (0, 1]; got ", top_p);
}

std::string generate(models::LoadedModel& model, const std::string& prompt,
                     const GenerationOptions& options, bool add_special_tokens,
                     const std::function<void(const std::string&)>& on_text) {
  options.validate();
  const at::NoGradGuard no_grad;
  const bool training = model.decoder->is_training();
  model.decoder->eval();
  const std::vector<int32_t> ids = model.tokenizer.encode(prompt, add_special_tokens);
  GRAFT_CHECK(!ids.empty(), "generate",
              "the prompt must hold at least one token; got an empty text");
  const int64_t prompt_length = static_cast<int64_t>(ids.size());
  GRAFT_CHECK(prompt_length < model.decoder->config.max_positions, "generate",
              "the prompt must be shorter than the model's context; got ", prompt_length,
              " tokens for ", model.decoder->config.max_positions);
  const int64_t room =
      std::min(options.max_new_tokens, model.decoder->config.max_positions - prompt_length);
  auto cache = model.decoder->make_cache(1, prompt_length + room);
  const at::Generator generator = at::detail::createCPUGenerator(options.seed);
  const auto& ends = model.decoder->config.eos_ids;
  text::StreamDecoder stream(model.tokenizer, /*skip_special_tokens=*/true);
  std::string text;
  const auto emit = [&](const std::string& piece) {
    text += piece;
    if (on_text && !piece.empty()) on_text(piece);
  };
  at::Tensor next = at::tensor(std::vector<int64_t>(ids.begin(), ids.end())).unsqueeze(0);
  for (int64_t i = 0; i < room; ++i) {
    const int64_t id =
        choose(model.decoder->next_logits(next, cache).squeeze(0).cpu(), options, generator);
    const bool end = std::find(ends.begin(), ends.end(), id) != ends.end() ||
                     id == model.tokenizer.eos_id().value_or(-1);
    if (end || id >= model.tokenizer.vocabulary_size()) break;
    emit(stream.push(static_cast<int32_t>(id)));
    next = at::full({1, 1}, id, at::kLong);
  }
  emit(stream.finish());
  model.decoder->train(training);
  return text;
}

}  // namespace graft::trainer
