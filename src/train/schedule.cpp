#include <graft/core/error.h>
#include <graft/train/schedule.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <string>
#include <utility>

namespace graft::train {
namespace {

constexpr const char* kArea = "schedule";

constexpr std::array<std::pair<std::string_view, ScheduleKind>, 3> kKinds = {{
    {"constant", ScheduleKind::constant},
    {"linear", ScheduleKind::linear},
    {"cosine", ScheduleKind::cosine},
}};

}  // namespace

ScheduleKind parse_schedule_kind(std::string_view name) {
  std::string known;
  for (const auto& [known_name, kind] : kKinds) {
    if (known_name == name) return kind;
    known += (known.empty() ? "" : ", ") + std::string(known_name);
  }
  fail(kArea, concat("a schedule must be one of ", known, "; got '", name, "'"));
}

std::string_view schedule_kind_name(ScheduleKind kind) {
  for (const auto& [name, known_kind] : kKinds) {
    if (known_kind == kind) return name;
  }
  fail(kArea, concat("unknown kind; got ", static_cast<int>(kind)));
}

void Schedule::validate() const {
  GRAFT_CHECK(total_steps >= 1, kArea, "total_steps must be >= 1; got ", total_steps);
  GRAFT_CHECK(warmup_steps >= 0 && warmup_steps <= total_steps, kArea,
              "warmup_steps must be in [0, total_steps]; got ", warmup_steps,
              " for total_steps=", total_steps);
}

double Schedule::factor(int64_t t) const {
  validate();
  GRAFT_CHECK(t >= 0, kArea, "a step must be >= 0; got ", t);
  if (t < warmup_steps) return static_cast<double>(t + 1) / static_cast<double>(warmup_steps);
  const int64_t length = total_steps - warmup_steps;
  const double done =
      t >= total_steps ? 1.0 : static_cast<double>(t - warmup_steps) / static_cast<double>(length);
  switch (kind) {
    case ScheduleKind::linear:
      return 1.0 - done;
    case ScheduleKind::cosine:
      return (1.0 + std::cos(std::numbers::pi * done)) / 2.0;
    case ScheduleKind::constant:
      break;
  }
  return 1.0;
}

}  // namespace graft::train
