/// Memory that kernels see: an arena in which every piece lies between guard bands, is filled with
/// 0xFF (NaN as a number, -1 as an index) and, under a sanitiser or the race checker, is watched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace emulation {

/// Device memory. Reading it before it is written, or outside of it, is a fault.
void* allocate(size_t bytes);
void release(void* memory);

/// Accesses of the host, which the checkers do not see by themselves. `download` is a fault when
/// the race checker knows of a byte that no kernel wrote.
void upload(void* device, const void* host, size_t bytes);
void download(void* host, const void* device, size_t bytes);

enum class Access { read, write };

/// The race checker, present in one of the three builds (race_checker.cpp).
class Checker {
 public:
  enum class State : uint8_t { outside, uninitialised, initialised };
  virtual void mark(const void* memory, size_t bytes, State state) = 0;
  virtual bool initialised(const void* memory, size_t bytes) = 0;
  virtual void access(const void* memory, size_t bytes, Access kind,
                      const std::source_location& place) = 0;

 protected:
  ~Checker() = default;
};
extern Checker* checker;  // null in the other builds

/// Whether this build is the one under AddressSanitizer.
bool has_address_sanitizer();

/// The arena, for the checker.
struct Range {
  const char* begin;
  size_t bytes;
};
Range arena();

// For scheduler.cpp: the life of a launch and of a block.
void begin_block(size_t dynamic_bytes);
void check_guards();  ///< throws Fault when a guard band was written to

}  // namespace emulation
