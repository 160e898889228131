// Warp instructions as the PTX manual defines them (ISA 8.x, sections on shfl.sync, mma.m16n8k16,
// ldmatrix and cp.async). Each lane reads and writes its own memory, so that faults name it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "memory.h"
#include "scheduler.h"

namespace emulation {
namespace {

constexpr int kWarp = 32;

void touch(const void* memory, size_t bytes, Access kind, const Place& place) {
  if (checker != nullptr) checker->access(memory, bytes, kind, place);
}

void require_aligned(const void* memory, const char* what, const Place& place) {
  if (reinterpret_cast<uintptr_t>(memory) % 16 != 0)
    fail(std::string(what) + " of " + describe(place) + ": an address must be a multiple of 16");
}

struct ShuffleLane {
  const void* value;
  void* result;
  size_t size;
  Shuffle kind;
  int operand, width;
};

int source_lane(const ShuffleLane& lane, int self) {
  const int first = self / lane.width * lane.width, last = first + lane.width - 1;
  switch (lane.kind) {
    case Shuffle::index:
      return first + (lane.operand & (lane.width - 1));
    case Shuffle::exclusive_or:
      return (self ^ lane.operand) > last ? self : self ^ lane.operand;
    case Shuffle::up:
      return self - lane.operand < first ? self : self - lane.operand;
    case Shuffle::down:
      return self + lane.operand > last ? self : self + lane.operand;
  }
  return self;
}

void shuffle_lanes(void** lanes, unsigned mask) {
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const auto& lane = *static_cast<ShuffleLane*>(lanes[i]);
    const int from = source_lane(lane, i);
    if (lanes[from] == nullptr)
      std::memset(lane.result, 0xff, lane.size);  // undefined on the device
    else
      std::memcpy(lane.result, static_cast<ShuffleLane*>(lanes[from])->value, lane.size);
  }
}

struct BallotLane {
  bool predicate;
  unsigned result;
};

struct MmaLane {
  float* d;
  const uint32_t *a, *b;
  Half type;
};

double half_of(uint32_t word, int high, Half type) {
  const auto bits = static_cast<uint16_t>(word >> (16 * high));
  if (type == Half::bf16) return __bfloat162float(__ushort_as_bfloat16(bits));
  return __half2float(__ushort_as_half(bits));
}

// Fragments, with g = lane / 4 and t = lane % 4, h = 0 or 1 for the low or high half of a register:
//   A[g + 8 (r & 1)][2t + h + 8 (r >> 1)] = a[r]   B[2t + h + 8r][g] = b[r]
//   D[g + 8 (r >> 1)][2t + (r & 1)] = d[r]
void mma_lanes(void** lanes, unsigned) {
  double a[16][16], b[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const auto& lane = *static_cast<MmaLane*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; ++r) {
      for (int h = 0; h < 2; ++h)
        a[g + 8 * (r & 1)][2 * t + h + 8 * (r >> 1)] = half_of(lane.a[r], h, lane.type);
    }
    for (int r = 0; r < 2; ++r) {
      for (int h = 0; h < 2; ++h) b[2 * t + h + 8 * r][g] = half_of(lane.b[r], h, lane.type);
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    auto& lane = *static_cast<MmaLane*>(lanes[l]);
    for (int r = 0; r < 4; ++r) {
      const int row = l / 4 + 8 * (r >> 1), column = 2 * (l % 4) + (r & 1);
      double sum = lane.d[r];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lane.d[r] = static_cast<float>(sum);
    }
  }
}

struct MatrixLane {
  const void* row;
  uint16_t values[8];
  uint32_t* d;
  bool transposed;
};

// Lane 8m + i names row i of matrix m. Lane l receives word l % 4 of row l / 4 of each matrix, or
// of the transposed matrix.
void ldmatrix_lanes(void** lanes, unsigned) {
  for (int l = 0; l < kWarp; ++l) {
    const auto& lane = *static_cast<MatrixLane*>(lanes[l]);
    for (int m = 0; m < 4; ++m) {
      const auto at = [&](int row, int column) -> uint32_t {
        return static_cast<MatrixLane*>(lanes[8 * m + row])->values[column];
      };
      const int g = l / 4, t = l % 4;
      lane.d[m] = lane.transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16
                                  : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
  }
}

struct Copy {
  void* shared;
  const void* global;
  int valid_bytes;
  Place place;
};

void carry_out(const Copy& copy) {
  char bytes[16] = {};
  std::memcpy(bytes, copy.global, static_cast<size_t>(copy.valid_bytes));
  touch(copy.shared, 16, Access::write, copy.place);
  std::memcpy(copy.shared, bytes, 16);
}

}  // namespace

void shuffle(unsigned mask, const void* value, void* result, size_t size, Shuffle kind, int operand,
             int width, const Place& place) {
  ShuffleLane lane = {value, result, size, kind, operand, width};
  collective("a shuffle", mask, &lane, shuffle_lanes, place);
}

unsigned ballot(unsigned mask, bool predicate, const Place& place) {
  BallotLane lane = {predicate, 0};
  collective(
      "__ballot_sync", mask, &lane,
      [](void** lanes, unsigned members) {
        unsigned votes = 0;
        for (int i = 0; i < kWarp; ++i) {
          if (lanes[i] != nullptr && static_cast<BallotLane*>(lanes[i])->predicate)
            votes |= 1u << i;
        }
        for (int i = 0; i < kWarp; ++i) {
          if ((members >> i & 1) != 0) static_cast<BallotLane*>(lanes[i])->result = votes;
        }
      },
      place);
  return lane.result;
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Half type, const Place& place) {
  MmaLane lane = {d, a, b, type};
  collective("mma", 0xffffffffu, &lane, mma_lanes, place);
}

void ldmatrix_x4(uint32_t* d, const void* row, bool transposed, const Place& place) {
  require_aligned(row, "ldmatrix", place);
  MatrixLane lane = {row, {}, d, transposed};
  touch(row, 16, Access::read, place);
  std::memcpy(lane.values, row, 16);
  collective(transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, &lane, ldmatrix_lanes, place);
}

struct Copies {
  std::vector<Copy> list;
  std::vector<size_t> groups;  // how many copies each committed group holds
};

Copies* make_copies() {
  return new Copies;
}

void reset_copies(Copies* copies) {
  copies->list.clear();
  copies->groups.clear();
}

void copy_async16(void* shared, const void* global, int valid_bytes, const Place& place) {
  require_aligned(shared, "cp.async", place);
  require_aligned(global, "cp.async", place);
  if (valid_bytes < 0 || valid_bytes > 16)
    fail("cp.async of " + describe(place) + ": bad count of bytes");
  if (valid_bytes > 0) touch(global, static_cast<size_t>(valid_bytes), Access::read, place);
  const Copy copy = {shared, global, valid_bytes, place};
  if (!copies_arrive_late()) return carry_out(copy);
  // Until it arrives, what lies there is nobody's business.
  touch(shared, 16, Access::write, place);
  std::memset(shared, 0xff, 16);
  if (checker != nullptr) checker->mark(shared, 16, Checker::State::uninitialised);
  copies().list.push_back(copy);
}

void commit_copies() {
  Copies& mine = copies();
  size_t grouped = 0;
  for (const size_t size : mine.groups) grouped += size;
  mine.groups.push_back(mine.list.size() - grouped);
}

void wait_copies(int pending_groups) {
  Copies& mine = copies();
  while (mine.groups.size() > static_cast<size_t>(pending_groups)) {
    const auto arrived = static_cast<std::ptrdiff_t>(mine.groups.front());
    for (std::ptrdiff_t i = 0; i < arrived; ++i) carry_out(mine.list[static_cast<size_t>(i)]);
    mine.list.erase(mine.list.begin(), mine.list.begin() + arrived);
    mine.groups.erase(mine.groups.begin());
  }
}

}  // namespace emulation
