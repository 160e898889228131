/// Chat templates: the text a model was trained to see for a list of messages.
///
/// Checkpoints carry the rule as a Jinja template. What is implemented is the part of Jinja that
/// such templates use, rendered like transformers' `apply_chat_template`: blocks are trimmed
/// (`trim_blocks`, `lstrip_blocks`), `tojson` keeps the order of the keys and escapes no HTML.
/// Everything else is refused by its name and line.
///
/// Statements: for (with if and else, break, continue), if, set (also of a namespace and as a
/// block), macro, generation. Expressions: literals, indexing, slices, calls, filters, tests,
/// arithmetic, comparison, `~`, `in`, inline if.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

namespace graft::text {

/// What a template sees besides the messages.
struct ChatOptions {
  bool add_generation_prompt = false;  ///< End with the opening of the assistant's turn.
  std::string bos_token;               ///< Spelling of the token; empty if there is none.
  std::string eos_token;               ///< Spelling of the token; empty if there is none.
};

/// Renders `chat_template` for `messages`, an array of objects such as {"role": "user", "content":
/// "Hello"}. `variables`, an object or null, holds further names, for example "tools", "documents"
/// or "enable_thinking". Throws graft::Error with the line for unknown syntax, and with the
/// template's words for its `raise_exception`.
std::string render_chat_template(const std::string& chat_template,
                                 const nlohmann::ordered_json& messages, const ChatOptions& options,
                                 const nlohmann::ordered_json& variables);

/// The same without further names.
std::string render_chat_template(const std::string& chat_template,
                                 const nlohmann::ordered_json& messages,
                                 const ChatOptions& options = {});

}  // namespace graft::text
