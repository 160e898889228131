// The header of a safetensors file: the format's types, and its JSON as a list of entries.
#pragma once

#include <graft/io/tensor_info.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace graft::io {

/// The format's limit for the JSON part, in bytes.
inline constexpr uint64_t kLongestHeader = 100'000'000;

/// One element type of the format.
struct SafetensorsType {
  std::string_view name;
  int bits;
  at::ScalarType dtype;  ///< Undefined where ATen has none
  /// Writers place tensors of a higher rank first; ranks follow the reference's list of types.
  int rank;
};

/// The type of that name; null when there is none.
const SafetensorsType* find_safetensors_type(std::string_view name);
/// The type that stores `dtype`; null when there is none.
const SafetensorsType* find_safetensors_type(at::ScalarType dtype);

/// One tensor as the header states it; nothing but the JSON's form is checked.
struct SafetensorsEntry {
  std::string name;
  std::string type;
  std::vector<uint64_t> shape;
  std::vector<uint64_t> offsets;  ///< begin and end, counted from the first byte after the header
};

struct SafetensorsHeader {
  std::map<std::string, std::string> metadata;
  std::vector<SafetensorsEntry> entries;
};

/// Parses the JSON. Throws Error("[safetensors] ... (place)") for anything that the format does not
/// allow: other keys or types of values, duplicate names, more than 64 dimensions, bytes that are
/// not UTF-8.
SafetensorsHeader parse_safetensors_header(std::string_view json, const std::string& place);

}  // namespace graft::io
