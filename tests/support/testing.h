/// The one place that includes Catch2. torch's logging defines CHECK and so does Catch2: torch goes
/// first and gives way.
#pragma once

#if __has_include(<c10/util/Logging.h>)
#include <c10/util/Logging.h>
#undef CHECK
#undef CHECK_EQ
#undef CHECK_NE
#undef CHECK_LT
#undef CHECK_LE
#undef CHECK_GT
#undef CHECK_GE
#endif

#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <graft/core/error.h>

#include <string>

namespace graft::testing {

/// The message of the graft::Error that `action` throws; fails the test when it throws nothing or
/// something else.
template <class Action>
std::string error_of(Action&& action) {
  try {
    action();
  } catch (const graft::Error& error) {
    return error.what();
  } catch (const std::exception& error) {
    FAIL("expected graft::Error, got: " << error.what());
  }
  FAIL("expected graft::Error, nothing was thrown");
  return {};
}

/// Whether `text` contains `part`.
inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace graft::testing
