/// What a parsed template is: functions of the names in scope.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "examples/text/jinja_lexer.h"
#include "examples/text/jinja_value.h"

namespace graft::text::jinja {

/// The names that statements see: those of the innermost loop or macro first, those of the template
/// last.
class Scope {
 public:
  explicit Scope(Scope* parent = nullptr)
      : parent_(parent), root_(parent == nullptr ? this : parent->root_) {}

  Value get(const std::string& name) const;  ///< Undefined when there is no such name.
  void set(const std::string& name, Value value) { names_[name] = std::move(value); }
  Scope& root() { return *root_; }
  bool is_root() const { return parent_ == nullptr; }

  /// Counts one step of work; throws when a template does more than any honest one would.
  void step(int line);

  int macro_depth = 0;  // of the root: how many macro calls are running

 private:
  Scope* parent_;
  Scope* root_;
  std::map<std::string, Value> names_;
  int64_t steps_ = 0;  // of the root
};

/// How a statement ends.
enum class Flow { kNext, kBreak, kContinue };

using Expression = std::function<Value(Scope&)>;
using Statement = std::function<Flow(Scope&, std::string& out)>;

/// The tokens of a template with a position.
class TokenStream {
 public:
  explicit TokenStream(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  const Token& peek(size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  int line() const { return peek().line; }
  Token next();
  bool at(TokenKind kind) const { return peek().kind == kind; }
  bool at_operator(std::string_view text) const {
    return at(TokenKind::kOperator) && peek().text == text;
  }
  bool at_name(std::string_view text) const { return at(TokenKind::kName) && peek().text == text; }
  bool take_operator(std::string_view text);
  bool take_name(std::string_view text);
  void expect_operator(std::string_view text);
  void expect_name(std::string_view text);
  std::string expect_identifier();  ///< A name that is no keyword.

  /// Throws "expected what; got token".
  [[noreturn]] void refuse(std::string_view expected) const;

 private:
  std::vector<Token> tokens_;
  size_t at_ = 0;
};

/// Parses one expression; `allow_tuple`: "a, b" is a tuple.
Expression parse_expression(TokenStream& tokens, bool allow_tuple = false);

/// Parses one expression that does not take a following "if" as its own.
Expression parse_expression_without_if(TokenStream& tokens);

/// Parses a whole template.
Statement parse_template(TokenStream& tokens);

/// Applies a filter; `is_filter` says which exist.
bool is_filter(std::string_view name);
Value apply_filter(const std::string& name, const Value& value, const Arguments& arguments);

/// Applies a test; `is_test` says which exist.
bool is_test(std::string_view name);
bool apply_test(const std::string& name, const Value& value, const Arguments& arguments);

/// Calls a method of a string, list or mapping.
Value call_method(const Value& object, const std::string& name, const Arguments& arguments);

/// `object.name`; undefined when there is no such member.
Value get_member(const Value& object, const std::string& name, int line);

/// `object[index]`; undefined when there is no such item.
Value get_item(const Value& object, const Value& index, int line);

/// `object[start:stop:step]` with Python's rules; none stands for a bound that is left out.
Value get_slice(const Value& object, const Value& start, const Value& stop, const Value& step,
                int line);

/// A binary operator: + - * / // % ** ~ == != < > <= >= in.
Value operate(std::string_view symbol, const Value& left, const Value& right, int line);

}  // namespace graft::text::jinja
