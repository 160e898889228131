/// The emulator's inside: threads as fibers, barriers, warp instructions, faults. Needs no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>

namespace emulation {

using Place = std::source_location;

/// A kernel broke a rule of CUDA. Thrown out of the launch; the message says which rule and where.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// How many orders of execution there are, and which one the next launches use:
///   0 forward, 1 reverse, 2 and 3 shuffled anew at every pass (all of which move warps in step
///   from one meeting point to the next), 4 to 6 one random warp as far as barriers allow, then
///   another.
/// Blocks are permuted likewise. In odd orders asynchronous copies arrive as late as is allowed.
inline constexpr int kOrders = 7;
void set_order(int order);

struct Index {
  unsigned thread[3], block[3];
};

/// A launch: sizes, a function that publishes the running thread's indices, and the kernel.
struct Launch {
  unsigned grid[3], block[3];
  size_t shared_bytes;
  void (*publish)(const void* context, const Index& index);
  const void* publish_context;
  void (*body)(const void* context);
  const void* body_context;
};
void run(const Launch& launch);

/// What memory checks must know of the running thread.
struct Position {
  uint32_t block;          ///< running number of the block, over all launches
  uint32_t first_block;    ///< of the launch
  uint32_t thread;         ///< in the block
  uint32_t interval;       ///< barriers passed by the block
  uint32_t warp_interval;  ///< full __syncwarp passed by the warp
};
bool in_kernel();
Position position();
/// The running thread's "block (x, y, z), thread (x, y, z)".
std::string describe_thread();
std::string describe(const Place& place);

/// Ends the launch with a Fault. To be called by the running thread; does not return.
[[noreturn]] void fail(const std::string& message);

void barrier(const Place& place);
/// Puts the lanes of `mask` to sleep until all have come; the last one runs `done` for all of them,
/// over their arguments (null for lanes outside of the mask).
void collective(const char* what, unsigned mask, void* argument,
                void (*done)(void** lanes, unsigned mask), const Place& place);
void sync_warp(unsigned mask, const Place& place);

// ---- instructions.cpp
// ----------------------------------------------------------------------------
enum class Shuffle { index, exclusive_or, up, down };
void shuffle(unsigned mask, const void* value, void* result, size_t size, Shuffle kind, int operand,
             int width, const Place& place);
unsigned ballot(unsigned mask, bool predicate, const Place& place);

enum class Half { bf16, fp16 };
/// mma.sync.aligned.m16n8k16.row.col, fp32 accumulation. Sums in double, rounds once.
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Half type, const Place& place);
/// ldmatrix.sync.aligned.m8n8.x4(.trans).shared.b16
void ldmatrix_x4(uint32_t* d, const void* row, bool transposed, const Place& place);

/// cp.async.cg.shared.global 16 bytes, of which `valid_bytes` are read and the rest become zero.
void copy_async16(void* shared, const void* global, int valid_bytes, const Place& place);
void commit_copies();
void wait_copies(int pending_groups);

/// The running thread's asynchronous copies: [0, committed) belong to groups, the rest to none yet.
struct Copies;
Copies& copies();
Copies* make_copies();
void reset_copies(Copies* copies);
bool copies_arrive_late();

// ---- memory.cpp
// ----------------------------------------------------------------------------------
/// This block's piece of static shared memory for a declaration, made when first asked for.
void* static_shared(const void* key, size_t bytes);
/// The block's `number`-th piece of dynamic shared memory.
void* dynamic_shared(int number, size_t bytes);

}  // namespace emulation
