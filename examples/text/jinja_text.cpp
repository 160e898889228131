#include "examples/text/jinja_text.h"

#include <graft/core/error.h>
#include <utf8proc.h>

#include <algorithm>

#include "examples/text/jinja_value.h"
#include "examples/text/unicode.h"

namespace graft::text::jinja {
namespace {

/// Beyond ASCII the title case is asked of the library, one character for one character.
char32_t to_upper(char32_t c, int line) {
  // ß, ŉ, ǰ, the Greek letters with iota, ligatures and Armenian: their upper case is a sequence.
  const bool is_sequence = c == 0xDF || c == 0x149 || c == 0x1F0 || c == 0x390 || c == 0x3B0 ||
                           c == 0x587 || (c >= 0x1E96 && c <= 0x1E9A) ||
                           (c >= 0x1F50 && c <= 0x1FFC) || (c >= 0xFB00 && c <= 0xFB17);
  if (is_sequence) {
    std::string character;
    append_utf8(character, c);
    fail_at(line, concat("upper case must be one character for one; got '", character, "'"));
  }
  return static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c)));
}

}  // namespace

std::string strip_text(std::string_view text, const std::optional<std::string>& set, bool left,
                       bool right) {
  const auto characters = set ? characters_of(*set) : std::vector<std::string>();
  const auto goes = [&](size_t position) {
    if (!set) return is_python_space(code_point_at(text, position));
    const std::string_view character = text.substr(position, utf8_length(text[position]));
    return std::find(characters.begin(), characters.end(), character) != characters.end();
  };
  while (left && !text.empty() && goes(0)) text.remove_prefix(utf8_length(text[0]));
  while (right && !text.empty() && goes(previous_position(text, text.size()))) {
    text = text.substr(0, previous_position(text, text.size()));
  }
  return std::string(text);
}

std::vector<std::string> split_text(std::string_view text, std::string_view separator, int64_t most,
                                    bool from_right) {
  std::vector<std::string> parts;
  while (most < 0 || static_cast<int64_t>(parts.size()) < most) {
    const size_t at = from_right ? text.rfind(separator) : text.find(separator);
    if (at == std::string_view::npos) break;
    const size_t after = at + separator.size();
    parts.emplace_back(from_right ? text.substr(after) : text.substr(0, at));
    text = from_right ? text.substr(0, at) : text.substr(after);
  }
  parts.emplace_back(text);
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string> split_words(std::string_view text) {
  std::vector<std::string> words;
  std::string word;
  for (const auto& character : characters_of(text)) {
    if (!is_python_space(code_point_at(character, 0))) {
      word += character;
    } else if (!word.empty()) {
      words.push_back(std::exchange(word, ""));
    }
  }
  if (!word.empty()) words.push_back(word);
  return words;
}

std::string replace_text(std::string_view text, std::string_view from, std::string_view to,
                         int64_t count) {
  std::string out;
  size_t done = 0;
  size_t at = 0;
  while (count != 0 && at <= text.size() && (at = text.find(from, at)) != std::string_view::npos) {
    out.append(text.substr(done, at - done)).append(to);
    check_text_size(out.size());
    done = at + from.size();
    at = done;
    if (from.empty()) at += at < text.size() ? utf8_length(text[at]) : 1;
    --count;
  }
  return out.append(text.substr(std::min(done, text.size())));
}

std::string change_case(std::string_view text, std::string_view how, int line) {
  std::string out;
  bool starts_word = true;
  for (size_t at = 0; at < text.size(); at += utf8_length(text[at])) {
    const char32_t c = code_point_at(text, at);
    const bool raise = how == "upper" || (starts_word && how != "lower");
    if (raise) {
      append_utf8(out, to_upper(c, line));
    } else {
      out += to_lowercase(text.substr(at, utf8_length(text[at])));
    }
    const int kind = utf8proc_category(static_cast<utf8proc_int32_t>(c));
    const bool is_cased = kind >= UTF8PROC_CATEGORY_LU && kind <= UTF8PROC_CATEGORY_LT;
    starts_word = how == "title" && !is_cased;
  }
  return out;
}

}  // namespace graft::text::jinja
