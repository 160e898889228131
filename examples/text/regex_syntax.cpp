#include <graft/core/error.h>

#include <algorithm>
#include <array>

#include "examples/text/regex.h"
#include "examples/text/unicode.h"

namespace graft::text {
namespace {

constexpr std::array kCategories = {"L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc",
                                    "Me", "N",  "Nd", "Nl", "No", "P",  "Pc", "Pd", "Ps",
                                    "Pe", "Pi", "Pf", "Po", "S",  "Sm", "Sc", "Sk", "So",
                                    "Z",  "Zs", "Zl", "Zp", "C",  "Cc", "Cf", "Cn", "Co"};
constexpr std::array kScripts = {
    "Arabic",   "Armenian", "Bengali", "Cyrillic", "Devanagari", "Georgian",  "Greek",
    "Gujarati", "Gurmukhi", "Han",     "Hangul",   "Hebrew",     "Hiragana",  "Kannada",
    "Katakana", "Khmer",    "Lao",     "Latin",    "Malayalam",  "Mongolian", "Myanmar",
    "Sinhala",  "Tamil",    "Telugu",  "Thai",     "Tibetan"};
constexpr std::string_view kWord =
    R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{B2}\x{B3}\x{B9}\x{BC}-\x{BE})";

/// Walks through the pattern once and writes the translation beside it.
class Translator {
 public:
  Translator(std::string_view pattern, const std::string& place)
      : pattern_(pattern), place_(place) {}

  std::string run() {
    while (at_ < pattern_.size()) item();
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(std::string_view what) const {
    fail("tokenizer",
         concat("a regular expression may only use constructs that are known here; got ", what,
                " at byte ", at_, " of \"", pattern_, "\" (", place_, ")"));
  }

  bool next_is(std::string_view text) const { return pattern_.substr(at_, text.size()) == text; }

  bool take(std::string_view text) {
    if (!next_is(text)) return false;
    at_ += text.size();
    return true;
  }

  void copy(size_t count) {
    out_ += pattern_.substr(at_, count);
    at_ += count;
  }

  void item() {
    switch (pattern_[at_]) {
      case '\\':
        return escape(/*in_class=*/false);
      case '[':
        return character_class();
      case '(':
        return group();
      case '{':
        return counted_repeat();
      case '^':
        ++at_;
        out_ += "(?m:^)";
        return;
      case '$':
        ++at_;
        out_ += "(?m:$)";
        return;
      default:
        copy(utf8_length(pattern_[at_]));
    }
  }

  void group() {
    for (const std::string_view opening : {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"}) {
      if (next_is(opening)) return copy(opening.size());
    }
    if (next_is("(?")) refuse(concat("group \"", pattern_.substr(at_, 4), "\""));
    if (next_is("(*")) refuse("group \"(*\"");
    copy(1);
  }

  void counted_repeat() {
    const size_t close = pattern_.find('}', at_);
    const std::string_view inside =
        close == std::string_view::npos ? "" : pattern_.substr(at_ + 1, close - at_ - 1);
    const bool counts = !inside.empty() &&
                        inside.find_first_not_of("0123456789,") == std::string_view::npos &&
                        inside.front() != ',' && std::count(inside.begin(), inside.end(), ',') <= 1;
    if (!counts) refuse("a brace that is no {n}, {n,} or {n,m}");
    copy(inside.size() + 2);
    if (next_is("+")) refuse("a possessive counted repeat");
  }

  void character_class() {
    copy(1);
    if (next_is("^")) copy(1);
    if (next_is("]")) refuse("an empty character class");
    while (!next_is("]")) {
      if (at_ >= pattern_.size()) refuse("a character class without end");
      if (next_is("[")) refuse("a nested character class");
      if (next_is("&&")) refuse("an intersection of character classes");
      if (next_is("\\")) {
        escape(/*in_class=*/true);
      } else {
        copy(utf8_length(pattern_[at_]));
      }
    }
    copy(1);
  }

  void write_set(std::string_view members, bool negated, bool in_class) {
    if (in_class && negated) refuse("a negated set inside a character class");
    out_ += in_class ? "" : negated ? "[^" : "[";
    out_ += members;
    out_ += in_class ? "" : "]";
  }

  void escape(bool in_class) {
    if (at_ + 1 >= pattern_.size()) refuse("a trailing backslash");
    const char letter = pattern_[at_ + 1];
    switch (letter) {
      case 's':
      case 'S':
        if (in_class && letter == 'S') {
          out_ += "\\P{White_Space}";
        } else {
          write_set("\\p{White_Space}", letter == 'S', in_class);
        }
        break;
      case 'w':
      case 'W':
        write_set(kWord, letter == 'W', in_class);
        break;
      case 'h':
      case 'H':
        write_set("0-9a-fA-F", letter == 'H', in_class);
        break;
      case 'd':
      case 'D':
      case 'r':
      case 'n':
      case 't':
      case 'f':
        out_ += pattern_.substr(at_, 2);
        break;
      case 'v':
        out_ += "\\x0b";
        break;
      case 'p':
      case 'P':
        return property();
      case 'x':
      case 'u':
        return hexadecimal();
      case 'A':
      case 'z':
      case 'Z':
        if (in_class) refuse(concat("\\", letter, " in a character class"));
        out_ += pattern_.substr(at_, 2);
        break;
      default:
        literal_escape(letter);
    }
    at_ += 2;
  }

  void literal_escape(char letter) {
    const auto byte = static_cast<unsigned char>(letter);
    if (byte >= 0x80 || is_word(byte)) refuse(concat("\\", letter));
    out_ += pattern_.substr(at_, 2);
  }

  void property() {
    const bool negated = pattern_[at_ + 1] == 'P';
    const size_t close = pattern_.find('}', at_);
    if (at_ + 2 >= pattern_.size() || pattern_[at_ + 2] != '{' || close == std::string_view::npos) {
      refuse("\\p without {name}");
    }
    std::string_view name = pattern_.substr(at_ + 3, close - at_ - 3);
    const bool inverted = !name.empty() && name.front() == '^';
    if (inverted) name.remove_prefix(1);
    const bool is_category =
        std::find(kCategories.begin(), kCategories.end(), name) != kCategories.end();
    const bool is_script = std::find(kScripts.begin(), kScripts.end(), name) != kScripts.end();
    if (!is_category && !is_script) refuse(concat("property \\p{", name, "}"));
    out_ += concat(negated != inverted ? "\\P{" : "\\p{", is_script ? "sc:" : "", name, "}");
    at_ = close + 1;
  }

  /// \xHH, \x{H...} and \uHHHH.
  void hexadecimal() {
    const bool braces = pattern_.substr(at_, 3) == "\\x{";
    const size_t begin = at_ + (braces ? 3 : 2);
    const size_t digits =
        std::min(pattern_.find_first_not_of("0123456789abcdefABCDEF", begin), pattern_.size()) -
        begin;
    const size_t wanted = pattern_[at_ + 1] == 'u' ? 4 : 2;
    const bool closed =
        !braces || (begin + digits < pattern_.size() && pattern_[begin + digits] == '}');
    if (braces ? digits < 1 || digits > 8 || !closed : digits < wanted)
      refuse("a malformed hexadecimal escape");
    const size_t used = braces ? digits : wanted;
    if (!braces && wanted == 2 && pattern_[begin] >= '8')
      refuse("\\xHH above 7F, which names a byte");
    out_ += concat("\\x{", pattern_.substr(begin, used), "}");
    at_ = begin + used + (braces ? 1 : 0);
  }

  std::string_view pattern_;
  const std::string& place_;
  size_t at_ = 0;
  std::string out_;
};

}  // namespace

std::string translate_regex(std::string_view pattern, const std::string& place) {
  GRAFT_CHECK(find_invalid_utf8(pattern) == std::string_view::npos, "tokenizer",
              "a regular expression must be valid UTF-8 (", place, ")");
  return Translator(pattern, place).run();
}

}  // namespace graft::text
