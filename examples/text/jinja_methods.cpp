// Methods of strings and mappings, with Python's behaviour.
#include <graft/core/error.h>

#include <algorithm>
#include <map>

#include "examples/text/jinja_runtime.h"
#include "examples/text/jinja_text.h"

namespace graft::text::jinja {
namespace {

using Bound = std::vector<std::optional<Value>>;

const std::string& text_of(const std::optional<Value>& value, std::string_view method, int line) {
  if (!value || value->string() == nullptr) {
    fail_at(line,
            concat("'", method, "' needs a string; got ", value ? kind_of(*value) : "nothing"));
  }
  return *value->string();
}

Value strip_method(const std::string& text, const std::string& name, const Arguments& arguments) {
  const auto bound = arguments.bind(name, {"chars"});
  const bool has_set = bound[0] && !bound[0]->is_none();
  const bool left = name != "rstrip";
  const bool right = name != "lstrip";
  if (!has_set) return {strip_text(text, std::nullopt, left, right)};
  return {strip_text(text, text_of(bound[0], name, arguments.line), left, right)};
}

/// A string, or a tuple of alternatives.
Value affix_method(const std::string& text, const std::string& name, const Arguments& arguments) {
  const auto bound = arguments.bind(name, {"affix"});
  const auto matches = [&](const std::optional<Value>& affix) {
    const std::string& part = text_of(affix, name, arguments.line);
    return name == "startswith" ? text.starts_with(part) : text.ends_with(part);
  };
  if (!bound[0] || bound[0]->list() == nullptr) return {matches(bound[0])};
  const auto& alternatives = bound[0]->list()->items;
  return {std::any_of(alternatives.begin(), alternatives.end(),
                      [&](const Value& v) { return matches(v); })};
}

Value split_method(const std::string& text, const std::string& name, const Arguments& arguments) {
  const auto bound = arguments.bind(name, {"sep", "maxsplit"});
  const int64_t most = bound[1] ? to_integer(*bound[1], "maxsplit", arguments.line) : -1;
  std::vector<Value> parts;
  if (!bound[0] || bound[0]->is_none()) {
    if (most >= 0) fail_at(arguments.line, "split without separator takes no maxsplit; got one");
    for (auto& part : split_words(text)) parts.push_back({std::move(part)});
    return make_list(std::move(parts));
  }
  const std::string& separator = text_of(bound[0], name, arguments.line);
  if (separator.empty()) fail_at(arguments.line, "a separator must not be empty; got ''");
  for (auto& part : split_text(text, separator, most, /*from_right=*/name == "rsplit"))
    parts.push_back({std::move(part)});
  return make_list(std::move(parts));
}

Value replace_method(const std::string& text, const std::string& name, const Arguments& arguments) {
  const auto bound = arguments.bind(name, {"old", "new", "count"});
  const int64_t count = bound[2] ? to_integer(*bound[2], "count", arguments.line) : -1;
  return {replace_text(text, text_of(bound[0], name, arguments.line),
                       text_of(bound[1], name, arguments.line), count)};
}

Value find_method(const std::string& text, const std::string& name, const Arguments& arguments) {
  const std::string& part = text_of(arguments.bind(name, {"sub"})[0], name, arguments.line);
  const size_t at = name == "find" ? text.find(part) : text.rfind(part);
  if (at == std::string::npos) return {int64_t{-1}};
  return {static_cast<int64_t>(characters_of(std::string_view(text).substr(0, at)).size())};
}

Value count_method(const std::string& text, const std::string& name, const Arguments& arguments) {
  const std::string& part = text_of(arguments.bind(name, {"sub"})[0], name, arguments.line);
  if (part.empty()) return {static_cast<int64_t>(characters_of(text).size()) + 1};
  return {static_cast<int64_t>(split_text(text, part, -1, false).size()) - 1};
}

Value case_method(const std::string& text, const std::string& name, const Arguments& arguments) {
  arguments.bind(name, {});
  return {change_case(text, name, arguments.line)};
}

Value join_method(const std::string& text, const std::string& name, const Arguments& arguments) {
  const auto bound = arguments.bind(name, {"iterable"});
  std::string out;
  bool first = true;
  for (const Value& item : iterate(bound[0].value_or(Value{None{}}), arguments.line)) {
    out += concat(first ? "" : text, text_of(item, name, arguments.line));
    check_text_size(out.size());
    first = false;
  }
  return {out};
}

Value remove_affix_method(const std::string& text, const std::string& name,
                          const Arguments& arguments) {
  const std::string& part = text_of(arguments.bind(name, {"affix"})[0], name, arguments.line);
  if (name == "removeprefix") return {text.starts_with(part) ? text.substr(part.size()) : text};
  return {text.ends_with(part) ? text.substr(0, text.size() - part.size()) : text};
}

using StringMethod = Value (*)(const std::string&, const std::string&, const Arguments&);

const std::map<std::string, StringMethod, std::less<>>& string_methods() {
  static const std::map<std::string, StringMethod, std::less<>> methods = {
      {"strip", strip_method},
      {"lstrip", strip_method},
      {"rstrip", strip_method},
      {"startswith", affix_method},
      {"endswith", affix_method},
      {"split", split_method},
      {"rsplit", split_method},
      {"replace", replace_method},
      {"find", find_method},
      {"rfind", find_method},
      {"count", count_method},
      {"upper", case_method},
      {"lower", case_method},
      {"title", case_method},
      {"capitalize", case_method},
      {"join", join_method},
      {"removeprefix", remove_affix_method},
      {"removesuffix", remove_affix_method},
  };
  return methods;
}

Value dict_method(const Dict& dict, const std::string& name, const Arguments& arguments) {
  if (name == "get") {
    const auto bound = arguments.bind(name, {"key", "default"});
    const Value* found = dict.find(text_of(bound[0], name, arguments.line));
    return found != nullptr ? *found : bound[1].value_or(Value{None{}});
  }
  arguments.bind(name, {});
  std::vector<Value> items;
  for (const auto& [key, value] : dict.members) {
    if (name == "items") items.push_back(make_list({Value{key}, value}, /*is_tuple=*/true));
    if (name == "keys") items.push_back({key});
    if (name == "values") items.push_back(value);
  }
  return make_list(std::move(items));
}

}  // namespace

Value call_method(const Value& object, const std::string& name, const Arguments& arguments) {
  if (const auto* text = object.string()) {
    const auto method = string_methods().find(name);
    if (method != string_methods().end()) return method->second(*text, name, arguments);
  }
  if (const auto* dict = object.dict(); dict != nullptr && !dict->is_namespace) {
    if (name == "get" || name == "items" || name == "keys" || name == "values")
      return dict_method(*dict, name, arguments);
  }
  if (const auto* undefined = std::get_if<Undefined>(&object.data)) {
    fail_at(arguments.line,
            concat("'", undefined->name, "' is undefined; got method '", name, "' asked of it"));
  }
  fail_at(arguments.line, concat("a method must be known; got '", name, "' of ", kind_of(object)));
}

}  // namespace graft::text::jinja
