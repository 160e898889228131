/// Fibers: stacks of their own that take turns on one thread of the system.
#pragma once

#include <cstddef>
#include <string>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

struct Fiber {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  char* stack = nullptr;       // lowest address; null: the thread's own stack
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

/// Makes the fiber begin at `entry`, which never returns, when it is switched to next.
void start_fiber(Fiber& fiber, void (*entry)());

/// Leaves `from`, goes on in `to`.
void switch_fiber(Fiber& from, Fiber& to);

/// The first report of AddressSanitizer since the last call, empty if there was none.
std::string sanitizer_report();

}  // namespace emulation
