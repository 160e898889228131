/// Errors of graft: one form, one macro.
///
/// Form of a message: "[area] rule; got value (place)", for example
///   [lora] rank must be in [1, min(in, out)]; got rank=64 for in=32, out=128 (layer
///   'layers.3.q_proj')
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace graft {

/// What graft throws: bad options, bad files, an adapter that would have no effect.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Throws `Error("[area] message")`. Out of line, so that a check costs its caller one branch.
[[noreturn]] void fail(std::string_view area, const std::string& message);

/// The arguments one after the other as text, as `operator<<` writes them.
template <class... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return std::move(out).str();
}

}  // namespace graft

/// Throws graft::Error unless `condition` holds: GRAFT_CHECK(rank > 0, "lora", "rank must be >= 1;
/// got ", rank).
#define GRAFT_CHECK(condition, area, ...)                \
  do {                                                   \
    if (!(condition)) [[unlikely]]                       \
      ::graft::fail(area, ::graft::concat(__VA_ARGS__)); \
  } while (false)
