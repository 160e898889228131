// Super-blocks of 256 weights: groups of 16 or 32 weights have a small integer scale (and offset)
// that multiplies the super-block's half-precision one.
#include <array>

#include "gguf_block.h"
#include "gguf_types.h"

namespace graft::io {
namespace {

constexpr int kBlock = 256;

struct ScalesAndOffsets {
  std::array<uint8_t, 8> scale;
  std::array<uint8_t, 8> offset;
};

/// The eight 6-bit scales and offsets that Q4_K and Q5_K pack into 12 bytes: the low 6 bits of
/// bytes 0 to 3 and 4 to 7 are scales and offsets 0 to 3; those of 4 to 7 have their low 4 bits in
/// bytes 8 to 11 (scale low half, offset high half) and their upper 2 bits on top of the first
/// eight bytes.
ScalesAndOffsets unpack_scales(const uint8_t* packed) {
  ScalesAndOffsets out;
  for (int i = 0; i < 4; ++i) {
    out.scale[i] = packed[i] & 63;
    out.offset[i] = packed[4 + i] & 63;
    out.scale[4 + i] = (packed[8 + i] & 15) | (packed[i] >> 6 << 4);
    out.offset[4 + i] = (packed[8 + i] >> 4) | (packed[4 + i] >> 6 << 4);
  }
  return out;
}

/// The sixteen 6-bit scales that Q3_K packs into 12 bytes: scale i has its low 4 bits in byte i mod
/// 8 (upper half from i = 8 on) and its upper 2 bits in byte 8 + i mod 4.
std::array<int, 16> unpack_q3_scales(const uint8_t* packed) {
  std::array<int, 16> out;
  for (int i = 0; i < 16; ++i) {
    const int low = packed[i % 8] >> (i / 8 * 4) & 15;
    const int high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
    out[i] = (low | high << 4) - 32;
  }
  return out;
}

}  // namespace

// 16 bytes of scales (low half) and offsets (high half), 64 bytes of quants, half d, half dmin: w =
// d s q - dmin o. Group g = 8 h + 2 j + k of 16 weights: bits 2j and up of bytes 32 h + 16 k to 32
// h + 16 k + 15.
void dequantize_q2_k(const uint8_t* blocks, float* out, int64_t count) {
  for (int64_t b = 0; b < count; ++b, blocks += 84, out += kBlock) {
    const float d = read_half(blocks + 80);
    const float dmin = read_half(blocks + 82);
    for (int g = 0; g < 16; ++g) {
      const float scale = d * static_cast<float>(blocks[g] & 15);
      const float offset = dmin * static_cast<float>(blocks[g] >> 4);
      const uint8_t* const quants = blocks + 16 + g / 8 * 32 + g % 2 * 16;
      const int shift = g / 2 % 4 * 2;
      for (int i = 0; i < 16; ++i) {
        out[16 * g + i] = scale * static_cast<float>(quants[i] >> shift & 3) - offset;
      }
    }
  }
}

// 32 bytes of third bits, 64 bytes of quants, 12 bytes of scales, half d: w = d s q, q in [-4, 3].
// Quants as in Q2_K; the third bit of group g is bit g / 2 of bytes 16 (g mod 2) and up, and a set
// bit adds nothing.
void dequantize_q3_k(const uint8_t* blocks, float* out, int64_t count) {
  for (int64_t b = 0; b < count; ++b, blocks += 110, out += kBlock) {
    const auto scales = unpack_q3_scales(blocks + 96);
    const float d = read_half(blocks + 108);
    for (int g = 0; g < 16; ++g) {
      const float scale = d * static_cast<float>(scales[g]);
      const uint8_t* const high = blocks + g % 2 * 16;
      const uint8_t* const quants = blocks + 32 + g / 8 * 32 + g % 2 * 16;
      const int shift = g / 2 % 4 * 2;
      for (int i = 0; i < 16; ++i) {
        const int q = (quants[i] >> shift & 3) - (high[i] >> (g / 2) & 1 ? 0 : 4);
        out[16 * g + i] = scale * static_cast<float>(q);
      }
    }
  }
}

// half d, half dmin, 12 bytes of scales, 128 bytes of quants: w = d s q - dmin o.
// Group g of 32 weights: the low (g even) or high half of bytes 32 (g / 2) and up.
void dequantize_q4_k(const uint8_t* blocks, float* out, int64_t count) {
  for (int64_t b = 0; b < count; ++b, blocks += 144, out += kBlock) {
    const float d = read_half(blocks);
    const float dmin = read_half(blocks + 2);
    const auto [scales, offsets] = unpack_scales(blocks + 4);
    for (int g = 0; g < 8; ++g) {
      const float scale = d * static_cast<float>(scales[g]);
      const float offset = dmin * static_cast<float>(offsets[g]);
      const uint8_t* const quants = blocks + 16 + g / 2 * 32;
      const int shift = g % 2 * 4;
      for (int i = 0; i < 32; ++i) {
        out[32 * g + i] = scale * static_cast<float>(quants[i] >> shift & 15) - offset;
      }
    }
  }
}

// As Q4_K, with 32 bytes of fifth bits before the quants: that of group g is bit g.
void dequantize_q5_k(const uint8_t* blocks, float* out, int64_t count) {
  for (int64_t b = 0; b < count; ++b, blocks += 176, out += kBlock) {
    const float d = read_half(blocks);
    const float dmin = read_half(blocks + 2);
    const auto [scales, offsets] = unpack_scales(blocks + 4);
    const uint8_t* const high = blocks + 16;
    for (int g = 0; g < 8; ++g) {
      const float scale = d * static_cast<float>(scales[g]);
      const float offset = dmin * static_cast<float>(offsets[g]);
      const uint8_t* const quants = blocks + 48 + g / 2 * 32;
      const int shift = g % 2 * 4;
      for (int i = 0; i < 32; ++i) {
        const int q = (quants[i] >> shift & 15) | (high[i] >> g & 1) << 4;
        out[32 * g + i] = scale * static_cast<float>(q) - offset;
      }
    }
  }
}

// 128 bytes of low halves, 64 bytes of upper 2 bits, 16 signed scales, half d: w = d s (q - 32).
// Weight 128 h + 32 j + i: low half in byte 64 h + 32 (j mod 2) + i (its high half for j >= 2),
// upper bits 2j and up of byte 32 h + i; a scale serves 16 weights.
void dequantize_q6_k(const uint8_t* blocks, float* out, int64_t count) {
  for (int64_t b = 0; b < count; ++b, blocks += 210, out += kBlock) {
    const float d = read_half(blocks + 208);
    for (int g = 0; g < 16; ++g) {
      const float scale = d * static_cast<float>(static_cast<int8_t>(blocks[192 + g]));
      const int h = g / 8;
      const int j = g / 2 % 4;
      const uint8_t* const low = blocks + 64 * h + 32 * (j % 2) + 16 * (g % 2);
      const uint8_t* const high = blocks + 128 + 32 * h + 16 * (g % 2);
      for (int i = 0; i < 16; ++i) {
        const int q = (low[i] >> (j / 2 * 4) & 15) | (high[i] >> (2 * j) & 3) << 4;
        out[16 * g + i] = scale * static_cast<float>(q - 32);
      }
    }
  }
}

}  // namespace graft::io
