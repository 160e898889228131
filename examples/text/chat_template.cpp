#include "examples/text/chat_template.h"

#include <graft/core/error.h>

#include <nlohmann/json.hpp>

#include "examples/text/jinja_runtime.h"

namespace graft::text {
namespace {

using jinja::Arguments;
using jinja::Value;

Value make_namespace(const Arguments& arguments) {
  jinja::Dict dict;
  dict.is_namespace = true;
  if (!arguments.positional.empty())
    jinja::fail_at(arguments.line, "namespace() takes named values; got others");
  for (const auto& [name, value] : arguments.named) dict.set(name, value);
  return make_dict(std::move(dict));
}

Value make_dict_from_names(const Arguments& arguments) {
  jinja::Dict dict;
  if (!arguments.positional.empty())
    jinja::fail_at(arguments.line, "dict() takes named values; got others");
  for (const auto& [name, value] : arguments.named) dict.set(name, value);
  return make_dict(std::move(dict));
}

Value make_range(const Arguments& arguments) {
  const auto bound = arguments.bind("range", {"start", "stop", "step"});
  const auto integer = [&](size_t i, int64_t fallback) {
    return bound[i] ? jinja::to_integer(*bound[i], "a bound of range()", arguments.line) : fallback;
  };
  const bool one = !bound[1];
  const int64_t start = one ? 0 : integer(0, 0);
  const int64_t stop = one ? integer(0, 0) : integer(1, 0);
  const int64_t step = integer(2, 1);
  if (step == 0) jinja::fail_at(arguments.line, "the step of range() must not be zero; got 0");
  std::vector<Value> items;
  for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
    if (items.size() >= 100000)
      jinja::fail_at(arguments.line, "range() must stay below 100000 items; got more");
    items.push_back(Value{i});
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  return make_list(std::move(items));
}

void add_functions(jinja::Scope& scope) {
  const auto add = [&](const std::string& name, std::function<Value(const Arguments&)> call) {
    scope.set(name, make_callable(name, std::move(call)));
  };
  add("namespace", make_namespace);
  add("dict", make_dict_from_names);
  add("range", make_range);
  add("raise_exception", [](const Arguments& arguments) -> Value {
    const auto bound = arguments.bind("raise_exception", {"message"});
    jinja::fail_at(arguments.line, concat("the template refuses the messages; got: ",
                                          bound[0] ? to_text(*bound[0]) : ""));
  });
  add("strftime_now", [](const Arguments& arguments) -> Value {
    jinja::fail_at(arguments.line,
                   "the date must be given as a variable; got a call of strftime_now()");
  });
}

}  // namespace

std::string render_chat_template(const std::string& chat_template,
                                 const nlohmann::ordered_json& messages, const ChatOptions& options,
                                 const nlohmann::ordered_json& variables) {
  GRAFT_CHECK(messages.is_array(), "chat_template", "messages must be an array; got ",
              messages.type_name());
  GRAFT_CHECK(variables.is_object() || variables.is_null(), "chat_template",
              "variables must be an object; got ", variables.type_name());
  jinja::TokenStream tokens(jinja::tokenize(chat_template));
  const jinja::Statement statement = jinja::parse_template(tokens);
  jinja::Scope globals;
  add_functions(globals);
  globals.set("messages", jinja::from_json(messages));
  globals.set("add_generation_prompt", {options.add_generation_prompt});
  if (!options.bos_token.empty()) globals.set("bos_token", {options.bos_token});
  if (!options.eos_token.empty()) globals.set("eos_token", {options.eos_token});
  // transformers always names these two, as none when they are not given.
  globals.set("tools", {jinja::None{}});
  globals.set("documents", {jinja::None{}});
  for (const auto& [name, value] : variables.items()) globals.set(name, jinja::from_json(value));
  std::string out;
  statement(globals, out);
  return out;
}

std::string render_chat_template(const std::string& chat_template,
                                 const nlohmann::ordered_json& messages,
                                 const ChatOptions& options) {
  return render_chat_template(chat_template, messages, options, nlohmann::ordered_json());
}

}  // namespace graft::text
