#include "examples/text/byte_level.h"

#include <array>

#include "examples/text/unicode.h"

namespace graft::text {
namespace {

struct Alphabet {
  std::array<std::string, 256> character;
  std::array<int, 512> byte;  // by code point; -1: not in the alphabet

  Alphabet() {
    byte.fill(-1);
    char32_t next = 0x100;
    for (int value = 0; value < 256; ++value) {
      const bool prints = (value >= 0x21 && value <= 0x7E) || (value >= 0xA1 && value != 0xAD);
      const char32_t c = prints ? static_cast<char32_t>(value) : next++;
      append_utf8(character[static_cast<size_t>(value)], c);
      byte[c] = value;
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

}  // namespace

std::string_view byte_level_character(unsigned char byte) {
  return alphabet().character[byte];
}

std::string to_byte_level(std::string_view bytes) {
  std::string token;
  token.reserve(bytes.size() + bytes.size() / 4);
  for (const char byte : bytes) token += byte_level_character(static_cast<unsigned char>(byte));
  return token;
}

std::optional<std::string> from_byte_level(std::string_view token) {
  std::string bytes;
  for (size_t at = 0; at < token.size(); at += utf8_length(token[at])) {
    const char32_t c = code_point_at(token, at);
    if (c >= alphabet().byte.size() || alphabet().byte[c] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(alphabet().byte[c]));
  }
  return bytes;
}

}  // namespace graft::text
