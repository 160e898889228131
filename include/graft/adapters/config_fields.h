/// Reading a method's fields out of a configuration, for `read_config`.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace graft::adapters {

/// Takes typed fields out of a configuration object: each is erased once it is understood, so that
/// the caller can refuse what is left. A field that is missing or null has the fallback; one of
/// another type throws, naming the method and the field.
class ConfigFields {
 public:
  /// `method` names the area of errors.
  ConfigFields(nlohmann::json& config, std::string method);

  int64_t integer(const char* key, int64_t fallback);
  std::optional<int64_t> integer(const char* key);
  double number(const char* key, double fallback);
  bool flag(const char* key, bool fallback);
  std::string text(const char* key, const std::string& fallback);
  std::vector<double> numbers(const char* key);

  /// Fields that say nothing about the method's result: they are dropped unread.
  void ignore(std::initializer_list<const char*> keys);

 private:
  nlohmann::json take(const char* key);
  [[noreturn]] void refuse(const char* key, const char* rule, const nlohmann::json& value) const;

  nlohmann::json& config_;
  std::string method_;
};

/// A whole number as an integer, any other as it is: PEFT writes `16`, not `16.0`.
nlohmann::json number_field(double value);

}  // namespace graft::adapters
