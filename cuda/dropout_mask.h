/// The mask of dropout inside kernels: the bits that the CPU draws (graft/core/philox.h).
#pragma once

#include <graft/core/philox.h>

#include "element.h"
#include "kernels.h"

namespace graft::cuda {

/// The random words of the columns 8 octet .. 8 octet + 7 of a row.
GPU_DEVICE Philox4 mask_words(const DropoutMask& mask, int64_t row, int64_t octet) {
  return philox4x32(
      {static_cast<uint32_t>(octet), static_cast<uint32_t>(row), mask.site, mask.step}, mask.seed);
}

/// Whether element i of eight stays: its 16 bits are at least the threshold.
GPU_DEVICE bool stays(const Philox4& random, int i, uint32_t threshold) {
  const uint32_t words[4] = {random.x, random.y, random.z, random.w};
  return (words[i / 2] >> (16 * (i % 2)) & 0xffffu) >= threshold;
}

/// Sets the dropped elements to zero; the factor 1 / (1 - p) is left to whoever sums them.
template <class T>
GPU_DEVICE void drop(Octet<T>& x, const DropoutMask& mask, int64_t row, int64_t octet) {
  if (mask.threshold == 0) return;
  const Philox4 random = mask_words(mask, row, octet);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool low = stays(random, 2 * i, mask.threshold),
               high = stays(random, 2 * i + 1, mask.threshold);
    if constexpr (std::is_same_v<T, float>) {
      x.v[2 * i] = low ? x.v[2 * i] : 0.0f;
      x.v[2 * i + 1] = high ? x.v[2 * i + 1] : 0.0f;
    } else {
      x.words[i] &= (low ? 0x0000ffffu : 0u) | (high ? 0xffff0000u : 0u);
    }
  }
}

}  // namespace graft::cuda
