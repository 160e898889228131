/// Strict reading of a JSON document: every access knows where it stands in the file, so that
/// errors can say it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace graft::text {

/// A value inside a parsed document that outlives it, with its place, e.g. "tokenizer.json:
/// model.merges[3]".
class JsonNode {
 public:
  JsonNode(const nlohmann::json& value, std::string place)
      : value_(&value), place_(std::move(place)) {}

  const nlohmann::json& value() const { return *value_; }
  const std::string& place() const { return place_; }

  /// Throws "rule; got value (place)".
  [[noreturn]] void refuse(const std::string& rule) const;

  /// Throws unless every key of this object is listed.
  void allow_only(std::initializer_list<std::string_view> keys) const;

  JsonNode at(std::string_view key) const;  ///< The member; throws when absent.
  std::optional<JsonNode> find(
      std::string_view key) const;      ///< The member; nothing when absent or null.
  std::vector<JsonNode> items() const;  ///< The elements; throws unless this is an array.

  const std::string& string() const;
  bool boolean() const;
  int64_t integer() const;

  /// The "type" of a component.
  const std::string& type() const { return at("type").string(); }

  bool boolean_or(std::string_view key, bool fallback) const;
  std::string string_or(std::string_view key, std::string_view fallback) const;

 private:
  const nlohmann::json* value_;
  std::string place_;
};

/// Parses a file; throws with its name when it cannot be read or is not JSON.
nlohmann::json read_json_file(const std::string& path);

/// A whole file as bytes; throws with its name when it cannot be read.
std::string read_text_file(const std::string& path);

}  // namespace graft::text
