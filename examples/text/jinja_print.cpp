// How values print: Python's str() and repr(), and JSON as Python's json.dumps writes it.
#include <graft/core/error.h>

#include <charconv>
#include <cmath>

#include "examples/text/jinja_value.h"
#include "examples/text/unicode.h"

namespace graft::text::jinja {
namespace {

std::string hex(char32_t value, int digits) {
  std::string text(static_cast<size_t>(digits), '0');
  for (int i = digits - 1; i >= 0; --i, value >>= 4)
    text[static_cast<size_t>(i)] = "0123456789abcdef"[value & 15];
  return text;
}

/// The shortest digits that read back as the same number; exponents from 1e16 and below 1e-4, as
/// Python has it.
std::string print_float(double number) {
  if (std::isnan(number)) return "nan";
  if (std::isinf(number)) return number > 0 ? "inf" : "-inf";
  const double size = std::fabs(number);
  const bool scientific = size != 0 && (size >= 1e16 || size < 1e-4);
  char buffer[400];
  const auto end =
      std::to_chars(buffer, buffer + sizeof buffer, number,
                    scientific ? std::chars_format::scientific : std::chars_format::fixed);
  std::string text(buffer, end.ptr);
  if (!scientific && text.find('.') == std::string::npos) text += ".0";
  return text;
}

std::string quote_json(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\b':
        out += "\\b";
        break;
      case '\f':
        out += "\\f";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          out += concat("\\u", hex(static_cast<unsigned char>(c), 4));
        } else {
          out += c;
        }
    }
  }
  return out + '"';
}

/// repr() of a string: single quotes unless only those occur inside.
std::string quote_python(std::string_view text) {
  const bool single =
      text.find('\'') == std::string_view::npos || text.find('"') != std::string_view::npos;
  const char quote = single ? '\'' : '"';
  std::string out(1, quote);
  for (size_t at = 0; at < text.size();) {
    const size_t length = utf8_length(text[at]);
    const char32_t c = code_point_at(text, at);
    if (c == '\\' || c == static_cast<char32_t>(quote)) {
      out += concat('\\', text[at]);
    } else if (c == '\n' || c == '\r' || c == '\t') {
      out += c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t";
    } else if (c < 0x20 || (c >= 0x7F && c <= 0xA0) || c == 0xAD) {
      out += concat("\\x", hex(c, 2));
    } else {
      out += text.substr(at, length);
    }
    at += length;
  }
  return out + quote;
}

std::string repr(const Value& value);

std::string repr_list(const List& list) {
  std::string out(1, list.is_tuple ? '(' : '[');
  for (size_t i = 0; i < list.items.size(); ++i) {
    out += concat(i > 0 ? ", " : "", repr(list.items[i]));
    check_text_size(out.size());
  }
  if (list.is_tuple && list.items.size() == 1) out += ',';
  return out + (list.is_tuple ? ')' : ']');
}

std::string repr_dict(const Dict& dict) {
  std::string out = "{";
  for (const auto& [key, member] : dict.members) {
    out += concat(out.size() > 1 ? ", " : "", quote_python(key), ": ", repr(member));
    check_text_size(out.size());
  }
  return out + '}';
}

std::string repr(const Value& value) {
  if (const auto* text = value.string()) return quote_python(*text);
  if (value.is_undefined()) return "Undefined";
  return to_text(value);
}

class JsonWriter {
 public:
  JsonWriter(int indent, int line) : indent_(indent), line_(line) {}

  void write(const Value& value) {
    if (const auto* text = value.string()) {
      out_ += quote_json(*text);
    } else if (const auto* list = value.list()) {
      write_all('[', ']', list->items, [&](const Value& item) { write(item); });
    } else if (const auto* dict = value.dict(); dict != nullptr && !dict->is_namespace) {
      write_all('{', '}', dict->members, [&](const auto& member) {
        out_ += quote_json(member.first) + ": ";
        write(member.second);
      });
    } else if (const auto* flag = std::get_if<bool>(&value.data)) {
      out_ += *flag ? "true" : "false";
    } else if (value.is_none()) {
      out_ += "null";
    } else if (value.is_number()) {
      out_ += to_text(value);
    } else {
      fail_at(line_, concat("only JSON values can be written by tojson; got ", kind_of(value)));
    }
  }

  std::string take() { return std::move(out_); }

 private:
  template <class Items, class Write>
  void write_all(char open, char close, const Items& items, Write write_item) {
    out_ += open;
    ++depth_;
    bool first = true;
    for (const auto& item : items) {
      if (!first) out_ += indent_ < 0 ? ", " : ",";
      first = false;
      new_line();
      write_item(item);
      check_text_size(out_.size());
    }
    --depth_;
    if (!first) new_line();
    out_ += close;
  }

  void new_line() {
    if (indent_ >= 0) out_ += '\n' + std::string(static_cast<size_t>(indent_ * depth_), ' ');
  }

  std::string out_;
  int indent_, line_;
  int depth_ = 0;
};

}  // namespace

std::string to_text(const Value& value) {
  if (const auto* text = value.string()) return *text;
  if (const auto* flag = std::get_if<bool>(&value.data)) return *flag ? "True" : "False";
  if (const auto* integer = std::get_if<int64_t>(&value.data)) return std::to_string(*integer);
  if (const auto* real = std::get_if<double>(&value.data)) return print_float(*real);
  if (value.is_undefined()) return "";
  if (value.is_none()) return "None";
  if (const auto* list = value.list()) return repr_list(*list);
  if (const auto* dict = value.dict(); dict != nullptr && !dict->is_namespace)
    return repr_dict(*dict);
  fail("chat_template", concat("a function or namespace cannot be printed; got ", kind_of(value)));
}

std::string to_json(const Value& value, int indent, int line) {
  JsonWriter writer(indent, line);
  writer.write(value);
  return writer.take();
}

}  // namespace graft::text::jinja
