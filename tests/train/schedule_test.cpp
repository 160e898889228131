#include <graft/train/schedule.h>

#include <cmath>

#include "tests/support/testing.h"

namespace {

using graft::testing::contains;
using graft::testing::error_of;
using graft::train::parse_schedule_kind;
using graft::train::Schedule;
using graft::train::ScheduleKind;

bool near(double a, double b) {
  return std::abs(a - b) < 1e-12;
}

}  // namespace

TEST_CASE("a schedule warms up linearly and ends its warmup at one", "[train][schedule]") {
  for (const ScheduleKind kind :
       {ScheduleKind::constant, ScheduleKind::linear, ScheduleKind::cosine}) {
    const Schedule schedule{kind, 4, 12};
    CHECK(near(schedule.factor(0), 0.25));
    CHECK(near(schedule.factor(2), 0.75));
    CHECK(near(schedule.factor(3), 1.0));
    CHECK(near(schedule.factor(4), 1.0));
  }
}

TEST_CASE("a schedule falls after the warmup as its name says", "[train][schedule]") {
  const Schedule constant{ScheduleKind::constant, 4, 12}, linear{ScheduleKind::linear, 4, 12},
      cosine{ScheduleKind::cosine, 4, 12};
  CHECK(near(constant.factor(11), 1.0));
  CHECK(near(linear.factor(6), 0.75));
  CHECK(near(linear.factor(11), 0.125));
  CHECK(near(cosine.factor(6), (1 + std::sqrt(0.5)) / 2));
  CHECK(near(cosine.factor(8), 0.5));
}

TEST_CASE("a schedule stays at its end", "[train][schedule]") {
  CHECK(near(Schedule{ScheduleKind::constant, 0, 12}.factor(99), 1.0));
  CHECK(near(Schedule{ScheduleKind::linear, 2, 12}.factor(12), 0.0));
  CHECK(near(Schedule{ScheduleKind::linear, 2, 12}.factor(99), 0.0));
  CHECK(near(Schedule{ScheduleKind::cosine, 2, 12}.factor(99), 0.0));
  CHECK(near(Schedule{ScheduleKind::linear, 12, 12}.factor(11), 1.0));
  CHECK(near(Schedule{ScheduleKind::linear, 12, 12}.factor(12), 0.0));
}

TEST_CASE("a schedule without warmup starts at one", "[train][schedule]") {
  CHECK(near(Schedule{ScheduleKind::linear, 0, 10}.factor(0), 1.0));
  CHECK(near(Schedule{ScheduleKind::cosine, 0, 1}.factor(0), 1.0));
}

TEST_CASE("schedule kinds go by name, and an unknown name lists the known ones",
          "[train][schedule]") {
  for (const ScheduleKind kind :
       {ScheduleKind::constant, ScheduleKind::linear, ScheduleKind::cosine}) {
    CHECK(parse_schedule_kind(graft::train::schedule_kind_name(kind)) == kind);
  }
  CHECK(parse_schedule_kind("cosine") == ScheduleKind::cosine);
  CHECK(error_of([] { parse_schedule_kind("step"); }) ==
        "[schedule] a schedule must be one of constant, linear, cosine; got 'step'");
}

TEST_CASE("a schedule refuses bad lengths and steps in words", "[train][schedule]") {
  CHECK(contains(error_of([] {
                   Schedule{ScheduleKind::linear, 0, 0}.validate();
                 }),
                 "total_steps must be >= 1; got 0"));
  CHECK(contains(error_of([] {
                   Schedule{ScheduleKind::linear, -1, 5}.factor(0);
                 }),
                 "warmup_steps must be in [0, total_steps]; got -1"));
  CHECK(contains(error_of([] { Schedule{ScheduleKind::linear, 6, 5}.factor(0); }), "got 6"));
  CHECK(contains(error_of([] { Schedule{ScheduleKind::linear, 0, 5}.factor(-1); }), "got -1"));
}
