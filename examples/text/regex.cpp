#include "examples/text/regex.h"

#include <graft/core/error.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "examples/text/unicode.h"

namespace graft::text {
namespace {

/// What one thread needs to run any expression: room for the result, and a stack for the compiled
/// code that may grow.
struct Workspace {
  Workspace()
      : data(pcre2_match_data_create(1, nullptr)),
        context(pcre2_match_context_create(nullptr)),
        stack(pcre2_jit_stack_create(32 << 10, 64 << 20, nullptr)) {
    if (context != nullptr && stack != nullptr) pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~Workspace() {
    pcre2_jit_stack_free(stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(data);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  pcre2_match_data* data;
  pcre2_match_context* context;
  pcre2_jit_stack* stack;
};

std::string error_text(int code) {
  PCRE2_UCHAR buffer[256];
  pcre2_get_error_message(code, buffer, sizeof buffer);
  return reinterpret_cast<const char*>(buffer);
}

PCRE2_SPTR units(std::string_view text) {
  return reinterpret_cast<PCRE2_SPTR>(text.data());
}

}  // namespace

Regex::Regex(std::string_view pattern, const std::string& place) : place_(place) {
  const std::string translated = translate_regex(pattern, place);
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code =
      pcre2_compile(units(translated), translated.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  GRAFT_CHECK(code != nullptr, "tokenizer", "a regular expression must compile; got \"", pattern,
              "\": ", error_text(error), " (", place, ")");
  code_ = std::shared_ptr<const void>(
      code, [](const void* p) { pcre2_code_free(static_cast<pcre2_code*>(const_cast<void*>(p))); });
  // Where the library has no just-in-time compiler, matching interprets: slower, same result.
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
}

std::vector<Span> Regex::operator()(std::string_view text) const {
  thread_local Workspace workspace;
  GRAFT_CHECK(workspace.data != nullptr, "tokenizer", "out of memory (", place_, ")");
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  std::vector<Span> matches;
  size_t position = 0;
  while (position <= text.size()) {
    // A view of nothing may have no address at all, which PCRE2 refuses.
    const int count = pcre2_match(code, text.empty() ? units("") : units(text), text.size(),
                                  position, PCRE2_NO_UTF_CHECK, workspace.data, workspace.context);
    if (count == PCRE2_ERROR_NOMATCH) break;
    GRAFT_CHECK(count >= 0, "tokenizer",
                "a regular expression must run through the text; got: ", error_text(count), " (",
                place_, ")");
    const PCRE2_SIZE* found = pcre2_get_ovector_pointer(workspace.data);
    const Span span{found[0], found[1]};
    const bool repeats =
        span.begin == span.end && !matches.empty() && matches.back().end == span.end;
    if (repeats) {
      if (position >= text.size()) break;
      position += utf8_length(text[position]);
    } else {
      matches.push_back(span);
      position = span.end;
    }
  }
  return matches;
}

Matcher find_literal(std::string needle) {
  return [needle = std::move(needle)](std::string_view text) {
    std::vector<Span> matches;
    if (needle.empty()) return matches;
    for (size_t at = text.find(needle); at != std::string_view::npos;
         at = text.find(needle, at + needle.size())) {
      matches.push_back({at, at + needle.size()});
    }
    return matches;
  };
}

Matcher find_code_points(bool (*predicate)(char32_t)) {
  return [predicate](std::string_view text) {
    std::vector<Span> matches;
    for (size_t at = 0; at < text.size();) {
      const size_t length = utf8_length(text[at]);
      if (predicate(code_point_at(text, at))) matches.push_back({at, at + length});
      at += length;
    }
    return matches;
  };
}

}  // namespace graft::text
