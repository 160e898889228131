/// The alphabet of byte-level tokenizers: one printable character for every byte (Radford et al.
/// 2019, GPT-2). Bytes that print in Latin-1 stand for themselves, the other 68 are U+0100 and up,
/// in order: a space is U+0120 'Ġ'.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace graft::text {

/// The character that stands for `byte`, as UTF-8.
std::string_view byte_level_character(unsigned char byte);

/// `bytes` written in the alphabet.
std::string to_byte_level(std::string_view bytes);

/// The bytes that `token` (valid UTF-8) stands for; nothing when it holds a character outside the
/// alphabet.
std::optional<std::string> from_byte_level(std::string_view token);

}  // namespace graft::text
