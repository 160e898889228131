/// Regular expressions over UTF-8 with the meaning that Hugging Face tokenizers give them
/// (Oniguruma, Ruby syntax), run by PCRE2. The constructs that mean the same in both are
/// translated; any other is refused by name.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace graft::text {

/// A half-open range of bytes.
struct Span {
  size_t begin, end;
};

/// Finds the matches of something in valid UTF-8, from left to right and not overlapping.
using Matcher = std::function<std::vector<Span>(std::string_view)>;

/// Oniguruma syntax as PCRE2 syntax; `place` names the file and the field in errors.
/// Differences that matter: `\s` must not contain U+180E, `\w` holds marks, `\h` is a hexadecimal
/// digit, `^` and `$` are line anchors, `\p{Han}` is a script and not its extensions, `a{2}+` is
/// not possessive.
std::string translate_regex(std::string_view pattern, const std::string& place);

/// A compiled expression; immutable, shared by copies, usable from several threads.
class Regex {
 public:
  /// Compiles an expression in Oniguruma syntax; throws with `place` when it is not understood.
  Regex(std::string_view pattern, const std::string& place);

  /// All matches. An empty match directly after another match is skipped.
  std::vector<Span> operator()(std::string_view text) const;

 private:
  std::shared_ptr<const void> code_;
  std::string place_;
};

/// Finds every occurrence of `needle`; an empty needle occurs nowhere.
Matcher find_literal(std::string needle);

/// Finds every single code point for which `predicate` holds.
Matcher find_code_points(bool (*predicate)(char32_t));

}  // namespace graft::text
