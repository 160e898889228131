// How much memory a piece of code keeps.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <memory>
#include <utility>

namespace graft::testing {

/// Bytes of tensors that were allocated and not freed while it is installed.
struct LiveBytes : c10::MemoryReportingInfoBase {
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
    count += size;
  }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t count = 0;
};

/// What f's result keeps alive; the result dies afterwards.
template <class F>
int64_t bytes_kept_by(F&& f) {
  const auto bytes = std::make_shared<LiveBytes>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, bytes);
  const auto result = std::forward<F>(f)();
  return bytes->count;
}

}  // namespace graft::testing
