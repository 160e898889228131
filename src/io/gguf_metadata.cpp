#include <graft/core/error.h>
#include <graft/io/gguf.h>

#include <limits>
#include <utility>

#include "format_text.h"
#include "gguf_contents.h"

namespace graft::io {
namespace {

constexpr const char* kArea = "gguf";

/// Holds every integer of 64 bits, with or without sign.
using Integer = __int128;

bool is_integer(GgufValueType type) {
  using enum GgufValueType;
  return type != float32 && type != float64 && type != boolean && type != string && type != array;
}

Integer read_integer(GgufValueType type, const std::byte* bytes) {
  using enum GgufValueType;
  switch (type) {
    case int8:
      return read_unaligned<int8_t>(bytes);
    case int16:
      return read_unaligned<int16_t>(bytes);
    case uint16:
      return read_unaligned<uint16_t>(bytes);
    case int32:
      return read_unaligned<int32_t>(bytes);
    case uint32:
      return read_unaligned<uint32_t>(bytes);
    case int64:
      return read_unaligned<int64_t>(bytes);
    case uint64:
      return read_unaligned<uint64_t>(bytes);
    default:
      return read_unaligned<uint8_t>(bytes);
  }
}

double read_float(GgufValueType type, const std::byte* bytes) {
  return type == GgufValueType::float32 ? read_unaligned<float>(bytes)
                                        : read_unaligned<double>(bytes);
}

/// Throws unless the value is an array or not, as `array` says, of a type that `fits`.
void check_type(const GgufValue& value, bool array, bool fits, const char* expected,
                const std::string& key, const std::string& place) {
  GRAFT_CHECK(value.is_array == array && fits, kArea, "key ", quote(key), " must hold ",
              array ? "an array of " : "", expected, "; got ", value.is_array ? "an array of " : "",
              name_of(value.type), place);
}

bool is_float(GgufValueType type) {
  return type == GgufValueType::float32 || type == GgufValueType::float64;
}

/// The integer as a T; throws when it does not fit.
template <class T>
T narrow(Integer value, const std::string& key, const std::string& place) {
  const bool fits =
      value >= std::numeric_limits<T>::min() && value <= std::numeric_limits<T>::max();
  GRAFT_CHECK(fits, kArea, "key ", quote(key), " must hold an integer from ",
              std::numeric_limits<T>::min(), " to ", std::numeric_limits<T>::max(), "; got ",
              value < 0 ? std::to_string(static_cast<int64_t>(value))
                        : std::to_string(static_cast<uint64_t>(value)),
              place);
  return static_cast<T>(value);
}

}  // namespace

const GgufValue& GgufFile::Contents::value(const std::string& key) const {
  const auto found = values.find(key);
  GRAFT_CHECK(found != values.end(), kArea, "no metadata of that key; got ", quote(key), place());
  return found->second;
}

const std::vector<std::string>& GgufFile::keys() const {
  return contents_->keys;
}

bool GgufFile::has_key(const std::string& key) const {
  return contents_->values.contains(key);
}

std::string GgufFile::get_string(const std::string& key) const {
  const GgufValue& value = contents_->value(key);
  check_type(value, false, value.type == GgufValueType::string, "a string", key,
             contents_->place());
  return std::string(read_string(value.bytes));
}

uint64_t GgufFile::get_uint(const std::string& key) const {
  const GgufValue& value = contents_->value(key);
  check_type(value, false, is_integer(value.type), "an integer", key, contents_->place());
  return narrow<uint64_t>(read_integer(value.type, value.bytes), key, contents_->place());
}

int64_t GgufFile::get_int(const std::string& key) const {
  const GgufValue& value = contents_->value(key);
  check_type(value, false, is_integer(value.type), "an integer", key, contents_->place());
  return narrow<int64_t>(read_integer(value.type, value.bytes), key, contents_->place());
}

double GgufFile::get_float(const std::string& key) const {
  const GgufValue& value = contents_->value(key);
  check_type(value, false, is_float(value.type), "a float", key, contents_->place());
  return read_float(value.type, value.bytes);
}

bool GgufFile::get_bool(const std::string& key) const {
  const GgufValue& value = contents_->value(key);
  check_type(value, false, value.type == GgufValueType::boolean, "a bool", key, contents_->place());
  return *value.bytes != std::byte{0};
}

std::vector<std::string> GgufFile::get_string_array(const std::string& key) const {
  const GgufValue& value = contents_->value(key);
  check_type(value, true, value.type == GgufValueType::string, "strings", key, contents_->place());
  std::vector<std::string> out;
  out.reserve(value.count);
  const std::byte* next = value.bytes;
  for (uint64_t i = 0; i < value.count; ++i) {
    const std::string_view text = read_string(next);
    out.emplace_back(text);
    next += sizeof(uint64_t) + text.size();
  }
  return out;
}

std::vector<double> GgufFile::get_float_array(const std::string& key) const {
  const GgufValue& value = contents_->value(key);
  check_type(value, true, is_float(value.type), "floats", key, contents_->place());
  std::vector<double> out;
  out.reserve(value.count);
  for (uint64_t i = 0; i < value.count; ++i) {
    out.push_back(read_float(value.type, value.bytes + i * size_of(value.type)));
  }
  return out;
}

std::vector<int64_t> GgufFile::get_int_array(const std::string& key) const {
  const GgufValue& value = contents_->value(key);
  const bool fits = is_integer(value.type) || value.type == GgufValueType::boolean;
  check_type(value, true, fits, "integers", key, contents_->place());
  const std::string place = contents_->place();
  std::vector<int64_t> out;
  out.reserve(value.count);
  for (uint64_t i = 0; i < value.count; ++i) {
    const std::byte* const element = value.bytes + i * size_of(value.type);
    out.push_back(narrow<int64_t>(read_integer(value.type, element), key, place));
  }
  return out;
}

// Each find_ form is its getter behind the question whether the key exists.
std::optional<std::string> GgufFile::find_string(const std::string& key) const {
  return has_key(key) ? std::optional(get_string(key)) : std::nullopt;
}

std::optional<uint64_t> GgufFile::find_uint(const std::string& key) const {
  return has_key(key) ? std::optional(get_uint(key)) : std::nullopt;
}

std::optional<int64_t> GgufFile::find_int(const std::string& key) const {
  return has_key(key) ? std::optional(get_int(key)) : std::nullopt;
}

std::optional<double> GgufFile::find_float(const std::string& key) const {
  return has_key(key) ? std::optional(get_float(key)) : std::nullopt;
}

std::optional<bool> GgufFile::find_bool(const std::string& key) const {
  return has_key(key) ? std::optional(get_bool(key)) : std::nullopt;
}

std::optional<std::vector<std::string>> GgufFile::find_string_array(const std::string& key) const {
  return has_key(key) ? std::optional(get_string_array(key)) : std::nullopt;
}

std::optional<std::vector<double>> GgufFile::find_float_array(const std::string& key) const {
  return has_key(key) ? std::optional(get_float_array(key)) : std::nullopt;
}

std::optional<std::vector<int64_t>> GgufFile::find_int_array(const std::string& key) const {
  return has_key(key) ? std::optional(get_int_array(key)) : std::nullopt;
}

}  // namespace graft::io
