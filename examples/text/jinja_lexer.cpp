#include "examples/text/jinja_lexer.h"

#include <graft/core/error.h>

#include <algorithm>
#include <array>

#include "examples/text/jinja_value.h"
#include "examples/text/unicode.h"

namespace graft::text::jinja {
namespace {

bool is_name_start(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}
bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

/// One newline for every line end, and none at the end of the last line.
std::string unify_newlines(std::string_view source) {
  std::string out;
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      out += source[i];
      continue;
    }
    out += '\n';
    if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(unify_newlines(source)), text_(source_) {}

  std::vector<Token> run() {
    while (at_ < text_.size()) {
      const size_t tag = find_tag();
      plain_text(tag);
      if (tag == std::string_view::npos) break;
      const char kind = text_[tag + 1];
      if (kind == '#') {
        comment();
      } else {
        this->tag(kind == '%');
      }
    }
    add(TokenKind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  void add(TokenKind kind, std::string text) { tokens_.push_back({kind, std::move(text), line_}); }

  size_t find_tag() const {
    for (size_t i = text_.find('{', at_); i != std::string_view::npos; i = text_.find('{', i + 1)) {
      if (i + 1 < text_.size() &&
          (text_[i + 1] == '{' || text_[i + 1] == '%' || text_[i + 1] == '#'))
        return i;
    }
    return std::string_view::npos;
  }

  void advance(size_t end) {
    line_ += static_cast<int>(std::count(text_.begin() + static_cast<std::ptrdiff_t>(at_),
                                         text_.begin() + static_cast<std::ptrdiff_t>(end), '\n'));
    at_ = end;
  }

  static std::string_view strip_end(std::string_view text) {
    while (!text.empty() && is_python_space(code_point_before(text, text.size()))) {
      text = text.substr(0, previous_position(text, text.size()));
    }
    return text;
  }

  /// Emits the text before the tag that starts at `tag`, less the white space that the tag takes
  /// away.
  void plain_text(size_t tag) {
    const size_t end = std::min(tag, text_.size());
    std::string_view text = text_.substr(at_, end - at_);
    if (tag != std::string_view::npos) {
      const char sign = tag + 2 < text_.size() ? text_[tag + 2] : ' ';
      if (sign == '-') {
        text = strip_end(text);
      } else if (sign != '+' && text_[tag + 1] != '{') {
        const size_t line_begin = text.rfind('\n') + 1;  // 0 when there is no newline
        const bool begins_line = line_begin > 0 || at_line_start_;
        if (begins_line && strip_end(text.substr(line_begin)).empty())
          text = text.substr(0, line_begin);
      }
    }
    if (!text.empty()) add(TokenKind::kText, std::string(text));
    advance(end);
  }

  /// Moves behind a tag's end, of `length` bytes, and over the white space that it takes away.
  void close(size_t length, bool strips, bool trims_newline) {
    size_t end = at_ + length;
    if (strips) {
      while (end < text_.size() && is_python_space(code_point_at(text_, end)))
        end += utf8_length(text_[end]);
    } else if (trims_newline && end < text_.size() && text_[end] == '\n') {
      ++end;
    }
    at_line_start_ = text_[end - 1] == '\n';
    advance(end);
  }

  void comment() {
    const size_t end = text_.find("#}", at_ + 2);
    if (end == std::string_view::npos)
      fail_at(line_, "a comment must end with #}; got the end of the template");
    const char sign = end > at_ + 2 ? text_[end - 1] : ' ';
    advance(end);
    close(2, sign == '-', sign != '+');
  }

  void tag(bool is_block) {
    add(is_block ? TokenKind::kBlockBegin : TokenKind::kVariableBegin, "");
    const int first_line = line_;
    at_ += 2;
    if (at_ < text_.size() && (text_[at_] == '-' || text_[at_] == '+')) ++at_;
    const std::string_view end = is_block ? "%}" : "}}";
    std::string brackets;  // the closing ones that are still missing
    while (true) {
      while (at_ < text_.size() && is_python_space(static_cast<unsigned char>(text_[at_])))
        advance(at_ + 1);
      if (at_ >= text_.size())
        fail_at(first_line, concat("a tag must end with ", end, "; got the end of the template"));
      const std::string_view rest = text_.substr(at_);
      const bool signed_end =
          (rest[0] == '-' || (rest[0] == '+' && is_block)) && rest.substr(1).starts_with(end);
      if (brackets.empty() && (signed_end || rest.starts_with(end))) {
        add(is_block ? TokenKind::kBlockEnd : TokenKind::kVariableEnd, "");
        return close(signed_end ? 3 : 2, signed_end && rest[0] == '-',
                     is_block && !(signed_end && rest[0] == '+'));
      }
      token(brackets);
    }
  }

  void token(std::string& brackets) {
    const char c = text_[at_];
    if (is_name_start(c)) {
      size_t end = at_;
      while (end < text_.size() && (is_name_start(text_[end]) || is_digit(text_[end]))) ++end;
      add(TokenKind::kName, std::string(text_.substr(at_, end - at_)));
      at_ = end;
    } else if (is_digit(c)) {
      number();
    } else if (c == '\'' || c == '"') {
      string(c);
    } else {
      operation(brackets);
    }
  }

  void number() {
    size_t end = at_;
    while (end < text_.size() && is_digit(text_[end])) ++end;
    const bool is_float = end + 1 < text_.size() && text_[end] == '.' && is_digit(text_[end + 1]);
    if (is_float) ++end;
    while (is_float && end < text_.size() && is_digit(text_[end])) ++end;
    if (end < text_.size() && (is_name_start(text_[end]) || is_digit(text_[end]))) {
      fail_at(line_, concat("a number must be decimal digits; got '",
                            text_.substr(at_, end + 1 - at_), "'"));
    }
    add(is_float ? TokenKind::kFloat : TokenKind::kInteger,
        std::string(text_.substr(at_, end - at_)));
    at_ = end;
  }

  void string(char quote) {
    std::string content;
    size_t end = at_ + 1;
    while (end < text_.size() && text_[end] != quote) {
      if (text_[end] == '\\') {
        end = escape(end, content);
      } else {
        content += text_[end++];
      }
    }
    if (end >= text_.size()) fail_at(line_, "a string must end; got the end of the template");
    add(TokenKind::kString, std::move(content));
    advance(end + 1);
  }

  /// Resolves the escape at `at` and returns the position after it.
  size_t escape(size_t at, std::string& content) {
    const char letter = at + 1 < text_.size() ? text_[at + 1] : '\0';
    constexpr std::string_view kLetters = "nrtbfva0'\"\\";
    constexpr std::string_view kMeanings{"\n\r\t\b\f\v\a\0'\"\\", 11};
    const size_t digits = letter == 'x' ? 2 : letter == 'u' ? 4 : letter == 'U' ? 8 : 0;
    if (digits > 0) {
      char32_t value = 0;
      for (size_t i = 0; i < digits; ++i) {
        const char c = at + 2 + i < text_.size() ? text_[at + 2 + i] : '?';
        const size_t digit =
            std::string_view("0123456789abcdef").find(static_cast<char>(c | (c >= 'A' ? 0x20 : 0)));
        if (digit == std::string_view::npos)
          fail_at(line_, "an escape must have its hexadecimal digits");
        value = value << 4 | static_cast<char32_t>(digit);
      }
      if (value > 0x10FFFF || (value >= 0xD800 && value < 0xE000))
        fail_at(line_, "an escape must name a character");
      append_utf8(content, value);
      return at + 2 + digits;
    }
    if (letter == '\n') return at + 2;
    const size_t index = kLetters.find(letter);
    const bool octal = letter == '0' && at + 2 < text_.size() && is_digit(text_[at + 2]);
    if (letter == '\0' || octal || is_digit(letter) > (letter == '0') || letter == 'N') {
      fail_at(line_, concat("an escape must be a known one; got '\\", letter, "'"));
    }
    if (index == std::string_view::npos) {
      content += '\\';  // Python keeps the backslash of an escape that means nothing
      return at + 1;
    }
    content += kMeanings[index];
    return at + 2;
  }

  void operation(std::string& brackets) {
    constexpr std::array<std::string_view, 26> kOperators = {
        "**", "//", "==", "!=", "<=", ">=", "+", "-", "*", "/", "%", "~", "<",
        ">",  "=",  ".",  ",",  ":",  "|",  "(", ")", "[", "]", "{", "}", ";"};
    const std::string_view rest = text_.substr(at_);
    for (const std::string_view known : kOperators) {
      if (!rest.starts_with(known)) continue;
      if (known == "(" || known == "[" || known == "{")
        brackets += known == "(" ? ')' : known == "[" ? ']' : '}';
      if (known == ")" || known == "]" || known == "}") {
        if (brackets.empty() || brackets.back() != known[0])
          fail_at(line_, concat("unexpected '", known, "'"));
        brackets.pop_back();
      }
      add(TokenKind::kOperator, std::string(known));
      at_ += known.size();
      return;
    }
    fail_at(line_, concat("unexpected character '", rest.substr(0, utf8_length(rest[0])), "'"));
  }

  std::string source_;
  std::string_view text_;
  size_t at_ = 0;
  int line_ = 1;
  bool at_line_start_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) {
  const size_t invalid = find_invalid_utf8(source);
  GRAFT_CHECK(invalid == std::string_view::npos, "chat_template",
              "a template must be valid UTF-8; got an invalid byte at ", invalid);
  return Lexer(source).run();
}

}  // namespace graft::text::jinja
