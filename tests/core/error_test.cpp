#include <graft/core/error.h>

#include "tests/support/testing.h"

using graft::testing::error_of;

TEST_CASE("an error reads [area] message", "[core]") {
  CHECK(error_of([] { graft::fail("lora", "rank must be >= 1; got 0"); }) ==
        "[lora] rank must be >= 1; got 0");
}

TEST_CASE("a check joins its arguments as text and evaluates them only when it fails", "[core]") {
  int calls = 0;
  const auto value = [&] { return ++calls; };
  GRAFT_CHECK(true, "area", "got ", value());
  CHECK(calls == 0);
  CHECK(error_of([&] { GRAFT_CHECK(1 > 2, "area", "got ", value(), " of ", 2.5); }) ==
        "[area] got 1 of 2.5");
}

TEST_CASE("a check is one statement, also before an else", "[core]") {
  bool other_branch = false;
  if (false)
    GRAFT_CHECK(false, "area", "never");
  else
    other_branch = true;
  CHECK(other_branch);
}
