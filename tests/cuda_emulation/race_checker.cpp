// Watches every load and store of kernels, for one of the three builds.
//
// Kernels are compiled with -fsanitize=thread, which calls __tsan_read4(address) and its like
// before each access. Linked with this file in place of the sanitiser's library, those calls come
// here. Reported: memory that belongs to no piece; a read before any write; two threads of a block
// at one byte between the same two barriers, one of them writing (unless they are of one warp with
// a full
// __syncwarp between); two blocks of a launch at one byte, one of them writing. Shuffles order no
// memory, as CUDA says.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <string>

#include "memory.h"
#include "scheduler.h"

namespace emulation {
namespace {

constexpr uint32_t kWarp = 32;

// Who touched a byte last in one way, and who besides since the last meeting point.
struct Touch {
  uint32_t block;  // 0: nobody
  uint32_t interval, warp_interval;
  uint16_t thread;
  bool several_threads, several_warps, several_blocks;
};

struct Byte {
  Checker::State state;
  Touch writer, reader;
};

class RaceChecker final : public Checker {
 public:
  RaceChecker() {
    const Range range = arena();
    begin_ = range.begin;
    bytes_ = range.bytes;
    void* pages = mmap(nullptr, bytes_ * sizeof(Byte), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw Fault("no memory for the race checker");
    shadow_ = static_cast<Byte*>(pages);
    checker = this;
  }

  void mark(const void* memory, size_t bytes, State state) override {
    for (size_t i = 0; i < bytes; ++i) shadow(memory)[i] = {state, {}, {}};
  }

  bool initialised(const void* memory, size_t bytes) override {
    for (size_t i = 0; i < bytes; ++i) {
      if (shadow(memory)[i].state != State::initialised) return false;
    }
    return true;
  }

  void access(const void* memory, size_t bytes, Access kind, const Place& place) override {
    touch(memory, bytes, kind, [&] { return describe(place); });
  }

  template <class Where>
  void touch(const void* memory, size_t bytes, Access kind, const Where& where) {
    const auto offset = static_cast<size_t>(static_cast<const char*>(memory) - begin_);
    if (offset >= bytes_ || !in_kernel()) return;  // a thread's own stack, or the host
    const Position now = position();
    for (size_t i = 0; i < bytes; ++i) {
      const char* error =
          kind == Access::read ? read(shadow_[offset + i], now) : write(shadow_[offset + i], now);
      if (error == nullptr) continue;
      const Touch& other = shadow_[offset + i].writer.block != 0 ? shadow_[offset + i].writer
                                                                 : shadow_[offset + i].reader;
      fail(std::string(error) + " at " + where() +
           (kind == Access::read ? ", a read" : ", a write") + " of " + std::to_string(bytes) +
           " bytes; the other is thread " + std::to_string(other.thread));
    }
  }

 private:
  Byte* shadow(const void* memory) { return shadow_ + (static_cast<const char*>(memory) - begin_); }

  // Why an earlier access and one of now are not ordered; null when they are.
  static const char* conflict(const Touch& other, const Position& now) {
    if (other.block < now.first_block) return nullptr;  // an earlier launch, or nobody
    if (other.block != now.block || other.several_blocks) return "race between blocks";
    if (other.interval != now.interval) return nullptr;
    if (other.several_warps || other.thread / kWarp != now.thread / kWarp) return "race";
    if (other.warp_interval != now.warp_interval) return nullptr;
    return other.several_threads || other.thread != now.thread ? "race" : nullptr;
  }

  static const char* read(Byte& byte, const Position& now) {
    if (byte.state == State::outside) return "access out of bounds";
    if (byte.state == State::uninitialised) return "read of uninitialised memory";
    if (const char* error = conflict(byte.writer, now)) return error;
    const Touch old = byte.reader;
    Touch& reader = byte.reader;
    reader = touch_of(now);
    if (old.block < now.first_block) return nullptr;
    reader.several_blocks = old.several_blocks || old.block != now.block;
    if (old.block != now.block || old.interval != now.interval) return nullptr;
    reader.several_warps = old.several_warps || old.thread / kWarp != now.thread / kWarp;
    reader.several_threads =
        old.warp_interval == now.warp_interval && (old.several_threads || old.thread != now.thread);
    return nullptr;
  }

  static const char* write(Byte& byte, const Position& now) {
    if (byte.state == State::outside) return "access out of bounds";
    if (const char* error = conflict(byte.writer, now)) return error;
    if (const char* error = conflict(byte.reader, now)) return error;
    byte.state = State::initialised;
    byte.writer = touch_of(now);
    return nullptr;
  }

  static Touch touch_of(const Position& now) {
    return {now.block, now.interval, now.warp_interval, static_cast<uint16_t>(now.thread), false,
            false,     false};
  }

  const char* begin_ = nullptr;
  size_t bytes_ = 0;
  Byte* shadow_ = nullptr;
};

RaceChecker race_checker;

// file:line of an instruction, by the program's own debug information.
std::string source_line(const void* instruction) {
  char command[128], line[512] = "?";
  std::snprintf(command, sizeof command, "addr2line -s -e /proc/%d/exe %p 2>/dev/null", getpid(),
                instruction);
  if (FILE* output = popen(command, "r")) {
    if (std::fgets(line, sizeof line, output) == nullptr) line[0] = '?';
    pclose(output);
  }
  std::string text = line;
  return text.substr(0, text.find_first_of(" \n"));
}

}  // namespace
}  // namespace emulation

namespace {
void touch(const void* memory, size_t bytes, emulation::Access kind, const void* instruction) {
  emulation::race_checker.touch(memory, bytes, kind,
                                [&] { return emulation::source_line(instruction); });
}
}  // namespace

#define GRAFT_HOOK(name, bytes, kind)                                           \
  extern "C" void name(void* memory) {                                          \
    touch(memory, bytes, emulation::Access::kind, __builtin_return_address(0)); \
  }
#define GRAFT_HOOKS(bytes)                              \
  GRAFT_HOOK(__tsan_read##bytes, bytes, read)           \
  GRAFT_HOOK(__tsan_write##bytes, bytes, write)         \
  GRAFT_HOOK(__tsan_unaligned_read##bytes, bytes, read) \
  GRAFT_HOOK(__tsan_unaligned_write##bytes, bytes, write)
GRAFT_HOOKS(1)
GRAFT_HOOKS(2)
GRAFT_HOOKS(4)
GRAFT_HOOKS(8)
GRAFT_HOOKS(16)

extern "C" {
void __tsan_read_range(void* memory, unsigned long bytes) {
  touch(memory, bytes, emulation::Access::read, __builtin_return_address(0));
}
void __tsan_write_range(void* memory, unsigned long bytes) {
  touch(memory, bytes, emulation::Access::write, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
}
