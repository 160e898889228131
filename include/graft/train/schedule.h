/// Learning rate schedules as pure functions of the step.
#pragma once

#include <cstdint>
#include <string_view>

namespace graft::train {

/// What the learning rate does after the warmup.
enum class ScheduleKind { constant, linear, cosine };

/// The kind of that name; throws graft::Error listing the known names on any other.
ScheduleKind parse_schedule_kind(std::string_view name);

/// The name that `parse_schedule_kind` takes.
std::string_view schedule_kind_name(ScheduleKind kind);

/// Multiplier of the learning rate. Steps count from 0.
///   t < warmup:  (t + 1) / warmup
///   else, with d = (t - warmup) / (total - warmup):
///   constant 1,  linear 1 - d,  cosine (1 + cos(pi d)) / 2;  d stays at 1 past the end.
struct Schedule {
  ScheduleKind kind = ScheduleKind::constant;
  int64_t warmup_steps = 0;  ///< in [0, total_steps]
  int64_t total_steps = 1;   ///< >= 1

  /// Throws graft::Error naming the first bad field.
  void validate() const;

  /// The multiplier at step t >= 0.
  double factor(int64_t t) const;
};

}  // namespace graft::train
