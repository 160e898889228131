// The header of a GGUF file as views into its bytes: nothing is copied, so no count in the file can
// cost memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "gguf_types.h"

namespace graft::io {

/// The types of metadata values, by their number in the file.
enum class GgufValueType : uint32_t {
  uint8,
  int8,
  uint16,
  int16,
  uint32,
  int32,
  float32,
  boolean,
  string,
  array,
  uint64,
  int64,
  float64
};

/// "uint8", "string"...
const char* name_of(GgufValueType type);
/// Bytes of a number or bool; 0 for strings and arrays.
size_t size_of(GgufValueType type);

/// One value: `count` elements (1 unless `is_array`) from `bytes` on, checked to lie within the
/// file.
struct GgufValue {
  bool is_array = false;
  GgufValueType type = GgufValueType::uint8;
  uint64_t count = 1;
  const std::byte* bytes = nullptr;
};

struct GgufEntry {
  std::string name;
  const GgufType* type = nullptr;
  std::vector<uint64_t> dims;  ///< fastest first, as in the file
  uint64_t offset = 0;         ///< from the start of the data
};

struct GgufHeader {
  std::vector<std::pair<std::string, GgufValue>> values;
  std::vector<GgufEntry> tensors;
  size_t size = 0;  ///< bytes before the padding that precedes the data
};

/// Reads the number at `bytes`, which need not be aligned.
template <class T>
T read_unaligned(const std::byte* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

/// The string at `bytes` (8 bytes of length, then the text), whose extent was checked.
inline std::string_view read_string(const std::byte* bytes) {
  return {reinterpret_cast<const char*>(bytes) + 8, read_unaligned<uint64_t>(bytes)};
}

/// Parses the header; throws Error("[gguf] ... (place)") for anything that leaves the file or the
/// format.
GgufHeader parse_gguf_header(const std::byte* bytes, size_t size, const std::string& place);

}  // namespace graft::io
