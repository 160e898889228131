#include "examples/text/json_node.h"

#include <graft/core/error.h>

#include <algorithm>
#include <fstream>
#include <sstream>

namespace graft::text {
namespace {

/// The deepest nesting of brackets outside strings.
int nesting_of(std::string_view json) {
  int depth = 0;
  int deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      deepest = std::max(deepest, ++depth);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return deepest;
}

}  // namespace

void JsonNode::refuse(const std::string& rule) const {
  std::string got = value_->dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (got.size() > 80) got = got.substr(0, 77) + "...";
  fail("tokenizer", concat(rule, "; got ", got, " (", place_, ")"));
}

void JsonNode::allow_only(std::initializer_list<std::string_view> keys) const {
  if (!value_->is_object()) refuse("must be an object");
  for (const auto& [key, member] : value_->items()) {
    if (std::find(keys.begin(), keys.end(), key) == keys.end()) {
      JsonNode(member, concat(place_, ".", key)).refuse(concat("unknown option '", key, "'"));
    }
  }
}

JsonNode JsonNode::at(std::string_view key) const {
  if (!value_->is_object()) refuse("must be an object");
  const auto member = value_->find(std::string(key));
  if (member == value_->end()) refuse(concat("must have a member '", key, "'"));
  return JsonNode(*member, concat(place_, ".", key));
}

std::optional<JsonNode> JsonNode::find(std::string_view key) const {
  if (!value_->is_object()) refuse("must be an object");
  const auto member = value_->find(std::string(key));
  if (member == value_->end() || member->is_null()) return std::nullopt;
  return JsonNode(*member, concat(place_, ".", key));
}

std::vector<JsonNode> JsonNode::items() const {
  if (!value_->is_array()) refuse("must be an array");
  std::vector<JsonNode> nodes;
  nodes.reserve(value_->size());
  for (size_t i = 0; i < value_->size(); ++i)
    nodes.emplace_back((*value_)[i], concat(place_, "[", i, "]"));
  return nodes;
}

const std::string& JsonNode::string() const {
  if (!value_->is_string()) refuse("must be a string");
  return value_->get_ref<const std::string&>();
}

bool JsonNode::boolean() const {
  if (!value_->is_boolean()) refuse("must be true or false");
  return value_->get<bool>();
}

int64_t JsonNode::integer() const {
  const bool fits = value_->is_number_integer() && (!value_->is_number_unsigned() ||
                                                    value_->get<uint64_t>() <= uint64_t{INT64_MAX});
  if (!fits) refuse("must be an integer");
  return value_->get<int64_t>();
}

bool JsonNode::boolean_or(std::string_view key, bool fallback) const {
  const auto member = find(key);
  return member ? member->boolean() : fallback;
}

std::string JsonNode::string_or(std::string_view key, std::string_view fallback) const {
  const auto member = find(key);
  return member ? member->string() : std::string(fallback);
}

std::string read_text_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  GRAFT_CHECK(file && content << file.rdbuf(), "tokenizer",
              "file must be readable and not empty; got ", path);
  return std::move(content).str();
}

nlohmann::json read_json_file(const std::string& path) {
  const std::string text = read_text_file(path);
  // Components are read by recursion, which a file must not be able to drive into the ground.
  GRAFT_CHECK(nesting_of(text) <= 100, "tokenizer", "JSON must nest at most 100 levels; got more (",
              path, ")");
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception& error) {
    fail("tokenizer", concat("file must be JSON; got: ", error.what(), " (", path, ")"));
  }
}

}  // namespace graft::text
