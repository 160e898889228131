#include <graft/train/grad_scaler.h>

#include <limits>

#include "tests/support/testing.h"

using graft::testing::contains;
using graft::testing::error_of;
using graft::train::GradScaler;

TEST_CASE("the loss scale grows after finite steps in a row, and only then", "[train][scaler]") {
  GradScaler scaler({.initial = 8, .growth = 4, .interval = 3});
  CHECK(scaler.scale() == 8);
  for (int i = 0; i < 2; ++i) CHECK(scaler.update(true));
  CHECK(scaler.scale() == 8);
  CHECK(scaler.update(true));
  CHECK(scaler.scale() == 32);
  CHECK(scaler.finite_steps() == 0);
  CHECK(scaler.update(true));
  CHECK(scaler.update(true));
  CHECK_FALSE(scaler.update(false));  // the row is broken
  CHECK(scaler.scale() == 16);
  CHECK(scaler.update(true));
  CHECK(scaler.update(true));
  CHECK(scaler.scale() == 16);
  CHECK(scaler.update(true));
  CHECK(scaler.scale() == 64);
  CHECK(scaler.skipped() == 1);
}

TEST_CASE("the loss scale falls no further than its least and grows to no infinity",
          "[train][scaler]") {
  GradScaler low({.initial = 4, .backoff = 0.25, .least = 2});
  CHECK(low.can_fall());
  CHECK_FALSE(low.update(false));
  CHECK_FALSE(low.can_fall());
  CHECK_FALSE(low.update(false));
  CHECK(low.scale() == 2);
  CHECK(low.skipped() == 2);
  GradScaler high({.initial = std::numeric_limits<double>::max(), .interval = 1});
  CHECK(high.update(true));
  CHECK(high.scale() == std::numeric_limits<double>::max());
}

TEST_CASE("a loss scale goes on where a checkpoint left it", "[train][scaler]") {
  GradScaler scaler({.initial = 8, .interval = 3});
  scaler.restore(5, 2, 7);
  CHECK(scaler.update(true));
  CHECK(scaler.scale() == 10);
  CHECK(scaler.skipped() == 7);
  CHECK(
      contains(error_of([&] { scaler.restore(0, 0, 0); }), "[grad_scaler] the scale must be > 0"));
  CHECK(contains(error_of([&] { scaler.restore(1, -1, 0); }), "counts must be >= 0; got -1"));
}

TEST_CASE("options of a loss scale out of range", "[train][scaler]") {
  CHECK(contains(error_of([] { GradScaler({.initial = 0}); }), "initial must be > 0; got 0"));
  CHECK(contains(error_of([] { GradScaler({.growth = 1}); }), "growth must be > 1; got 1"));
  CHECK(contains(error_of([] { GradScaler({.backoff = 1}); }), "backoff must be in (0, 1); got 1"));
  CHECK(contains(error_of([] { GradScaler({.interval = 0}); }), "interval must be >= 1; got 0"));
  CHECK(contains(error_of([] { GradScaler({.initial = 2, .least = 4}); }), "least must be in"));
}
