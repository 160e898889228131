#include "safetensors_header.h"

#include <graft/core/error.h>

#include <array>
#include <nlohmann/json.hpp>
#include <set>

#include "format_text.h"

namespace graft::io {
namespace {

constexpr const char* kArea = "safetensors";

constexpr std::array kTypes{
    SafetensorsType{"BOOL", 8, at::kBool, 0},
    SafetensorsType{"F4", 4, at::ScalarType::Undefined, 1},
    SafetensorsType{"F6_E2M3", 6, at::ScalarType::Undefined, 2},
    SafetensorsType{"F6_E3M2", 6, at::ScalarType::Undefined, 3},
    SafetensorsType{"U8", 8, at::kByte, 4},
    SafetensorsType{"I8", 8, at::kChar, 5},
    SafetensorsType{"F8_E5M2", 8, at::kFloat8_e5m2, 6},
    SafetensorsType{"F8_E4M3", 8, at::kFloat8_e4m3fn, 7},
    SafetensorsType{"F8_E8M0", 8, at::kFloat8_e8m0fnu, 8},
    SafetensorsType{"F8_E4M3FNUZ", 8, at::kFloat8_e4m3fnuz, 9},
    SafetensorsType{"F8_E5M2FNUZ", 8, at::kFloat8_e5m2fnuz, 10},
    SafetensorsType{"I16", 16, at::kShort, 11},
    SafetensorsType{"U16", 16, at::kUInt16, 12},
    SafetensorsType{"F16", 16, at::kHalf, 13},
    SafetensorsType{"BF16", 16, at::kBFloat16, 14},
    SafetensorsType{"I32", 32, at::kInt, 15},
    SafetensorsType{"U32", 32, at::kUInt32, 16},
    SafetensorsType{"F32", 32, at::kFloat, 17},
    SafetensorsType{"C64", 64, at::kComplexFloat, 18},
    SafetensorsType{"F64", 64, at::kDouble, 19},
    SafetensorsType{"I64", 64, at::kLong, 20},
    SafetensorsType{"U64", 64, at::kUInt64, 21},
};

/// Follows the JSON event by event, so that nesting and repetition are refused where they appear
/// and a hostile header never becomes a tree in memory.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(const std::string& place) : place_(place) {}

  SafetensorsHeader take() { return std::move(header_); }

  bool null() override { refuse("null"); }
  bool boolean(bool) override { refuse("a bool"); }
  bool number_integer(number_integer_t value) override { refuse(std::to_string(value)); }
  bool number_float(number_float_t, const string_t& text) override { refuse(quote(text)); }
  bool binary(binary_t&) override { refuse("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (where_ != Where::shape && where_ != Where::offsets) refuse(std::to_string(value));
    auto& list = where_ == Where::shape ? entry().shape : entry().offsets;
    const size_t most = where_ == Where::shape ? kMostDimensions : 2;
    GRAFT_CHECK(list.size() < most, kArea, "a tensor has at most ", kMostDimensions,
                " dimensions and two data_offsets; got more for ", quote(entry().name), place_);
    list.push_back(value);
    return true;
  }

  bool string(string_t& value) override {
    if (where_ == Where::metadata) {
      header_.metadata[key_] = value;
    } else if (where_ == Where::entry && key_ == "dtype") {
      entry().type = value;
    } else {
      refuse(quote(value));
    }
    return true;
  }

  bool start_object(size_t) override {
    if (where_ == Where::document) {
      where_ = Where::top;
    } else if (where_ == Where::top && key_ == "__metadata__") {
      where_ = Where::metadata;
    } else if (where_ == Where::top) {
      header_.entries.push_back({.name = key_, .type = {}, .shape = {}, .offsets = {}});
      where_ = Where::entry;
    } else {
      refuse("an object");
    }
    inner_keys_.clear();
    return true;
  }

  bool key(string_t& key) override {
    auto& known = where_ == Where::top ? names_ : inner_keys_;
    GRAFT_CHECK(known.insert(key).second, kArea, "a name must appear once in the header; got ",
                quote(key), " twice", place_);
    if (where_ == Where::entry) {
      GRAFT_CHECK(key == "dtype" || key == "shape" || key == "data_offsets", kArea,
                  "a tensor's keys must be dtype, shape and data_offsets; got ", quote(key),
                  " for ", quote(entry().name), place_);
    }
    key_ = key;
    return true;
  }

  bool end_object() override {
    if (where_ == Where::entry) {
      GRAFT_CHECK(inner_keys_.size() == 3 && entry().offsets.size() == 2, kArea,
                  "a tensor must have dtype, shape and two data_offsets; got fewer for ",
                  quote(entry().name), place_);
    }
    where_ = Where::top;
    return true;
  }

  bool start_array(size_t) override {
    if (where_ != Where::entry || key_ == "dtype") refuse("an array");
    where_ = key_ == "shape" ? Where::shape : Where::offsets;
    return true;
  }

  bool end_array() override {
    where_ = Where::entry;
    return true;
  }

  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    fail(kArea,
         concat("the header must be UTF-8 JSON; got an error at its byte ", position, place_));
  }

 private:
  enum class Where { document, top, metadata, entry, shape, offsets };
  static constexpr size_t kMostDimensions = 64;

  SafetensorsEntry& entry() { return header_.entries.back(); }

  [[noreturn]] void refuse(const std::string& value) {
    fail(kArea, concat("the header must map names to {dtype: string, shape: [sizes], data_offsets: "
                       "[begin, end]} and __metadata__ to strings; got ",
                       value, " at key ", quote(key_), place_));
  }

  const std::string place_;
  SafetensorsHeader header_;
  Where where_ = Where::document;
  std::string key_;
  std::set<std::string> names_;
  std::set<std::string> inner_keys_;
};

}  // namespace

const SafetensorsType* find_safetensors_type(std::string_view name) {
  for (const SafetensorsType& type : kTypes) {
    if (type.name == name) return &type;
  }
  return nullptr;
}

const SafetensorsType* find_safetensors_type(at::ScalarType dtype) {
  for (const SafetensorsType& type : kTypes) {
    if (type.dtype == dtype && dtype != at::ScalarType::Undefined) return &type;
  }
  return nullptr;
}

SafetensorsHeader parse_safetensors_header(std::string_view json, const std::string& place) {
  const std::string where = " (" + place + ")";
  // The parser takes a zero byte for the end of the text.
  GRAFT_CHECK(json.find('\0') == std::string_view::npos, kArea,
              "the header must be UTF-8 JSON; got a zero byte", where);
  HeaderReader reader(where);
  nlohmann::json::sax_parse(json.begin(), json.end(), &reader);
  return reader.take();
}

}  // namespace graft::io
