/// The mask of dropout inside kernels: the bits that the CPU draws (graft/core/philox.h).
#pragma once

#include <graft/core/philox.h>

#include "element.h"
#include "kernels.h"

namespace graft::cuda {

/// The mask that this launch draws.
GPU_DEVICE DropoutMask mask_now(DropoutMask mask) {
  if (mask.later != nullptr) mask.step += *mask.later;
  return mask;
}

/// The mask's row of a row that the matrix has.
GPU_DEVICE uint32_t mask_row(const DropoutMask& mask, int64_t row) {
  return static_cast<uint32_t>(mask.rows == nullptr ? row : mask.rows[row]);
}

/// The random words of the columns 8 octet .. 8 octet + 7 of a row of the mask.
GPU_DEVICE Philox4 mask_words(const DropoutMask& mask, uint32_t row, int64_t octet) {
  return philox4x32({static_cast<uint32_t>(octet), row, mask.site, mask.step}, mask.seed);
}

/// Whether element i of eight stays: its 16 bits are at least the threshold.
GPU_DEVICE bool stays(const Philox4& random, int i, uint32_t threshold) {
  const uint32_t words[4] = {random.x, random.y, random.z, random.w};
  return (words[i / 2] >> (16 * (i % 2)) & 0xffffu) >= threshold;
}

/// The same of all eight, as bits.
GPU_DEVICE uint32_t staying(const DropoutMask& mask, uint32_t row, int64_t octet) {
  const Philox4 random = mask_words(mask, row, octet);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(stays(random, i, mask.threshold)) << i;
  return bits;
}

/// Sets the dropped elements to zero; the factor 1 / (1 - p) is left to whoever sums them. Behind
/// the last of `rows` there are zeros, and no row of the mask.
template <class T>
GPU_DEVICE void drop(Octet<T>& x, const DropoutMask& mask, int64_t row, int64_t rows,
                     int64_t octet) {
  if (mask.threshold == 0 || row >= rows) return;
  const Philox4 random = mask_words(mask, mask_row(mask, row), octet);
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
