// Expressions: a recursive-descent parser whose result is a function of the scope. Loosest binding
// first: inline if, or, and, not, comparison, + -, ~, * / // %, **, sign, postfix, filters and
// tests.
#include <graft/core/error.h>

#include <algorithm>
#include <array>

#include "examples/text/jinja_leaf.h"
#include "examples/text/jinja_runtime.h"

namespace graft::text::jinja {
namespace {

// Bounds on the recursion that a hostile template could cause, while parsing and while running.
constexpr int kMostNesting = 50;
constexpr int kMostNodes = 1000;

class ExpressionParser {
 public:
  explicit ExpressionParser(TokenStream& tokens) : tokens_(tokens) {}

  Expression tuple_or_expression() {
    Expression first = conditional();
    if (!tokens_.at_operator(",")) return first;
    std::vector<Expression> items{std::move(first)};
    while (tokens_.take_operator(",")) {
      if (ends_tuple()) break;
      items.push_back(conditional());
    }
    return list_of(std::move(items), /*is_tuple=*/true);
  }

  Expression conditional() {
    const Nesting nesting(*this);
    Expression value = disjunction();
    while (tokens_.take_name("if")) {
      count();
      Expression condition = disjunction();
      Expression otherwise = [](Scope&) { return Value{Undefined{"the inline if without else"}}; };
      if (tokens_.take_name("else")) otherwise = conditional();
      value = [=](Scope& scope) {
        return truth(condition(scope)) ? value(scope) : otherwise(scope);
      };
    }
    return value;
  }

  Expression disjunction() {
    Expression left = conjunction();
    while (tokens_.take_name("or")) {
      count();
      left = [left, right = conjunction()](Scope& scope) {
        Value value = left(scope);
        return truth(value) ? value : right(scope);
      };
    }
    return left;
  }

 private:
  struct Nesting {
    explicit Nesting(ExpressionParser& parser) : depth(parser.depth_) {
      if (++depth > kMostNesting) {
        fail_at(parser.tokens_.line(),
                concat("an expression may nest at most ", kMostNesting, " levels; got more"));
      }
    }
    ~Nesting() { --depth; }
    int& depth;
  };

  void count() {
    if (++nodes_ > kMostNodes) {
      fail_at(tokens_.line(),
              concat("an expression may have at most ", kMostNodes, " operators; got more"));
    }
  }

  bool ends_tuple() const {
    return tokens_.at(TokenKind::kBlockEnd) || tokens_.at(TokenKind::kVariableEnd) ||
           tokens_.at_operator(")") || tokens_.at_operator("=");
  }

  Expression conjunction() {
    Expression left = negation();
    while (tokens_.take_name("and")) {
      count();
      left = [left, right = negation()](Scope& scope) {
        Value value = left(scope);
        return truth(value) ? right(scope) : value;
      };
    }
    return left;
  }

  Expression negation() {
    if (!tokens_.take_name("not")) return comparison();
    const Nesting nesting(*this);
    return [inner = negation()](Scope& scope) { return Value{!truth(inner(scope))}; };
  }

  /// The comparison operator at hand, or nothing; "not in" counts as one.
  std::string take_comparison() {
    constexpr std::array<std::string_view, 6> kSymbols = {"==", "!=", "<=", ">=", "<", ">"};
    for (const std::string_view symbol : kSymbols) {
      if (tokens_.take_operator(symbol)) return std::string(symbol);
    }
    if (tokens_.take_name("in")) return "in";
    if (tokens_.at_name("not") && tokens_.peek(1).kind == TokenKind::kName &&
        tokens_.peek(1).text == "in") {
      tokens_.next();
      tokens_.next();
      return "not in";
    }
    return "";
  }

  /// a < b < c means a < b and b < c.
  Expression comparison() {
    Expression first = sum();
    std::vector<std::pair<std::string, Expression>> rest;
    const int line = tokens_.line();
    for (std::string symbol = take_comparison(); !symbol.empty(); symbol = take_comparison()) {
      count();
      rest.emplace_back(symbol, sum());
    }
    if (rest.empty()) return first;
    return [first, rest, line](Scope& scope) {
      Value left = first(scope);
      for (const auto& [symbol, expression] : rest) {
        Value right = expression(scope);
        const bool negated = symbol == "not in";
        if (truth(operate(negated ? "in" : symbol, left, right, line)) == negated)
          return Value{false};
        left = std::move(right);
      }
      return Value{true};
    };
  }

  /// Left-associative operators of one level over the next tighter level.
  Expression binary(const std::vector<std::string_view>& symbols,
                    Expression (ExpressionParser::*tighter)()) {
    Expression left = (this->*tighter)();
    while (true) {
      const auto symbol =
          std::find_if(symbols.begin(), symbols.end(),
                       [&](std::string_view candidate) { return tokens_.at_operator(candidate); });
      if (symbol == symbols.end()) return left;
      count();
      const int line = tokens_.line();
      tokens_.next();
      left = [left, right = (this->*tighter)(), name = *symbol, line](Scope& scope) {
        const Value first = left(scope);
        return operate(name, first, right(scope), line);
      };
    }
  }

  Expression sum() { return binary({"+", "-"}, &ExpressionParser::concatenation); }
  Expression concatenation() { return binary({"~"}, &ExpressionParser::product); }
  Expression product() { return binary({"*", "//", "/", "%"}, &ExpressionParser::power); }
  Expression power() { return binary({"**"}, &ExpressionParser::signed_with_filters); }
  Expression signed_with_filters() { return filters(signed_primary()); }

  Expression signed_primary() {
    const int line = tokens_.line();
    for (const std::string_view sign : {"-", "+"}) {
      if (!tokens_.take_operator(sign)) continue;
      const Nesting nesting(*this);
      return [inner = signed_primary(), sign, line](Scope& scope) {
        return operate(sign, Value{int64_t{0}}, inner(scope), line);
      };
    }
    return postfix(primary());
  }

  Expression primary() {
    const Token token = tokens_.peek();
    switch (token.kind) {
      case TokenKind::kName:
        return parse_name(tokens_);
      case TokenKind::kString:
        return parse_string(tokens_);
      case TokenKind::kInteger:
      case TokenKind::kFloat:
        return parse_number(tokens_);
      case TokenKind::kOperator:
        if (tokens_.take_operator("(")) return parenthesis();
        if (tokens_.take_operator("[")) return list();
        if (tokens_.take_operator("{")) return dict();
        [[fallthrough]];
      default:
        tokens_.refuse("an expression");
    }
  }

  Expression parenthesis() {
    if (tokens_.take_operator(")")) return list_of({}, /*is_tuple=*/true);
    Expression inner = tuple_or_expression();
    tokens_.expect_operator(")");
    return inner;
  }

  Expression list() {
    std::vector<Expression> items;
    while (!tokens_.take_operator("]")) {
      if (!items.empty()) tokens_.expect_operator(",");
      if (tokens_.take_operator("]")) break;
      items.push_back(conditional());
    }
    return list_of(std::move(items), /*is_tuple=*/false);
  }

  Expression dict() {
    std::vector<std::pair<Expression, Expression>> members;
    const int line = tokens_.line();
    while (!tokens_.take_operator("}")) {
      if (!members.empty()) tokens_.expect_operator(",");
      if (tokens_.take_operator("}")) break;
      Expression key = conditional();
      tokens_.expect_operator(":");
      members.emplace_back(std::move(key), conditional());
    }
    return dict_of(std::move(members), line);
  }

  CallSite call_arguments() {
    CallSite call;
    call.line = tokens_.line();
    tokens_.expect_operator("(");
    while (!tokens_.take_operator(")")) {
      if (!call.positional.empty() || !call.named.empty()) tokens_.expect_operator(",");
      if (tokens_.take_operator(")")) break;
      const bool named = tokens_.at(TokenKind::kName) &&
                         tokens_.peek(1).kind == TokenKind::kOperator &&
                         tokens_.peek(1).text == "=";
      if (named) {
        std::string name = tokens_.next().text;
        tokens_.next();
        call.named.emplace_back(std::move(name), conditional());
      } else if (!call.named.empty()) {
        tokens_.refuse("a named argument");
      } else {
        call.positional.push_back(conditional());
      }
    }
    return call;
  }

  Expression postfix(Expression object) {
    while (true) {
      if (tokens_.take_operator(".")) {
        count();
        object = member(std::move(object));
      } else if (tokens_.take_operator("[")) {
        count();
        object = subscript(std::move(object));
      } else if (tokens_.at_operator("(")) {
        count();
        object = call(std::move(object));
      } else {
        return object;
      }
    }
  }

  Expression member(Expression object) {
    const int line = tokens_.line();
    const std::string name = tokens_.expect_identifier();
    if (!tokens_.at_operator("(")) {
      return [object, name, line](Scope& scope) { return get_member(object(scope), name, line); };
    }
    return [object, name, arguments = call_arguments()](Scope& scope) {
      return call_method(object(scope), name, arguments.evaluate(scope));
    };
  }

  Expression call(Expression function) {
    return [function, arguments = call_arguments()](Scope& scope) {
      const Value callee = function(scope);
      if (const auto* callable = callee.callable())
        return callable->call(arguments.evaluate(scope));
      const auto* undefined = std::get_if<Undefined>(&callee.data);
      fail_at(arguments.line, undefined != nullptr
                                  ? concat("a function must be known; got '", undefined->name, "'")
                                  : concat("only a function can be called; got ", kind_of(callee)));
    };
  }

  Expression subscript(Expression object) {
    const int line = tokens_.line();
    std::array<Expression, 3> bounds;
    const Expression nothing = [](Scope&) { return Value{None{}}; };
    bounds.fill(nothing);
    size_t colons = 0;
    while (!tokens_.at_operator("]")) {
      if (tokens_.take_operator(":")) {
        if (++colons > 2) tokens_.refuse("']'");
      } else {
        bounds[colons] = conditional();
        if (!tokens_.at_operator(":") && !tokens_.at_operator("]")) tokens_.refuse("']'");
      }
    }
    tokens_.expect_operator("]");
    if (colons == 0) {
      return [object, index = bounds[0], line](Scope& scope) {
        return get_item(object(scope), index(scope), line);
      };
    }
    return [object, bounds, line](Scope& scope) {
      return get_slice(object(scope), bounds[0](scope), bounds[1](scope), bounds[2](scope), line);
    };
  }

  Expression filters(Expression value) {
    while (true) {
      if (tokens_.take_operator("|")) {
        count();
        value = filter(std::move(value));
      } else if (tokens_.take_name("is")) {
        count();
        value = test(std::move(value));
      } else {
        return value;
      }
    }
  }

  Expression filter(Expression value) {
    const int line = tokens_.line();
    const std::string name = tokens_.expect_identifier();
    if (!is_filter(name)) fail_at(line, concat("a filter must be known; got '", name, "'"));
    CallSite arguments;
    arguments.line = line;
    if (tokens_.at_operator("(")) arguments = call_arguments();
    return [value, name, arguments](Scope& scope) {
      return apply_filter(name, value(scope), arguments.evaluate(scope));
    };
  }

  bool starts_test_argument() const {
    if (tokens_.at(TokenKind::kString) || tokens_.at(TokenKind::kInteger) ||
        tokens_.at(TokenKind::kFloat))
      return true;
    if (tokens_.at_operator("[") || tokens_.at_operator("{")) return true;
    constexpr std::array<std::string_view, 7> kKeywords = {"else", "or", "and", "if",
                                                           "is",   "in", "not"};
    return tokens_.at(TokenKind::kName) &&
           std::find(kKeywords.begin(), kKeywords.end(), tokens_.peek().text) == kKeywords.end();
  }

  Expression test(Expression value) {
    const bool negated = tokens_.take_name("not");
    const int line = tokens_.line();
    const std::string name = tokens_.expect_identifier();
    if (!is_test(name)) fail_at(line, concat("a test must be known; got '", name, "'"));
    CallSite arguments;
    arguments.line = line;
    if (tokens_.at_operator("(")) {
      arguments = call_arguments();
    } else if (starts_test_argument()) {
      arguments.positional.push_back(postfix(primary()));
    }
    return [value, name, arguments, negated](Scope& scope) {
      return Value{apply_test(name, value(scope), arguments.evaluate(scope)) != negated};
    };
  }

  TokenStream& tokens_;
  int depth_ = 0;
  int nodes_ = 0;
};

}  // namespace

Expression parse_expression(TokenStream& tokens, bool allow_tuple) {
  ExpressionParser parser(tokens);
  return allow_tuple ? parser.tuple_or_expression() : parser.conditional();
}

Expression parse_expression_without_if(TokenStream& tokens) {
  return ExpressionParser(tokens).disjunction();
}

}  // namespace graft::text::jinja
