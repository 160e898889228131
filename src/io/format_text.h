// What a file says, as text for one-line errors.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace graft::io {

/// 'text' in quotes on one line: control characters and bytes that are not UTF-8 as \xNN, shortened
/// past 200 bytes.
std::string quote(std::string_view text);

/// 'a', 'b', 'c' and 12 more.
std::string quote_list(const std::vector<std::string>& names);

/// Whether `text` is well-formed UTF-8 (no surrogates, no overlong forms).
bool is_utf8(std::string_view text);

}  // namespace graft::io
