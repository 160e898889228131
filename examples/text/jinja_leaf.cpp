#include "examples/text/jinja_leaf.h"

#include <graft/core/error.h>

#include <charconv>

namespace graft::text::jinja {

Arguments CallSite::evaluate(Scope& scope) const {
  Arguments arguments;
  arguments.line = line;
  for (const auto& expression : positional) arguments.positional.push_back(expression(scope));
  for (const auto& [name, expression] : named)
    arguments.named.emplace_back(name, expression(scope));
  return arguments;
}

Expression parse_name(TokenStream& tokens) {
  const std::string name = tokens.next().text;
  if (name == "true" || name == "True") return [](Scope&) { return Value{true}; };
  if (name == "false" || name == "False") return [](Scope&) { return Value{false}; };
  if (name == "none" || name == "None") return [](Scope&) { return Value{None{}}; };
  return [name](Scope& scope) { return scope.get(name); };
}

Expression parse_string(TokenStream& tokens) {
  std::string text;
  while (tokens.at(TokenKind::kString)) text += tokens.next().text;
  return [text](Scope&) { return Value{text}; };
}

Expression parse_number(TokenStream& tokens) {
  const Token token = tokens.next();
  Value value;
  const char* end = token.text.data() + token.text.size();
  std::errc error{};
  if (token.kind == TokenKind::kFloat) {
    error = std::from_chars(token.text.data(), end, value.data.emplace<double>()).ec;
  } else {
    error = std::from_chars(token.text.data(), end, value.data.emplace<int64_t>()).ec;
  }
  if (error != std::errc{})
    fail_at(token.line, concat("a number must fit into 64 bits; got '", token.text, "'"));
  return [value](Scope&) { return value; };
}

Expression list_of(std::vector<Expression> items, bool is_tuple) {
  return [items = std::move(items), is_tuple](Scope& scope) {
    std::vector<Value> values;
    for (const auto& item : items) values.push_back(item(scope));
    return make_list(std::move(values), is_tuple);
  };
}

Expression dict_of(std::vector<std::pair<Expression, Expression>> members, int line) {
  return [members = std::move(members), line](Scope& scope) {
    Dict dict;
    for (const auto& [key, value] : members) {
      const Value name = key(scope);
      if (name.string() == nullptr)
        fail_at(line, concat("a key must be a string; got ", kind_of(name)));
      dict.set(*name.string(), value(scope));
    }
    return make_dict(std::move(dict));
  };
}

}  // namespace graft::text::jinja
