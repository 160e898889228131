#include "examples/text/jinja_value.h"

#include <graft/core/error.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "examples/text/unicode.h"

namespace graft::text::jinja {
namespace {

std::optional<double> as_number(const Value& value) {
  if (const auto* flag = std::get_if<bool>(&value.data)) return *flag ? 1.0 : 0.0;
  if (const auto* integer = std::get_if<int64_t>(&value.data)) return static_cast<double>(*integer);
  if (const auto* real = std::get_if<double>(&value.data)) return *real;
  return std::nullopt;
}

/// One level more than `value` has; throws when that is too deep.
int level_above(const Value& value) {
  const auto* list = value.list();
  const auto* dict = value.dict();
  const int level = 1 + (list != nullptr ? list->depth : dict != nullptr ? dict->depth : 0);
  GRAFT_CHECK(level <= kMostLevels, "chat_template", "values may nest at most ", kMostLevels,
              " levels; got more");
  return level;
}

bool equal_lists(const List& a, const List& b) {
  return a.is_tuple == b.is_tuple &&
         std::equal(a.items.begin(), a.items.end(), b.items.begin(), b.items.end(), equal);
}

bool equal_dicts(const Dict& a, const Dict& b) {
  if (a.members.size() != b.members.size()) return false;
  return std::all_of(a.members.begin(), a.members.end(), [&](const auto& member) {
    const Value* other = b.find(member.first);
    return other != nullptr && equal(member.second, *other);
  });
}

}  // namespace

void fail_at(int line, const std::string& message) {
  fail("chat_template", concat(message, " (line ", line, ")"));
}

const List* Value::list() const {
  const auto* held = std::get_if<std::shared_ptr<const List>>(&data);
  return held == nullptr ? nullptr : held->get();
}

Dict* Value::dict() const {
  const auto* held = std::get_if<std::shared_ptr<Dict>>(&data);
  return held == nullptr ? nullptr : held->get();
}

const Callable* Value::callable() const {
  const auto* held = std::get_if<std::shared_ptr<const Callable>>(&data);
  return held == nullptr ? nullptr : held->get();
}

const Value* Dict::find(std::string_view key) const {
  for (const auto& [name, value] : members) {
    if (name == key) return &value;
  }
  return nullptr;
}

void Dict::set(const std::string& key, Value value) {
  depth = std::max(depth, level_above(value));
  for (auto& [name, old] : members) {
    if (name != key) continue;
    old = std::move(value);
    return;
  }
  members.emplace_back(key, std::move(value));
}

std::vector<std::optional<Value>> Arguments::bind(
    std::string_view function, const std::vector<std::string_view>& names) const {
  if (positional.size() > names.size()) {
    fail_at(line, concat("'", function, "' takes at most ", names.size(), " arguments; got ",
                         positional.size()));
  }
  std::vector<std::optional<Value>> bound(names.size());
  std::copy(positional.begin(), positional.end(), bound.begin());
  for (const auto& [name, value] : named) {
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end())
      fail_at(line, concat("'", function, "' has no argument of that name; got '", name, "'"));
    auto& slot = bound[static_cast<size_t>(found - names.begin())];
    if (slot)
      fail_at(line, concat("'", function, "' takes an argument once; got '", name, "' twice"));
    slot = value;
  }
  return bound;
}

void check_text_size(size_t bytes) {
  GRAFT_CHECK(bytes <= kMostText, "chat_template", "text must have at most ", kMostText,
              " bytes; got ", bytes);
}

Value make_list(std::vector<Value> items, bool is_tuple) {
  List list{std::move(items), is_tuple};
  for (const Value& item : list.items) list.depth = std::max(list.depth, level_above(item));
  return {std::make_shared<const List>(std::move(list))};
}

Value make_dict(Dict dict) {
  for (const auto& [key, member] : dict.members)
    dict.depth = std::max(dict.depth, level_above(member));
  return {std::make_shared<Dict>(std::move(dict))};
}

Value make_callable(std::string name, std::function<Value(const Arguments&)> call) {
  return {std::make_shared<const Callable>(Callable{std::move(name), std::move(call)})};
}

Value from_json(const nlohmann::ordered_json& json) {
  switch (json.type()) {
    case nlohmann::ordered_json::value_t::null:
      return {None{}};
    case nlohmann::ordered_json::value_t::boolean:
      return {json.get<bool>()};
    case nlohmann::ordered_json::value_t::number_integer:
    case nlohmann::ordered_json::value_t::number_unsigned:
      return {json.get<int64_t>()};
    case nlohmann::ordered_json::value_t::number_float:
      return {json.get<double>()};
    case nlohmann::ordered_json::value_t::string:
      return {json.get<std::string>()};
    case nlohmann::ordered_json::value_t::array: {
      std::vector<Value> items;
      for (const auto& item : json) items.push_back(from_json(item));
      return make_list(std::move(items));
    }
    case nlohmann::ordered_json::value_t::object: {
      Dict dict;
      for (const auto& [key, member] : json.items())
        dict.members.emplace_back(key, from_json(member));
      return make_dict(std::move(dict));
    }
    default:
      fail("chat_template", concat("a message may hold JSON values only; got ", json.type_name()));
  }
}

bool truth(const Value& value) {
  if (const auto number = as_number(value)) return *number != 0;
  if (const auto* text = value.string()) return !text->empty();
  if (const auto* list = value.list()) return !list->items.empty();
  if (const auto* dict = value.dict()) return dict->is_namespace || !dict->members.empty();
  return value.callable() != nullptr;
}

bool equal(const Value& a, const Value& b) {
  const auto* left = std::get_if<int64_t>(&a.data);
  const auto* right = std::get_if<int64_t>(&b.data);
  if (left != nullptr && right != nullptr) return *left == *right;
  const auto first = as_number(a);
  const auto second = as_number(b);
  if (first && second) return *first == *second;
  if (a.data.index() != b.data.index()) return false;
  if (const auto* text = a.string()) return *text == *b.string();
  if (const auto* list = a.list()) return equal_lists(*list, *b.list());
  if (const auto* dict = a.dict()) {
    const bool by_identity = dict->is_namespace || b.dict()->is_namespace;
    return by_identity ? dict == b.dict() : equal_dicts(*dict, *b.dict());
  }
  if (const auto* function = a.callable()) return function == b.callable();
  return a.is_none() || a.is_undefined();
}

bool less(const Value& a, const Value& b, int line) {
  const auto first = as_number(a);
  const auto second = as_number(b);
  if (first && second) return *first < *second;
  if (a.string() != nullptr && b.string() != nullptr) return *a.string() < *b.string();
  fail_at(line,
          concat("only numbers or strings have an order; got ", kind_of(a), " and ", kind_of(b)));
}

bool contains(const Value& container, const Value& item, int line) {
  if (const auto* text = container.string()) {
    if (item.string() == nullptr)
      fail_at(line, concat("only a string is in a string; got ", kind_of(item)));
    return text->find(*item.string()) != std::string::npos;
  }
  if (const auto* dict = container.dict())
    return item.string() != nullptr && dict->find(*item.string()) != nullptr;
  const auto items = iterate(container, line);
  return std::any_of(items.begin(), items.end(),
                     [&](const Value& other) { return equal(other, item); });
}

std::vector<Value> iterate(const Value& value, int line) {
  if (value.is_undefined()) return {};
  if (const auto* list = value.list()) return list->items;
  std::vector<Value> items;
  if (const auto* text = value.string()) {
    for (auto& character : characters_of(*text)) items.push_back({std::move(character)});
    return items;
  }
  const auto* dict = value.dict();
  if (dict == nullptr || dict->is_namespace)
    fail_at(line, concat("must be something to go through; got ", kind_of(value)));
  for (const auto& [key, member] : dict->members) items.push_back({key});
  return items;
}

int64_t length(const Value& value, int line) {
  if (const auto* list = value.list()) return static_cast<int64_t>(list->items.size());
  if (const auto* dict = value.dict(); dict != nullptr && !dict->is_namespace) {
    return static_cast<int64_t>(dict->members.size());
  }
  if (value.string() == nullptr && !value.is_undefined()) {
    fail_at(line, concat("must be something that has a length; got ", kind_of(value)));
  }
  return static_cast<int64_t>(iterate(value, line).size());
}

int64_t to_integer(const Value& value, std::string_view what, int line) {
  if (const auto* integer = std::get_if<int64_t>(&value.data)) return *integer;
  if (const auto* flag = std::get_if<bool>(&value.data)) return *flag ? 1 : 0;
  fail_at(line, concat(what, " must be an integer; got ", kind_of(value)));
}

std::string_view kind_of(const Value& value) {
  constexpr std::string_view kNames[] = {
      "an undefined value", "none",   "a boolean", "an integer", "a float",
      "a string",           "a list", "a mapping", "a function"};
  return kNames[value.data.index()];
}

std::vector<std::string> characters_of(std::string_view text) {
  std::vector<std::string> characters;
  for (size_t at = 0; at < text.size();) {
    const size_t length = utf8_length(text[at]);
    characters.emplace_back(text.substr(at, length));
    at += length;
  }
  return characters;
}

bool is_python_space(char32_t c) {
  return is_whitespace(c) || (c >= 0x1C && c <= 0x1F);
}

}  // namespace graft::text::jinja
