// What the block formats of GGUF share.
//
// A scale is a half (11 significant bits), a quantised scale has at most 7 and a quantised weight
// at most 8, of which no format combines more than 24: every product below is exact in float32.
// Hence the results do not depend on whether the compiler fuses a product with the following
// addition, and equal the reference bit for bit.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

namespace graft::io {

/// The half at `bytes` as a float.
inline float read_half(const uint8_t* bytes) {
  uint16_t bits = 0;
  std::memcpy(&bits, bytes, sizeof(bits));
  return static_cast<float>(c10::Half(bits, c10::Half::from_bits()));
}

}  // namespace graft::io
