/// Cuts a template into text and the tokens of its tags, with Jinja's white space control already
/// applied.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace graft::text::jinja {

enum class TokenKind {
  kText,
  kName,
  kString,
  kInteger,
  kFloat,
  kOperator,
  kVariableBegin,
  kVariableEnd,
  kBlockBegin,
  kBlockEnd,
  kEnd
};

/// A token; `text` is a string's content after its escapes are resolved, an operator's or name's
/// spelling otherwise.
struct Token {
  TokenKind kind;
  std::string text;
  int line;
};

/// The tokens of valid UTF-8, ended by one kEnd. `trim_blocks` and `lstrip_blocks` are on, as in
/// transformers.
std::vector<Token> tokenize(std::string_view source);

}  // namespace graft::text::jinja
