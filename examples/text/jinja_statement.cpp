// Statements: text, {{ output }} and the blocks, each parsed into a function that appends to the
// output.
#include <graft/core/error.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "examples/text/jinja_runtime.h"

namespace graft::text::jinja {
namespace {

constexpr int kMostNesting = 50;
constexpr int kMostMacroDepth = 20;

/// Where assigned values go: names, or one member of a namespace.
struct Target {
  std::vector<std::string> names;
  std::string member;
  int line = 0;

  void assign(Scope& scope, const Value& value) const {
    if (!member.empty()) {
      auto* dict = scope.get(names[0]).dict();
      if (dict == nullptr || !dict->is_namespace)
        fail_at(line, concat("only a namespace has members to set; got '", names[0], "'"));
      dict->set(member, value);
      return;
    }
    if (names.size() == 1) {
      scope.set(names[0], value);
      return;
    }
    const auto items = iterate(value, line);
    if (items.size() != names.size()) {
      fail_at(line,
              concat("as many values as names are needed, ", names.size(), "; got ", items.size()));
    }
    for (size_t i = 0; i < names.size(); ++i) scope.set(names[i], items[i]);
  }
};

struct Loop {
  Target target;
  Expression items;
  std::optional<Expression> filter;
  Statement body, otherwise;
  int line = 0;

  Flow run(Scope& scope, std::string& out) const {
    const std::vector<Value> chosen = choose(scope);
    if (chosen.empty()) return otherwise(scope, out);
    for (size_t i = 0; i < chosen.size(); ++i) {
      scope.step(line);
      Scope inner(&scope);
      inner.set("loop", loop_variable(chosen, i));
      target.assign(inner, chosen[i]);
      if (body(inner, out) == Flow::kBreak) break;
    }
    return Flow::kNext;
  }

 private:
  std::vector<Value> choose(Scope& scope) const {
    std::vector<Value> all = iterate(items(scope), line);
    if (!filter) return all;
    std::vector<Value> chosen;
    for (const Value& item : all) {
      scope.step(line);
      Scope inner(&scope);
      target.assign(inner, item);
      if (truth((*filter)(inner))) chosen.push_back(item);
    }
    return chosen;
  }

  static Value loop_variable(const std::vector<Value>& items, size_t i) {
    const auto index = static_cast<int64_t>(i);
    const auto count = static_cast<int64_t>(items.size());
    Dict loop;
    loop.set("index", {index + 1});
    loop.set("index0", {index});
    loop.set("first", {i == 0});
    loop.set("last", {index + 1 == count});
    loop.set("length", {count});
    loop.set("revindex", {count - index});
    loop.set("revindex0", {count - index - 1});
    if (i > 0) loop.set("previtem", items[i - 1]);
    if (i + 1 < items.size()) loop.set("nextitem", items[i + 1]);
    return make_dict(std::move(loop));
  }
};

struct Macro {
  std::string name;
  std::vector<std::string> parameters;
  std::vector<std::optional<Expression>> defaults;
  Statement body;

  Value call(Scope& root, const Arguments& arguments) const {
    const std::vector<std::string_view> names(parameters.begin(), parameters.end());
    const auto bound = arguments.bind(name, names);
    if (root.macro_depth >= kMostMacroDepth) {
      fail_at(arguments.line,
              concat("macros may nest at most ", kMostMacroDepth, " calls; got more"));
    }
    root.step(arguments.line);
    ++root.macro_depth;
    Scope scope(&root);
    for (size_t i = 0; i < parameters.size(); ++i) {
      Value value{Undefined{parameters[i]}};
      if (bound[i]) {
        value = *bound[i];
      } else if (defaults[i]) {
        value = (*defaults[i])(scope);
      }
      scope.set(parameters[i], std::move(value));
    }
    std::string out;
    body(scope, out);
    --root.macro_depth;
    return {out};
  }
};

class TemplateParser {
 public:
  explicit TemplateParser(TokenStream& tokens) : tokens_(tokens) {}

  /// Parses statements up to a block that starts with one of `ends`, or to the end of the template
  /// when there are none.
  Statement body(const std::vector<std::string_view>& ends) {
    std::vector<Statement> statements;
    const int first_line = tokens_.line();
    if (++depth_ > kMostNesting)
      fail_at(first_line, concat("blocks may nest at most ", kMostNesting, " levels; got more"));
    while (!at_end(ends, first_line)) statements.push_back(statement());
    --depth_;
    return [statements = std::move(statements)](Scope& scope, std::string& out) {
      for (const auto& statement : statements) {
        const Flow flow = statement(scope, out);
        if (flow != Flow::kNext) return flow;
      }
      return Flow::kNext;
    };
  }

 private:
  bool at_end(const std::vector<std::string_view>& ends, int first_line) const {
    if (tokens_.at(TokenKind::kEnd)) {
      if (!ends.empty())
        fail_at(first_line,
                concat("a block must end with '", ends.back(), "'; got the end of the template"));
      return true;
    }
    if (!tokens_.at(TokenKind::kBlockBegin)) return false;
    return std::find(ends.begin(), ends.end(), tokens_.peek(1).text) != ends.end();
  }

  void expect_block_end() {
    if (!tokens_.at(TokenKind::kBlockEnd)) tokens_.refuse("the end of the tag");
    tokens_.next();
  }

  /// Takes "{% name %}".
  void closing(std::string_view name) {
    tokens_.next();
    tokens_.expect_name(name);
    expect_block_end();
  }

  Statement statement() {
    if (tokens_.at(TokenKind::kText)) {
      return [text = tokens_.next().text](Scope&, std::string& out) {
        check_text_size(out.size() + text.size());
        out += text;
        return Flow::kNext;
      };
    }
    if (tokens_.at(TokenKind::kVariableBegin)) return output();
    return block();
  }

  Statement output() {
    const int line = tokens_.next().line;
    Expression value = parse_expression(tokens_, /*allow_tuple=*/true);
    if (!tokens_.at(TokenKind::kVariableEnd)) tokens_.refuse("'}}'");
    tokens_.next();
    return [value = std::move(value), line](Scope& scope, std::string& out) {
      scope.step(line);
      const std::string text = to_text(value(scope));
      check_text_size(out.size() + text.size());
      out += text;
      return Flow::kNext;
    };
  }

  Statement block() {
    tokens_.next();
    const int line = tokens_.line();
    const std::string name = tokens_.expect_identifier();
    if (name == "for") return loop();
    if (name == "if") return condition();
    if (name == "set") return assignment();
    if (name == "macro") return macro();
    if (name == "generation") {
      expect_block_end();
      Statement inside = body({"endgeneration"});
      closing("endgeneration");
      return inside;
    }
    if (name == "break" || name == "continue") {
      if (loops_ == 0) fail_at(line, concat("'", name, "' must stand in a loop; got it outside"));
      expect_block_end();
      return [flow = name == "break" ? Flow::kBreak : Flow::kContinue](Scope&, std::string&) {
        return flow;
      };
    }
    fail_at(line,
            concat("a block must be for, if, set, macro, generation, break or continue; got '",
                   name, "'"));
  }

  Target target() {
    Target target;
    target.line = tokens_.line();
    do {
      target.names.push_back(tokens_.expect_identifier());
    } while (tokens_.take_operator(","));
    if (target.names.size() == 1 && tokens_.take_operator("."))
      target.member = tokens_.expect_identifier();
    return target;
  }

  Statement loop() {
    auto loop = std::make_shared<Loop>();
    loop->line = tokens_.line();
    loop->target = target();
    tokens_.expect_name("in");
    loop->items = parse_expression_without_if(tokens_);
    if (tokens_.take_name("if")) loop->filter = parse_expression(tokens_);
    expect_block_end();
    ++loops_;
    loop->body = body({"else", "endfor"});
    --loops_;
    loop->otherwise = [](Scope&, std::string&) { return Flow::kNext; };
    tokens_.next();
    if (tokens_.take_name("else")) {
      expect_block_end();
      loop->otherwise = body({"endfor"});
      tokens_.next();
    }
    tokens_.expect_name("endfor");
    expect_block_end();
    return [loop](Scope& scope, std::string& out) { return loop->run(scope, out); };
  }

  Statement condition() {
    std::vector<std::pair<Expression, Statement>> branches;
    bool more = true;
    bool is_else = false;
    while (more) {
      Expression test = [](Scope&) { return Value{true}; };
      if (!is_else) test = parse_expression(tokens_);
      expect_block_end();
      Statement inside = is_else ? body({"endif"}) : body({"elif", "else", "endif"});
      branches.emplace_back(std::move(test), std::move(inside));
      tokens_.next();
      is_else = tokens_.at_name("else");
      more = is_else || tokens_.at_name("elif");
      if (more) tokens_.next();
    }
    tokens_.expect_name("endif");
    expect_block_end();
    return [branches = std::move(branches)](Scope& scope, std::string& out) {
      for (const auto& [test, inside] : branches) {
        if (truth(test(scope))) return inside(scope, out);
      }
      return Flow::kNext;
    };
  }

  Statement assignment() {
    const Target place = target();
    if (tokens_.take_operator("=")) {
      Expression value = parse_expression(tokens_, /*allow_tuple=*/true);
      expect_block_end();
      return [place, value = std::move(value)](Scope& scope, std::string&) {
        scope.step(place.line);
        place.assign(scope, value(scope));
        return Flow::kNext;
      };
    }
    expect_block_end();
    Statement inside = body({"endset"});
    closing("endset");
    return [place, inside = std::move(inside)](Scope& scope, std::string&) {
      Scope inner(&scope);
      std::string text;
      inside(inner, text);
      place.assign(scope, Value{text});
      return Flow::kNext;
    };
  }

  Statement macro() {
    auto macro = std::make_shared<Macro>();
    const int line = tokens_.line();
    macro->name = tokens_.expect_identifier();
    tokens_.expect_operator("(");
    while (!tokens_.take_operator(")")) {
      if (!macro->parameters.empty()) tokens_.expect_operator(",");
      macro->parameters.push_back(tokens_.expect_identifier());
      macro->defaults.emplace_back();
      if (tokens_.take_operator("=")) macro->defaults.back() = parse_expression(tokens_);
    }
    expect_block_end();
    const int outer_loops = std::exchange(loops_, 0);
    macro->body = body({"endmacro"});
    loops_ = outer_loops;
    closing("endmacro");
    return [macro, line](Scope& scope, std::string&) {
      if (!scope.is_root())
        fail_at(line,
                concat("a macro must stand outside loops and macros; got '", macro->name, "'"));
      scope.set(macro->name,
                make_callable(macro->name, [macro, &scope](const Arguments& arguments) {
                  return macro->call(scope, arguments);
                }));
      return Flow::kNext;
    };
  }

  TokenStream& tokens_;
  int depth_ = 0;
  int loops_ = 0;
};

}  // namespace

Statement parse_template(TokenStream& tokens) {
  return TemplateParser(tokens).body({});
}

}  // namespace graft::text::jinja
