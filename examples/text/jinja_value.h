/// The values of a template at run time, with Python's rules for truth, equality, order and
/// printing.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace graft::text::jinja {

/// Throws "[chat_template] message (line N)".
[[noreturn]] void fail_at(int line, const std::string& message);

struct Value;
struct Dict;
struct Callable;

/// A name or member that does not exist: prints as nothing, is false, and fails when it is worked
/// with.
struct Undefined {
  std::string name;
};

struct None {};

struct List;

/// A value. Lists are immutable once made; of the dictionaries only a namespace changes.
struct Value {
  std::variant<Undefined, None, bool, int64_t, double, std::string, std::shared_ptr<const List>,
               std::shared_ptr<Dict>, std::shared_ptr<const Callable>>
      data;

  template <class T>
  bool is() const {
    return std::holds_alternative<T>(data);
  }
  bool is_undefined() const { return is<Undefined>(); }
  bool is_none() const { return is<None>(); }
  bool is_number() const { return is<int64_t>() || is<double>() || is<bool>(); }
  const std::string* string() const { return std::get_if<std::string>(&data); }
  const List* list() const;
  Dict* dict() const;
  const Callable* callable() const;
};

struct List {
  std::vector<Value> items;
  bool is_tuple = false;
  int depth = 1;  // levels of nesting, itself included
};

struct Dict {
  std::vector<std::pair<std::string, Value>> members;  // in the order of insertion
  bool is_namespace = false;
  int depth = 1;  // levels of nesting, itself included

  const Value* find(std::string_view key) const;
  void set(const std::string& key, Value value);
};

/// The arguments of a call, a filter or a test.
struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
  int line = 0;

  /// The arguments in the order of `names`; throws when there are more, or others.
  std::vector<std::optional<Value>> bind(std::string_view function,
                                         const std::vector<std::string_view>& names) const;
};

/// A function or macro.
struct Callable {
  std::string name;
  std::function<Value(const Arguments&)> call;
};

// A hostile template can neither nest values without end nor grow text without end.
inline constexpr int kMostLevels = 200;
inline constexpr size_t kMostText = size_t{64} << 20;

/// Throws when a text that is about to be made has more than kMostText bytes.
void check_text_size(size_t bytes);

Value make_list(std::vector<Value> items, bool is_tuple = false);
Value make_dict(Dict dict);
Value make_callable(std::string name, std::function<Value(const Arguments&)> call);
Value from_json(const nlohmann::ordered_json& json);

bool truth(const Value& value);
bool equal(const Value& a, const Value& b);

/// Whether a < b; numbers and strings have an order, anything else throws.
bool less(const Value& a, const Value& b, int line);

/// Whether `item` is in a list, a string or the keys of a dictionary.
bool contains(const Value& container, const Value& item, int line);

/// Python's str(): what `{{ value }}` prints.
std::string to_text(const Value& value);

/// Python's json.dumps(ensure_ascii=False); `indent` < 0: on one line.
std::string to_json(const Value& value, int indent, int line);

/// What a for loop goes through: items, keys or characters.
std::vector<Value> iterate(const Value& value, int line);

/// Number of items, keys or characters.
int64_t length(const Value& value, int line);

/// The integer in `value`; throws with `what` when it is something else.
int64_t to_integer(const Value& value, std::string_view what, int line);

/// "string", "list"... for errors.
std::string_view kind_of(const Value& value);

/// The characters of UTF-8 text, one by one.
std::vector<std::string> characters_of(std::string_view text);

/// Python's white space: also the separators U+001C to U+001F.
bool is_python_space(char32_t c);

}  // namespace graft::text::jinja
