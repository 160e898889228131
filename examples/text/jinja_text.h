/// Python's operations on strings, as methods and filters share them. Text is valid UTF-8.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace graft::text::jinja {

/// Removes the characters of `set`, or white space, from the ends.
std::string strip_text(std::string_view text, const std::optional<std::string>& set, bool left,
                       bool right);

/// The parts between separators; `most` >= 0 bounds the number of cuts, counted from the left or
/// the right.
std::vector<std::string> split_text(std::string_view text, std::string_view separator, int64_t most,
                                    bool from_right);

/// The parts between runs of white space.
std::vector<std::string> split_words(std::string_view text);

/// Replaces `from`, at most `count` times unless `count` < 0; an empty `from` stands before every
/// character.
std::string replace_text(std::string_view text, std::string_view from, std::string_view to,
                         int64_t count);

/// "upper", "lower", "title" or "capitalize". A character whose other case is several characters is
/// refused.
std::string change_case(std::string_view text, std::string_view how, int line);

}  // namespace graft::text::jinja
