#include "gguf_header.h"

#include <graft/core/error.h>

#include <array>
#include <set>

#include "format_text.h"

namespace graft::io {
namespace {

constexpr const char* kArea = "gguf";
constexpr uint32_t kMostDimensions = 4;

struct ValueTypeTraits {
  const char* name;
  size_t size;
};

constexpr std::array<ValueTypeTraits, 13> kValueTypes{{{"uint8", 1},
                                                       {"int8", 1},
                                                       {"uint16", 2},
                                                       {"int16", 2},
                                                       {"uint32", 4},
                                                       {"int32", 4},
                                                       {"float32", 4},
                                                       {"bool", 1},
                                                       {"string", 0},
                                                       {"array", 0},
                                                       {"uint64", 8},
                                                       {"int64", 8},
                                                       {"float64", 8}}};

/// Walks over the bytes; every step is checked against the file's end.
class Cursor {
 public:
  Cursor(const std::byte* bytes, size_t size, const std::string& place)
      : begin_(bytes), next_(bytes), left_(size), place_(place) {}

  size_t position() const { return static_cast<size_t>(next_ - begin_); }
  const std::byte* here() const { return next_; }

  /// Throws unless `count` items of at least `size` bytes each can follow.
  void expect(uint64_t count, size_t size, const char* what) const {
    GRAFT_CHECK(count <= left_ / size, kArea, "the file must hold all of its ", what, "; got ",
                count, " where ", left_, " bytes are left", place_);
  }

  void skip(uint64_t count, size_t size, const char* what) {
    expect(count, size, what);
    next_ += count * size;
    left_ -= count * size;
  }

  template <class T>
  T number(const char* what) {
    const std::byte* const at = next_;
    skip(1, sizeof(T), what);
    return read_unaligned<T>(at);
  }

  std::string_view string(const char* what) {
    const std::byte* const at = next_;
    skip(number<uint64_t>(what), 1, what);
    return read_string(at);
  }

 private:
  const std::byte* begin_;
  const std::byte* next_;
  size_t left_;
  const std::string& place_;
};

/// Parses one file; the members are what every step needs.
class Parser {
 public:
  Parser(const std::byte* bytes, size_t size, const std::string& place)
      : place_(" (" + place + ")"), cursor_(bytes, size, place_) {}

  GgufHeader run() {
    const auto magic = cursor_.number<uint32_t>("magic number");
    GRAFT_CHECK(magic == 0x46554747, kArea, "a file must start with the letters GGUF; got others",
                place_);
    const auto version = cursor_.number<uint32_t>("version");
    GRAFT_CHECK(version == 2 || version == 3, kArea, "the version must be 2 or 3; got ", version,
                (version & 0xFFFF) == 0 ? ": a big-endian file" : "", place_);
    const auto tensors = cursor_.number<uint64_t>("counts");
    const auto values = cursor_.number<uint64_t>("counts");
    constexpr size_t kSmallestValue = 8 + 4 + 1;
    cursor_.expect(values, kSmallestValue, "metadata values");
    for (uint64_t i = 0; i < values; ++i) read_key_and_value();
    constexpr size_t kSmallestTensor = 8 + 4 + 4 + 8;
    cursor_.expect(tensors, kSmallestTensor, "tensor entries");
    for (uint64_t i = 0; i < tensors; ++i) read_tensor();
    header_.size = cursor_.position();
    return std::move(header_);
  }

 private:
  GgufValueType value_type(const std::string& key) {
    const auto number = cursor_.number<uint32_t>("metadata values");
    GRAFT_CHECK(number < kValueTypes.size(), kArea, "a value's type must be below ",
                kValueTypes.size(), "; got ", number, " for key ", quote(key), place_);
    return static_cast<GgufValueType>(number);
  }

  void read_key_and_value() {
    const std::string key(cursor_.string("metadata keys"));
    GRAFT_CHECK(keys_.insert(key).second, kArea, "every key must appear once; got ", quote(key),
                " twice", place_);
    GgufValue value;
    value.type = value_type(key);
    if (value.type == GgufValueType::array) {
      value.is_array = true;
      value.type = value_type(key);
      GRAFT_CHECK(value.type != GgufValueType::array, kArea,
                  "arrays of arrays are not supported; got one at key ", quote(key), place_);
      value.count = cursor_.number<uint64_t>("metadata values");
    }
    value.bytes = cursor_.here();
    skip_elements(value, key);
    header_.values.emplace_back(key, value);
  }

  void skip_elements(const GgufValue& value, const std::string& key) {
    constexpr const char* kWhat = "metadata values";
    if (value.type == GgufValueType::string) {
      cursor_.expect(value.count, sizeof(uint64_t), kWhat);
      for (uint64_t i = 0; i < value.count; ++i) cursor_.string(kWhat);
      return;
    }
    cursor_.skip(value.count, size_of(value.type), kWhat);
    if (value.type != GgufValueType::boolean) return;
    for (uint64_t i = 0; i < value.count; ++i) {
      GRAFT_CHECK(value.bytes[i] <= std::byte{1}, kArea, "a bool must be 0 or 1; got ",
                  static_cast<int>(value.bytes[i]), " at key ", quote(key), place_);
    }
  }

  void read_tensor() {
    constexpr const char* kWhat = "tensor entries";
    GgufEntry entry;
    entry.name = cursor_.string(kWhat);
    GRAFT_CHECK(names_.insert(entry.name).second, kArea, "every tensor must appear once; got ",
                quote(entry.name), " twice", place_);
    const auto dimensions = cursor_.number<uint32_t>(kWhat);
    GRAFT_CHECK(dimensions <= kMostDimensions, kArea, "a tensor has at most ", kMostDimensions,
                " dimensions; got ", dimensions, " for ", quote(entry.name), place_);
    for (uint32_t i = 0; i < dimensions; ++i) entry.dims.push_back(cursor_.number<uint64_t>(kWhat));
    const auto type = cursor_.number<uint32_t>(kWhat);
    entry.type = find_gguf_type(type);
    GRAFT_CHECK(entry.type != nullptr, kArea, "a tensor's type must be a known one; got number ",
                type, " for ", quote(entry.name), place_);
    entry.offset = cursor_.number<uint64_t>(kWhat);
    header_.tensors.push_back(std::move(entry));
  }

  const std::string place_;
  Cursor cursor_;
  GgufHeader header_;
  std::set<std::string> keys_;
  std::set<std::string> names_;
};

}  // namespace

const char* name_of(GgufValueType type) {
  return kValueTypes[static_cast<size_t>(type)].name;
}

size_t size_of(GgufValueType type) {
  return kValueTypes[static_cast<size_t>(type)].size;
}

GgufHeader parse_gguf_header(const std::byte* bytes, size_t size, const std::string& place) {
  return Parser(bytes, size, place).run();
}

}  // namespace graft::io
