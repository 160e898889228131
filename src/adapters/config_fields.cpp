#include <graft/adapters/config_fields.h>
#include <graft/core/error.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace graft::adapters {

using nlohmann::json;

ConfigFields::ConfigFields(json& config, std::string method)
    : config_(config), method_(std::move(method)) {}

json ConfigFields::take(const char* key) {
  const auto it = config_.find(key);
  if (it == config_.end()) return nullptr;
  json value = std::move(*it);
  config_.erase(it);
  return value;
}

void ConfigFields::refuse(const char* key, const char* rule, const json& value) const {
  fail(method_, concat("option '", key, "' must be ", rule, "; got ", value.dump()));
}

std::optional<int64_t> ConfigFields::integer(const char* key) {
  const json value = take(key);
  if (value.is_null()) return std::nullopt;
  if (!value.is_number_integer()) refuse(key, "a whole number", value);
  return value.get<int64_t>();
}

int64_t ConfigFields::integer(const char* key, int64_t fallback) {
  return integer(key).value_or(fallback);
}

double ConfigFields::number(const char* key, double fallback) {
  const json value = take(key);
  if (value.is_null()) return fallback;
  if (!value.is_number()) refuse(key, "a number", value);
  return value.get<double>();
}

bool ConfigFields::flag(const char* key, bool fallback) {
  const json value = take(key);
  if (value.is_null()) return fallback;
  if (!value.is_boolean()) refuse(key, "true or false", value);
  return value.get<bool>();
}

std::string ConfigFields::text(const char* key, const std::string& fallback) {
  const json value = take(key);
  if (value.is_null()) return fallback;
  if (!value.is_string()) refuse(key, "a string", value);
  return value.get<std::string>();
}

std::vector<double> ConfigFields::numbers(const char* key) {
  const json value = take(key);
  if (value.is_null()) return {};
  const bool sound = value.is_array() && std::all_of(value.begin(), value.end(),
                                                     [](const json& v) { return v.is_number(); });
  if (!sound) refuse(key, "a list of numbers", value);
  return value.get<std::vector<double>>();
}

void ConfigFields::ignore(std::initializer_list<const char*> keys) {
  for (const char* key : keys) config_.erase(key);
}

json number_field(double value) {
  const bool whole = value == std::floor(value) && std::abs(value) < 1e15;
  return whole ? json(static_cast<int64_t>(value)) : json(value);
}

}  // namespace graft::adapters
