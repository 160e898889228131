#include "format_text.h"

#include <algorithm>
#include <cstdint>

namespace graft::io {
namespace {

/// Bytes of the UTF-8 sequence at `position`; 0 when it is malformed (Unicode 15, table 3-7).
size_t sequence_length(std::string_view text, size_t position) {
  const auto byte = [&](size_t i) -> uint8_t {
    return position + i < text.size() ? static_cast<uint8_t>(text[position + i]) : 0;
  };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return 1;
  size_t length = 0;
  uint8_t low = 0x80;
  uint8_t high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;   // shorter forms exist
    if (lead == 0xED) high = 0x9F;  // surrogates
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;   // shorter forms exist
    if (lead == 0xF4) high = 0x8F;  // beyond U+10FFFF
  }
  for (size_t i = 1; i < length; ++i) {
    if (byte(i) < low || byte(i) > high) return 0;
    low = 0x80;
    high = 0xBF;
  }
  return length;
}

void append_escaped(std::string& out, uint8_t byte) {
  constexpr char kDigits[] = "0123456789abcdef";
  out += "\\x";
  out += kDigits[byte >> 4];
  out += kDigits[byte & 15];
}

}  // namespace

std::string quote(std::string_view text) {
  constexpr size_t kLongest = 200;
  std::string out = "'";
  size_t position = 0;
  while (position < text.size() && position < kLongest) {
    const size_t length = sequence_length(text, position);
    const auto byte = static_cast<uint8_t>(text[position]);
    if (length == 0 || byte < 0x20 || byte == 0x7F) {
      append_escaped(out, byte);
      ++position;
    } else {
      out += text.substr(position, length);
      position += length;
    }
  }
  out += position < text.size() ? "...'" : "'";
  return out;
}

std::string quote_list(const std::vector<std::string>& names) {
  constexpr size_t kMost = 20;
  std::string out;
  for (size_t i = 0; i < std::min(names.size(), kMost); ++i) {
    out += (i == 0 ? "" : ", ") + quote(names[i]);
  }
  if (names.size() > kMost) out += " and " + std::to_string(names.size() - kMost) + " more";
  return out;
}

bool is_utf8(std::string_view text) {
  size_t position = 0;
  while (position < text.size()) {
    const size_t length = sequence_length(text, position);
    if (length == 0) return false;
    position += length;
  }
  return true;
}

}  // namespace graft::io
