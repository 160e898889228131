// Filters and tests.
#include <graft/core/error.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>

#include "examples/text/jinja_runtime.h"
#include "examples/text/jinja_text.h"

namespace graft::text::jinja {
namespace {

using Filter = Value (*)(const Value&, const Arguments&);
using Test = bool (*)(const Value&, const Arguments&);

Value trim(const Value& value, const Arguments& arguments) {
  const auto bound = arguments.bind("trim", {"chars"});
  if (!bound[0] || bound[0]->is_none())
    return {strip_text(to_text(value), std::nullopt, true, true)};
  return {strip_text(to_text(value), to_text(*bound[0]), true, true)};
}

Value tojson(const Value& value, const Arguments& arguments) {
  const auto bound = arguments.bind("tojson", {"ensure_ascii", "indent"});
  if (bound[0] && truth(*bound[0]))
    fail_at(arguments.line, "tojson must keep ensure_ascii off; got it on");
  const bool indents = bound[1] && !bound[1]->is_none();
  const int64_t indent = indents ? to_integer(*bound[1], "indent", arguments.line) : -1;
  if (indent < -1 || indent > 64)
    fail_at(arguments.line, concat("indent must be in [0, 64]; got ", indent));
  return {to_json(value, static_cast<int>(indent), arguments.line)};
}

Value length_filter(const Value& value, const Arguments& arguments) {
  arguments.bind("length", {});
  return {length(value, arguments.line)};
}

Value default_filter(const Value& value, const Arguments& arguments) {
  const auto bound = arguments.bind("default", {"default_value", "boolean"});
  const bool replaces = value.is_undefined() || (bound[1] && truth(*bound[1]) && !truth(value));
  return replaces ? bound[0].value_or(Value{std::string()}) : value;
}

template <const char* how>
Value case_filter(const Value& value, const Arguments& arguments) {
  arguments.bind(how, {});
  return {change_case(to_text(value), how, arguments.line)};
}
constexpr char kUpper[] = "upper", kLower[] = "lower", kCapitalize[] = "capitalize";

/// `item.a.b` for the attribute "a.b".
Value attribute_of(const Value& item, const std::string& path, int line) {
  Value value = item;
  for (const auto& name : split_text(path, ".", -1, false)) {
    value = value.is_undefined() ? value : get_item(value, Value{name}, line);
  }
  return value;
}

Value join(const Value& value, const Arguments& arguments) {
  const auto bound = arguments.bind("join", {"d", "attribute"});
  const std::string separator = bound[0] ? to_text(*bound[0]) : "";
  std::string out;
  bool first = true;
  for (const Value& item : iterate(value, arguments.line)) {
    out += first ? "" : separator;
    out += to_text(bound[1] ? attribute_of(item, to_text(*bound[1]), arguments.line) : item);
    check_text_size(out.size());
    first = false;
  }
  return {out};
}

Value first(const Value& value, const Arguments& arguments) {
  arguments.bind("first", {});
  const auto items = iterate(value, arguments.line);
  return items.empty() ? Value{Undefined{"the first item of nothing"}} : items.front();
}

Value last(const Value& value, const Arguments& arguments) {
  arguments.bind("last", {});
  const auto items = iterate(value, arguments.line);
  return items.empty() ? Value{Undefined{"the last item of nothing"}} : items.back();
}

Value list_filter(const Value& value, const Arguments& arguments) {
  arguments.bind("list", {});
  return make_list(iterate(value, arguments.line));
}

Value string_filter(const Value& value, const Arguments& arguments) {
  arguments.bind("string", {});
  return {to_text(value)};
}

Value int_filter(const Value& value, const Arguments& arguments) {
  const auto bound = arguments.bind("int", {"default"});
  if (const auto* real = std::get_if<double>(&value.data)) {
    if (!(std::fabs(*real) < 9e18))
      fail_at(arguments.line, "an integer must fit into 64 bits; got a larger number");
    return {static_cast<int64_t>(*real)};
  }
  if (value.is_number()) return {to_integer(value, "a number", arguments.line)};
  const std::string text = strip_text(to_text(value), std::nullopt, true, true);
  int64_t number = 0;
  const char* begin = text.data() + (text.starts_with('+') ? 1 : 0);
  const auto end = std::from_chars(begin, text.data() + text.size(), number);
  if (!text.empty() && end.ec == std::errc{} && end.ptr == text.data() + text.size())
    return {number};
  return bound[0].value_or(Value{int64_t{0}});
}

Value replace(const Value& value, const Arguments& arguments) {
  const auto bound = arguments.bind("replace", {"old", "new", "count"});
  if (!bound[0] || !bound[1])
    fail_at(arguments.line, "'replace' needs what to replace and by what; got less");
  const bool counts = bound[2] && !bound[2]->is_none();
  const int64_t count = counts ? to_integer(*bound[2], "count", arguments.line) : -1;
  return {replace_text(to_text(value), to_text(*bound[0]), to_text(*bound[1]), count)};
}

Value items(const Value& value, const Arguments& arguments) {
  if (value.is_undefined()) return make_list({});
  return call_method(value, "items", arguments);
}

Value dictsort(const Value& value, const Arguments& arguments) {
  arguments.bind("dictsort", {});
  const Value pairs = call_method(value, "items", arguments);
  std::vector<Value> sorted = pairs.list()->items;
  const auto key = [&](const Value& pair) {
    return change_case(*pair.list()->items[0].string(), "lower", arguments.line);
  };
  std::stable_sort(sorted.begin(), sorted.end(),
                   [&](const Value& a, const Value& b) { return key(a) < key(b); });
  return make_list(std::move(sorted));
}

Value reverse(const Value& value, const Arguments& arguments) {
  arguments.bind("reverse", {});
  const Value none{None{}};
  const Value sequence =
      value.string() != nullptr ? value : make_list(iterate(value, arguments.line));
  return get_slice(sequence, none, none, Value{int64_t{-1}}, arguments.line);
}

Arguments rest_of(const Arguments& arguments, size_t count) {
  Arguments rest = arguments;
  rest.positional.erase(rest.positional.begin(),
                        rest.positional.begin() +
                            static_cast<std::ptrdiff_t>(std::min(count, rest.positional.size())));
  return rest;
}

const std::string& name_argument(const Arguments& arguments, size_t index,
                                 std::string_view filter) {
  if (index >= arguments.positional.size() || arguments.positional[index].string() == nullptr) {
    fail_at(arguments.line, concat("'", filter, "' needs a name; got none"));
  }
  return *arguments.positional[index].string();
}

/// map(attribute="a", default=x) or map("filter", arguments...).
Value map_filter(const Value& value, const Arguments& arguments) {
  std::vector<Value> mapped;
  if (arguments.positional.empty()) {
    const auto bound = arguments.bind("map", {"attribute", "default"});
    if (!bound[0]) fail_at(arguments.line, "'map' needs an attribute or a filter; got none");
    for (const Value& item : iterate(value, arguments.line)) {
      const Value attribute = attribute_of(item, to_text(*bound[0]), arguments.line);
      mapped.push_back(attribute.is_undefined() && bound[1] ? *bound[1] : attribute);
    }
    return make_list(std::move(mapped));
  }
  const std::string& name = name_argument(arguments, 0, "map");
  if (!is_filter(name)) fail_at(arguments.line, concat("a filter must be known; got '", name, "'"));
  for (const Value& item : iterate(value, arguments.line))
    mapped.push_back(apply_filter(name, item, rest_of(arguments, 1)));
  return make_list(std::move(mapped));
}

/// Keeps the items for which a test has the `wanted` result; without a test their truth counts.
template <bool by_attribute, bool wanted>
Value select(const Value& value, const Arguments& arguments) {
  const size_t test_index = by_attribute ? 1 : 0;
  const std::string attribute = by_attribute ? name_argument(arguments, 0, "selectattr") : "";
  const bool has_test = arguments.positional.size() > test_index;
  const std::string test = has_test ? name_argument(arguments, test_index, "select") : "";
  if (has_test && !is_test(test))
    fail_at(arguments.line, concat("a test must be known; got '", test, "'"));
  const Arguments rest = rest_of(arguments, test_index + 1);
  std::vector<Value> chosen;
  for (const Value& item : iterate(value, arguments.line)) {
    const Value subject = by_attribute ? attribute_of(item, attribute, arguments.line) : item;
    if ((has_test ? apply_test(test, subject, rest) : truth(subject)) == wanted)
      chosen.push_back(item);
  }
  return make_list(std::move(chosen));
}

const std::map<std::string, Filter, std::less<>>& filters() {
  static const std::map<std::string, Filter, std::less<>> known = {
      {"trim", trim},
      {"tojson", tojson},
      {"length", length_filter},
      {"count", length_filter},
      {"default", default_filter},
      {"d", default_filter},
      {"upper", case_filter<kUpper>},
      {"lower", case_filter<kLower>},
      {"capitalize", case_filter<kCapitalize>},
      {"join", join},
      {"first", first},
      {"last", last},
      {"list", list_filter},
      {"string", string_filter},
      {"int", int_filter},
      {"replace", replace},
      {"items", items},
      {"dictsort", dictsort},
      {"reverse", reverse},
      {"map", map_filter},
      {"select", select<false, true>},
      {"reject", select<false, false>},
      {"selectattr", select<true, true>},
      {"rejectattr", select<true, false>},
  };
  return known;
}

bool divides(const Value& value, const Arguments& arguments) {
  const auto bound = arguments.bind("divisibleby", {"num"});
  const int64_t divisor =
      to_integer(bound[0].value_or(Value{int64_t{0}}), "a divisor", arguments.line);
  return equal(operate("%", value, Value{divisor}, arguments.line), Value{int64_t{0}});
}

Value single(const Arguments& arguments, std::string_view test) {
  const auto bound = arguments.bind(test, {"other"});
  if (!bound[0])
    fail_at(arguments.line, concat("test '", test, "' needs a value to compare with; got none"));
  return *bound[0];
}

bool is_iterable(const Value& value, const Arguments&) {
  return value.is_undefined() || value.string() != nullptr || value.list() != nullptr ||
         (value.dict() != nullptr && !value.dict()->is_namespace);
}

bool is_equal(const Value& value, const Arguments& arguments) {
  return equal(value, single(arguments, "equalto"));
}

const std::map<std::string, Test, std::less<>>& tests() {
  static const std::map<std::string, Test, std::less<>> known = {
      {"defined", [](const Value& v, const Arguments&) { return !v.is_undefined(); }},
      {"undefined", [](const Value& v, const Arguments&) { return v.is_undefined(); }},
      {"none", [](const Value& v, const Arguments&) { return v.is_none(); }},
      {"string", [](const Value& v, const Arguments&) { return v.string() != nullptr; }},
      {"mapping", [](const Value& v,
                     const Arguments&) { return v.dict() != nullptr && !v.dict()->is_namespace; }},
      {"iterable", is_iterable},
      {"sequence", is_iterable},
      {"number", [](const Value& v, const Arguments&) { return v.is_number(); }},
      {"integer", [](const Value& v, const Arguments&) { return v.is<int64_t>(); }},
      {"float", [](const Value& v, const Arguments&) { return v.is<double>(); }},
      {"boolean", [](const Value& v, const Arguments&) { return v.is<bool>(); }},
      {"true", [](const Value& v, const Arguments&) { return v.is<bool>() && truth(v); }},
      {"false", [](const Value& v, const Arguments&) { return v.is<bool>() && !truth(v); }},
      {"callable", [](const Value& v, const Arguments&) { return v.callable() != nullptr; }},
      {"odd",
       [](const Value& v, const Arguments& a) {
         return to_integer(v, "the tested value", a.line) % 2 != 0;
       }},
      {"even",
       [](const Value& v, const Arguments& a) {
         return to_integer(v, "the tested value", a.line) % 2 == 0;
       }},
      {"divisibleby", divides},
      {"eq", is_equal},
      {"equalto", is_equal},
      {"ne", [](const Value& v, const Arguments& a) { return !equal(v, single(a, "ne")); }},
      {"in",
       [](const Value& v, const Arguments& a) { return contains(single(a, "in"), v, a.line); }},
  };
  return known;
}

}  // namespace

bool is_filter(std::string_view name) {
  return filters().find(name) != filters().end();
}

Value apply_filter(const std::string& name, const Value& value, const Arguments& arguments) {
  return filters().at(name)(value, arguments);
}

bool is_test(std::string_view name) {
  return tests().find(name) != tests().end();
}

bool apply_test(const std::string& name, const Value& value, const Arguments& arguments) {
  return tests().at(name)(value, arguments);
}

}  // namespace graft::text::jinja
