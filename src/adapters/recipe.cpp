#include <graft/adapters/recipe.h>
#include <graft/core/error.h>
#include <graft/core/random.h>

#include <algorithm>
#include <deque>
#include <nlohmann/json.hpp>

namespace graft::adapters {

std::vector<MethodEntry> builtin_methods();  // src/moe/builtin.cpp

namespace {

// A deque: entries keep their place while methods are added.
std::deque<MethodEntry>& methods() {
  static std::deque<MethodEntry> list = [] {
    std::deque<MethodEntry> built_in;
    for (auto& entry : builtin_methods()) built_in.push_back(std::move(entry));
    return built_in;
  }();
  return list;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

uint64_t LayerContext::layer_seed() const {
  return seed * 0x9E3779B97F4A7C15u ^ random::hash_name(name);
}

void register_method(MethodEntry entry) {
  for (const auto& known : methods())
    GRAFT_CHECK(known.name != entry.name, "methods", "a method's name must be new; got '",
                entry.name, "' again");
  methods().push_back(std::move(entry));
}

const MethodEntry& find_method(std::string_view name) {
  for (const auto& entry : methods())
    if (entry.name == name) return entry;
  fail("methods", concat("method must be one of ", joined(method_names()), "; got '", name, "'"));
}

bool is_dora(const nlohmann::json& config) {
  const auto it = config.find("use_dora");
  return it != config.end() && it->is_boolean() && it->get<bool>();
}

const MethodEntry& method_of_config(const nlohmann::json& config) {
  const auto type = config.find("peft_type");
  GRAFT_CHECK(type != config.end() && type->is_string(), "adapter config",
              "the field peft_type must be a name; got ",
              type == config.end() ? "nothing" : type->dump());
  std::vector<std::string> types;
  for (const auto& entry : methods()) {
    if (entry.peft_type == type->get<std::string>() && (!entry.claims || entry.claims(config)))
      return entry;
    if (std::find(types.begin(), types.end(), entry.peft_type) == types.end())
      types.push_back(entry.peft_type);
  }
  std::string detail = type->get<std::string>();
  if (is_dora(config)) detail += " with use_dora=true";
  fail("adapter config",
       "peft_type must be a method that graft has (" + joined(types) + "); got " + detail);
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const auto& entry : methods()) names.push_back(entry.name);
  return names;
}

}  // namespace graft::adapters
