#include "fiber_switch.h"

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr size_t kStackBytes = size_t{128} << 10, kGuardBytes = 4096;

// The guard page turns an overflow into a fault of the processor.
char* make_stack() {
  void* pages = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED || mprotect(pages, kGuardBytes, PROT_NONE) != 0)
    throw std::runtime_error("no memory for the stacks of threads");
  return static_cast<char*>(pages) + kGuardBytes;
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
namespace {

std::string first_report;

void keep_report(const char* text) {
  if (!first_report.empty()) return;
  const std::string report = text;
  const size_t begin = report.find("ERROR:");
  first_report = report.substr(begin == std::string::npos ? 0 : begin, 2000);
}

struct Stack {
  const void* bottom;
  size_t bytes;
};

// Where a fiber's stack lies, as AddressSanitizer wants to be told.
Stack stack_of(const Fiber& fiber) {
  if (fiber.stack != nullptr) return {fiber.stack, kStackBytes};
  static const Stack own = [] {
    pthread_attr_t attributes;
    void* address = nullptr;
    size_t bytes = 0;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &address, &bytes);
    pthread_attr_destroy(&attributes);
    return Stack{address, bytes};
  }();
  return own;
}

}  // namespace

std::string sanitizer_report() {
  __asan_set_error_report_callback(keep_report);
  return std::exchange(first_report, {});
}
#else
std::string sanitizer_report() {
  return {};
}
#endif

#if defined(__x86_64__)

// Saves what a called function must keep. Ends in a jump rather than a return: the processor's
// prediction of returns stays in step with the calls, which makes a switch three times as fast.
extern "C" void emulation_switch(void** save, void* load);
asm(".text\n.globl emulation_switch\n.type emulation_switch,@function\nemulation_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\npopq %rcx\njmp *%rcx\n"
    ".size emulation_switch,.-emulation_switch\n");

namespace {
void (*fiber_entry)() = nullptr;
void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  fiber_entry();
}
}  // namespace

void start_fiber(Fiber& fiber, void (*entry)()) {
  if (fiber.stack == nullptr) fiber.stack = make_stack();
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStackBytes);
#endif
  fiber_entry = entry;
  fiber.fake_stack = nullptr;
  // From the top: a place for a return address (a function begins with its stack 8 bytes off a
  // multiple of 16), the entry, six registers.
  auto* top = reinterpret_cast<uintptr_t*>(fiber.stack + kStackBytes) - 1;
  for (int i = 0; i < 8; ++i) top[-i] = 0;
  top[-1] = reinterpret_cast<uintptr_t>(&enter);
  fiber.stack_pointer = top - 7;
}

void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  const Stack stack = stack_of(to);
  __sanitizer_start_switch_fiber(&from.fake_stack, stack.bottom, stack.bytes);
#endif
  emulation_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

#else  // other processors: correct, and slower by a system call

void start_fiber(Fiber& fiber, void (*entry)()) {
  if (fiber.stack == nullptr) fiber.stack = make_stack();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) {
  swapcontext(&from.context, &to.context);
}

#endif

}  // namespace emulation

#if defined(__SANITIZE_ADDRESS__)
// Fibers given up after a fault never unwind, and a report is turned into a Fault (scheduler.cpp).
extern "C" const char* __asan_default_options() {
  return "detect_leaks=0:halt_on_error=0:detect_stack_use_after_return=0";
}
#endif
