/// UTF-8 and the Unicode properties that tokenizers ask for. Text positions are byte offsets
/// throughout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace graft::text {

/// The offset of the first byte that is not part of valid UTF-8, or `std::string_view::npos`.
/// Valid: shortest form, no surrogates, at most U+10FFFF (RFC 3629).
size_t find_invalid_utf8(std::string_view text);

/// Copies `text` with every maximal invalid part replaced by one U+FFFD (Unicode 15, section 3.9,
/// "U+FFFD Substitution").
std::string replace_invalid_utf8(std::string_view text);

/// Bytes of the code point that starts with `lead`; `lead` must start a valid sequence.
inline size_t utf8_length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

/// The code point that starts at `position` of valid UTF-8.
char32_t code_point_at(std::string_view text, size_t position);

/// Where the code point that ends at `position` (> 0) of valid UTF-8 begins.
inline size_t previous_position(std::string_view text, size_t position) {
  do {
    --position;
  } while (position > 0 && (static_cast<unsigned char>(text[position]) & 0xC0) == 0x80);
  return position;
}

/// The code point that ends just before `position` (> 0) of valid UTF-8.
inline char32_t code_point_before(std::string_view text, size_t position) {
  return code_point_at(text, previous_position(text, position));
}

/// Appends one code point as UTF-8.
void append_utf8(std::string& text, char32_t code_point);

/// The four normalisation forms of Unicode Annex 15.
enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

/// `text` in a normal form, under the data of Unicode 9: that is what Hugging Face's normalizers
/// carry, so that marks which came later are neither reordered nor taken apart.
std::string to_normal_form(std::string_view text, NormalForm form);

/// `text` with every code point replaced by its lowercase mapping, without regard to its
/// neighbours.
std::string to_lowercase(std::string_view text);

bool is_whitespace(char32_t c);   ///< Property White_Space.
bool is_number(char32_t c);       ///< General category N (Nd, Nl, No).
bool is_mark(char32_t c);         ///< General category M (Mn, Mc, Me), again under Unicode 9.
bool is_punctuation(char32_t c);  ///< General category P, or any of the ASCII symbols.
bool is_word(
    char32_t c);  ///< Alphabetic, mark, decimal digit, connector or join control: `\w` of Annex 18.

}  // namespace graft::text
