/// Philox4x32, the counter-based random generator behind every dropout mask.
///
/// Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". A mask
/// depends on its key and on an element's position alone: any tiling, any thread count, CPU and GPU
/// give the same bits, and backward regenerates it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GRAFT_HOST_DEVICE __host__ __device__
#else
#define GRAFT_HOST_DEVICE
#endif

namespace graft {

/// Four 32-bit words: a counter, or the generator's output.
struct Philox4 {
  uint32_t x, y, z, w;
};

/// The rounds graft uses: 7 pass every statistical battery of the source, 10 is that paper's
/// margin.
inline constexpr int kPhiloxRounds = 7;

/// The random words of one counter under a 64-bit key.
template <int Rounds = kPhiloxRounds>
GRAFT_HOST_DEVICE constexpr Philox4 philox4x32(Philox4 counter, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < Rounds; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * counter.x;
    const uint64_t p1 = uint64_t{0xCD9E8D57} * counter.z;
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter.y ^ k0, static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter.w ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return counter;
}

}  // namespace graft
