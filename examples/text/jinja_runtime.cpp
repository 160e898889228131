#include "examples/text/jinja_runtime.h"

#include <graft/core/error.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace graft::text::jinja {
namespace {

constexpr int64_t kMostSteps = 2'000'000;

[[noreturn]] void fail_overflow(int line) {
  fail_at(line, "an integer must fit into 64 bits; got a larger one");
}

int64_t operate_integers(std::string_view symbol, int64_t a, int64_t b, int line) {
  int64_t result = 0;
  if (symbol == "+"   ? __builtin_add_overflow(a, b, &result)
      : symbol == "-" ? __builtin_sub_overflow(a, b, &result)
                      : symbol == "*" && __builtin_mul_overflow(a, b, &result)) {
    fail_overflow(line);
  }
  if (symbol != "//" && symbol != "%") return result;
  if (b == 0) fail_at(line, "a divisor must not be zero; got 0");
  if (b == -1) {
    if (symbol == "%") return 0;
    if (__builtin_sub_overflow(int64_t{0}, a, &result)) fail_overflow(line);
    return result;
  }
  const int64_t remainder = a % b;
  const bool rounds_down =
      remainder != 0 && (remainder < 0) != (b < 0);  // towards minus infinity, as in Python
  if (symbol == "%") return rounds_down ? remainder + b : remainder;
  return a / b - (rounds_down ? 1 : 0);
}

int64_t power(int64_t base, int64_t exponent, int line) {
  int64_t result = 1;
  // No base but -1, 0 and 1 has a 64-bit power beyond 63.
  if (exponent > 64 && base >= -1 && base <= 1) exponent = 64 + exponent % 2;
  for (int64_t i = 0; i < exponent; ++i) {
    if (__builtin_mul_overflow(result, base, &result)) fail_overflow(line);
  }
  return result;
}

double to_double(const Value& value) {
  if (const auto* real = std::get_if<double>(&value.data)) return *real;
  return static_cast<double>(to_integer(value, "a number", 0));
}

Value operate_numbers(std::string_view symbol, const Value& left, const Value& right, int line) {
  const bool integers = !left.is<double>() && !right.is<double>();
  if (integers && symbol == "**") {
    const int64_t exponent = to_integer(right, "an exponent", line);
    if (exponent >= 0) return {power(to_integer(left, "a base", line), exponent, line)};
  }
  if (integers && symbol != "/" && symbol != "**") {
    return {operate_integers(symbol, to_integer(left, "a number", line),
                             to_integer(right, "a number", line), line)};
  }
  const double a = to_double(left);
  const double b = to_double(right);
  if ((symbol == "/" || symbol == "//" || symbol == "%") && b == 0)
    fail_at(line, "a divisor must not be zero; got 0");
  if (symbol == "+") return {a + b};
  if (symbol == "-") return {a - b};
  if (symbol == "*") return {a * b};
  if (symbol == "/") return {a / b};
  if (symbol == "//") return {std::floor(a / b)};
  if (symbol == "%") return {a - b * std::floor(a / b)};
  return {std::pow(a, b)};
}

Value repeat(const std::string& text, int64_t count) {
  std::string out;
  if (count <= 0 || text.empty()) return {out};
  check_text_size(static_cast<size_t>(count) > kMostText
                      ? kMostText + 1
                      : text.size() * static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) out += text;
  return {out};
}

Value join_text(const std::string& left, const std::string& right) {
  check_text_size(left.size() + right.size());
  return {left + right};
}

Value join_lists(const List& left, const List& right, int line) {
  if (left.items.size() + right.items.size() > size_t{1} << 20)
    fail_at(line, "a list must stay below a million items");
  std::vector<Value> items = left.items;
  items.insert(items.end(), right.items.begin(), right.items.end());
  return make_list(std::move(items), left.is_tuple);
}

/// Python's slice.indices(): the positions of start:stop:step in something of `size` items.
std::vector<size_t> slice_positions(int64_t size, const Value& start, const Value& stop,
                                    const Value& step, int line) {
  const int64_t stride = step.is_none() ? 1 : to_integer(step, "a slice's step", line);
  if (stride == 0) fail_at(line, "a slice's step must not be zero; got 0");
  const int64_t lowest = stride > 0 ? 0 : -1;
  const int64_t highest = stride > 0 ? size : size - 1;
  const auto bound = [&](const Value& value, int64_t fallback) {
    if (value.is_none()) return fallback;
    int64_t position = to_integer(value, "a slice's bound", line);
    if (position < 0) position = std::max(position, -size - 1) + size;
    return std::clamp(position, lowest, std::max(lowest, highest));
  };
  const int64_t first = bound(start, stride > 0 ? lowest : highest);
  const int64_t end = bound(stop, stride > 0 ? highest : lowest);
  std::vector<size_t> positions;
  for (int64_t i = first; stride > 0 ? i < end : i > end;) {
    positions.push_back(static_cast<size_t>(i));
    if (__builtin_add_overflow(i, stride, &i)) break;
  }
  return positions;
}

constexpr std::array<std::string_view, 8> kDictMethods = {
    "items", "keys", "values", "get", "pop", "update", "copy", "setdefault"};

}  // namespace

Value Scope::get(const std::string& name) const {
  for (const Scope* scope = this; scope != nullptr; scope = scope->parent_) {
    const auto found = scope->names_.find(name);
    if (found != scope->names_.end()) return found->second;
  }
  return {Undefined{name}};
}

void Scope::step(int line) {
  if (++root_->steps_ > kMostSteps)
    fail_at(line, concat("a template may take at most ", kMostSteps, " steps; got more"));
}

Token TokenStream::next() {
  Token token = peek();
  if (at_ + 1 < tokens_.size()) ++at_;
  return token;
}

bool TokenStream::take_operator(std::string_view text) {
  const bool taken = at_operator(text);
  if (taken) next();
  return taken;
}

bool TokenStream::take_name(std::string_view text) {
  const bool taken = at_name(text);
  if (taken) next();
  return taken;
}

void TokenStream::expect_operator(std::string_view text) {
  if (!take_operator(text)) refuse(concat("'", text, "'"));
}

void TokenStream::expect_name(std::string_view text) {
  if (!take_name(text)) refuse(concat("'", text, "'"));
}

std::string TokenStream::expect_identifier() {
  if (!at(TokenKind::kName)) refuse("a name");
  return next().text;
}

void TokenStream::refuse(std::string_view expected) const {
  const Token& token = peek();
  constexpr std::string_view kNames[] = {"text",
                                         "",
                                         "string ",
                                         "",
                                         "",
                                         "",
                                         "'{{'",
                                         "'}}'",
                                         "'{%'",
                                         "the end of the tag",
                                         "the end of the template"};
  const std::string_view name = kNames[static_cast<size_t>(token.kind)];
  const bool shows_text = token.kind >= TokenKind::kName && token.kind <= TokenKind::kOperator;
  fail_at(token.line, concat("expected ", expected, "; got ", name,
                             shows_text ? concat("'", token.text, "'") : ""));
}

Value get_member(const Value& object, const std::string& name, int line) {
  if (const auto* undefined = std::get_if<Undefined>(&object.data)) {
    fail_at(line,
            concat("'", undefined->name, "' is undefined; got member '", name, "' asked of it"));
  }
  const auto* dict = object.dict();
  if (dict == nullptr) return {Undefined{name}};
  const bool shadowed = !dict->is_namespace && std::find(kDictMethods.begin(), kDictMethods.end(),
                                                         name) != kDictMethods.end();
  if (shadowed) fail_at(line, concat("a method must be called; got '", name, "' without ()"));
  const Value* member = dict->find(name);
  return member == nullptr ? Value{Undefined{name}} : *member;
}

Value get_item(const Value& object, const Value& index, int line) {
  if (const auto* undefined = std::get_if<Undefined>(&object.data)) {
    fail_at(line, concat("'", undefined->name, "' is undefined; got an item asked of it"));
  }
  if (const auto* key = index.string()) {
    const auto* dict = object.dict();
    const Value* member = dict == nullptr ? nullptr : dict->find(*key);
    return member == nullptr ? Value{Undefined{*key}} : *member;
  }
  if (object.list() == nullptr && object.string() == nullptr) return {Undefined{to_text(index)}};
  const auto items = object.string() != nullptr ? iterate(object, line) : object.list()->items;
  const auto size = static_cast<int64_t>(items.size());
  int64_t position = to_integer(index, "an index", line);
  if (position < 0) position += size;
  if (position < 0 || position >= size) return {Undefined{concat("item ", to_text(index))}};
  return items[static_cast<size_t>(position)];
}

Value get_slice(const Value& object, const Value& start, const Value& stop, const Value& step,
                int line) {
  if (object.list() == nullptr && object.string() == nullptr) {
    fail_at(line, concat("only a list or a string can be sliced; got ", kind_of(object)));
  }
  const auto items = iterate(object, line);
  std::vector<Value> chosen;
  for (const size_t i :
       slice_positions(static_cast<int64_t>(items.size()), start, stop, step, line)) {
    chosen.push_back(items[i]);
  }
  if (const auto* list = object.list()) return make_list(std::move(chosen), list->is_tuple);
  std::string text;
  for (const Value& character : chosen) text += *character.string();
  return {text};
}

Value operate(std::string_view symbol, const Value& left, const Value& right, int line) {
  if (symbol == "==") return {equal(left, right)};
  if (symbol == "!=") return {!equal(left, right)};
  if (symbol == "~") return join_text(to_text(left), to_text(right));
  if (symbol == "in") return {contains(right, left, line)};
  for (const Value* side : {&left, &right}) {
    const auto* undefined = std::get_if<Undefined>(&side->data);
    if (undefined != nullptr)
      fail_at(line, concat("'", undefined->name, "' is undefined; got it beside '", symbol, "'"));
  }
  if (symbol == "<") return {less(left, right, line)};
  if (symbol == ">") return {less(right, left, line)};
  if (symbol == "<=") return {less(left, right, line) || equal(left, right)};
  if (symbol == ">=") return {less(right, left, line) || equal(left, right)};
  if (left.is_number() && right.is_number()) return operate_numbers(symbol, left, right, line);
  if (symbol == "+" && left.string() != nullptr && right.string() != nullptr) {
    return join_text(*left.string(), *right.string());
  }
  if (symbol == "+" && left.list() != nullptr && right.list() != nullptr &&
      left.list()->is_tuple == right.list()->is_tuple) {
    return join_lists(*left.list(), *right.list(), line);
  }
  if (symbol == "*" && left.string() != nullptr && right.is<int64_t>()) {
    return repeat(*left.string(), std::get<int64_t>(right.data));
  }
  if (symbol == "*" && right.string() != nullptr && left.is<int64_t>()) {
    return repeat(*right.string(), std::get<int64_t>(left.data));
  }
  fail_at(line, concat("operator '", symbol, "' must fit its operands; got ", kind_of(left),
                       " and ", kind_of(right)));
}

}  // namespace graft::text::jinja
