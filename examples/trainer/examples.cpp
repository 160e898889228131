#include "examples/trainer/examples.h"

#include <graft/core/error.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "examples/text/chat_template.h"

namespace graft::trainer {
namespace {

using nlohmann::ordered_json;

// Builds one example piece by piece.
class Builder {
 public:
  explicit Builder(const text::Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void add(const std::string& text, bool learnt, bool with_beginning = false) {
    for (const int32_t id : tokenizer_.encode(text, with_beginning)) push(id, learnt);
  }
  void end() {
    if (const auto id = tokenizer_.eos_id()) push(*id, true);
  }
  Example finish() { return std::move(example_); }

 private:
  void push(int32_t id, bool learnt) {
    example_.ids.push_back(id);
    example_.learnt.push_back(learnt);
  }

  const text::Tokenizer& tokenizer_;
  Example example_;
};

const std::string& text_field(const ordered_json& object, const char* key) {
  GRAFT_CHECK(object.at(key).is_string(), "data", "'", key, "' must be a string; got ",
              object.at(key).dump());
  return object.at(key).get_ref<const std::string&>();
}

std::string render(const ordered_json& messages, size_t count, bool prompt,
                   const text::Tokenizer& tokenizer) {
  ordered_json first = ordered_json::array();
  for (size_t i = 0; i < count; ++i) first.push_back(messages[i]);
  return text::render_chat_template(tokenizer.chat_template(), first,
                                    {.add_generation_prompt = prompt,
                                     .bos_token = tokenizer.bos_token(),
                                     .eos_token = tokenizer.eos_token()});
}

// What the template writes for the assistant's turns is learnt, from behind the turn's opening on.
Example from_messages(const ordered_json& messages, const text::Tokenizer& tokenizer) {
  GRAFT_CHECK(messages.is_array() && !messages.empty(), "data",
              "'messages' must be a list with at least one message; got ", messages.dump());
  GRAFT_CHECK(!tokenizer.chat_template().empty(), "data",
              "'messages' need a model with a chat template; got none");
  Builder builder(tokenizer);
  std::string done;
  const auto reach = [&](const std::string& text, bool learnt) {
    GRAFT_CHECK(text.starts_with(done), "data",
                "the chat template must only append as messages are added; got another beginning");
    builder.add(text.substr(done.size()), learnt);
    done = text;
  };
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& message = messages[i];
    GRAFT_CHECK(message.is_object() && message.contains("role") && message["role"].is_string(),
                "data", "every message must be an object with a role; got ", message.dump());
    if (message["role"] != "assistant") continue;
    reach(render(messages, i, /*prompt=*/true, tokenizer), false);
    reach(render(messages, i + 1, /*prompt=*/false, tokenizer), true);
  }
  reach(render(messages, messages.size(), false, tokenizer), false);
  return builder.finish();
}

Example from_object(const ordered_json& object, const text::Tokenizer& tokenizer) {
  GRAFT_CHECK(object.is_object(), "data", "a line must be a JSON object; got ",
              object.dump().substr(0, 60));
  if (object.contains("messages")) return from_messages(object["messages"], tokenizer);
  Builder builder(tokenizer);
  if (object.contains("text")) {
    builder.add(text_field(object, "text"), true, /*with_beginning=*/true);
  } else {
    GRAFT_CHECK(object.contains("prompt") && object.contains("completion"), "data",
                "an example must hold 'text', 'prompt' and 'completion', or 'messages'; got ",
                object.dump().substr(0, 60));
    builder.add(text_field(object, "prompt"), false, /*with_beginning=*/true);
    builder.add(text_field(object, "completion"), true);
  }
  builder.end();
  return builder.finish();
}

}  // namespace

std::vector<Example> read_examples(const std::string& jsonl, const text::Tokenizer& tokenizer) {
  std::vector<Example> examples;
  std::stringstream stream(jsonl);
  int64_t number = 0;
  for (std::string line; std::getline(stream, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    try {
      const auto object = ordered_json::parse(line, nullptr, /*allow_exceptions=*/false);
      GRAFT_CHECK(!object.is_discarded(), "data", "a line must be JSON; got ", line.substr(0, 60));
      Example example = from_object(object, tokenizer);
      GRAFT_CHECK(example.ids.size() >= 2, "data", "an example must hold at least two tokens; got ",
                  example.ids.size());
      examples.push_back(std::move(example));
    } catch (const Error& error) {
      throw Error(concat(error.what(), " (line ", number, ")"));
    }
  }
  GRAFT_CHECK(!examples.empty(), "data", "the file must hold an example; got only empty lines");
  return examples;
}

}  // namespace graft::trainer
