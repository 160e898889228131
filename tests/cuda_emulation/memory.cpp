#include "memory.h"

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "scheduler.h"

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true;
#include <sanitizer/asan_interface.h>
#else
constexpr bool kAddressSanitizer = false;
#define ASAN_POISON_MEMORY_REGION(p, n) (static_cast<void>(p), static_cast<void>(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) (static_cast<void>(p), static_cast<void>(n))
#endif

namespace emulation {

Checker* checker = nullptr;

namespace {

constexpr size_t kArenaBytes = size_t{32} << 20;
constexpr size_t kSharedBytes = size_t{1} << 20;  // at the arena's end
constexpr size_t kGuard = 256;
constexpr size_t kStaticLimit = size_t{48} << 10, kDynamicLimit = size_t{227} << 10;

struct Piece {
  const void* key;  // of a declaration in shared memory
  char* memory;
  size_t bytes;
};

char* start() {
  static char* const memory = [] {
    void* pages = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw Fault("no memory for the arena");
    ASAN_POISON_MEMORY_REGION(pages, kArenaBytes);
    return static_cast<char*>(pages);
  }();
  return memory;
}

size_t round_up(size_t n, size_t to) {
  return (n + to - 1) / to * to;
}

// Device memory grows upward; when the last piece is released the arena starts afresh.
std::map<char*, size_t> device_pieces;
size_t device_end = kGuard;
// Of the running block.
std::vector<Piece> static_pieces, dynamic_pieces;
size_t shared_end = 0, dynamic_limit = 0;

// Opens [memory, memory + bytes): the guard before it is the band after its predecessor.
void open(char* memory, size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(memory - kGuard, kGuard + bytes + kGuard + 16);
  std::memset(memory - kGuard, 0xff, kGuard + round_up(bytes, 16) + kGuard);
  ASAN_POISON_MEMORY_REGION(memory - kGuard, kGuard);
  ASAN_POISON_MEMORY_REGION(memory + bytes, round_up(bytes, 16) - bytes + kGuard);
  if (checker != nullptr) checker->mark(memory, bytes, Checker::State::uninitialised);
}

void close(char* memory, size_t bytes) {
  ASAN_POISON_MEMORY_REGION(memory, bytes);
  if (checker != nullptr) checker->mark(memory, bytes, Checker::State::outside);
}

#if defined(__SANITIZE_ADDRESS__)
bool untouched(const char*, size_t) {
  return true;
}  // the sanitiser has seen to it
#else
bool untouched(const char* guard, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    if (static_cast<unsigned char>(guard[i]) != 0xff) return false;
  }
  return true;
}
#endif

void check_piece(const char* memory, size_t bytes, const char* kind) {
  if (!untouched(memory + bytes, round_up(bytes, 16) - bytes + kGuard) ||
      !untouched(memory - kGuard, kGuard))
    throw Fault(std::string("write outside of a piece of ") + kind + " memory of " +
                std::to_string(bytes) + " bytes");
}

char* open_shared(size_t bytes) {
  char* memory = start() + kArenaBytes - kSharedBytes + shared_end + kGuard;
  shared_end += kGuard + round_up(bytes, 16);
  if (shared_end + 2 * kGuard > kSharedBytes) fail("too much shared memory");
  open(memory, bytes);
  return memory;
}

}  // namespace

bool has_address_sanitizer() {
  return kAddressSanitizer;
}

Range arena() {
  return {start(), kArenaBytes};
}

void* allocate(size_t bytes) {
  char* memory = start() + device_end;
  device_end += round_up(bytes, 16) + kGuard;
  if (device_end + kGuard > kArenaBytes - kSharedBytes)
    throw Fault("the arena is too small for this test");
  open(memory, bytes);
  device_pieces[memory] = bytes;
  return memory;
}

void release(void* memory) {
  const auto found = device_pieces.find(static_cast<char*>(memory));
  if (found == device_pieces.end()) return;
  close(found->first, found->second);
  device_pieces.erase(found);
  if (device_pieces.empty()) device_end = kGuard;
}

void upload(void* device, const void* host, size_t bytes) {
  if (bytes == 0) return;
  std::memcpy(device, host, bytes);
  if (checker != nullptr) checker->mark(device, bytes, Checker::State::initialised);
}

void download(void* host, const void* device, size_t bytes) {
  if (bytes == 0) return;
  if (checker != nullptr && !checker->initialised(device, bytes))
    throw Fault("the host reads device memory that no kernel has written");
  std::memcpy(host, device, bytes);
}

void begin_block(size_t dynamic_bytes) {
  for (const auto* pieces : {&static_pieces, &dynamic_pieces}) {
    for (const Piece& piece : *pieces) close(piece.memory, piece.bytes);
  }
  static_pieces.clear();
  dynamic_pieces.clear();
  shared_end = 0;
  dynamic_limit = dynamic_bytes;
  if (dynamic_bytes > kDynamicLimit)
    throw Fault("a block has 227 KiB of dynamic shared memory; got " +
                std::to_string(dynamic_bytes) + " bytes");
}

void check_guards() {
  for (const auto& [memory, bytes] : device_pieces) check_piece(memory, bytes, "device");
  for (const Piece& piece : static_pieces) check_piece(piece.memory, piece.bytes, "shared");
  for (const Piece& piece : dynamic_pieces) check_piece(piece.memory, piece.bytes, "shared");
}

void* static_shared(const void* key, size_t bytes) {
  size_t total = bytes;
  for (const Piece& piece : static_pieces) {
    if (piece.key == key) return piece.memory;
    total += round_up(piece.bytes, 16);
  }
  if (total > kStaticLimit)
    fail("a block has 48 KiB of static shared memory; got " + std::to_string(total) + " bytes");
  static_pieces.push_back({key, open_shared(bytes), bytes});
  return static_pieces.back().memory;
}

void* dynamic_shared(int number, size_t bytes) {
  const auto index = static_cast<size_t>(number);
  if (index < dynamic_pieces.size()) {
    if (dynamic_pieces[index].bytes != bytes)
      fail("threads of a block cut its shared memory differently");
    return dynamic_pieces[index].memory;
  }
  size_t total = bytes;
  for (const Piece& piece : dynamic_pieces) total += round_up(piece.bytes, 16);
  if (total > dynamic_limit)
    fail("pieces of " + std::to_string(total) + " bytes are cut from " +
         std::to_string(dynamic_limit) + " bytes of dynamic shared memory");
  dynamic_pieces.push_back({nullptr, open_shared(bytes), bytes});
  return dynamic_pieces.back().memory;
}

}  // namespace emulation
