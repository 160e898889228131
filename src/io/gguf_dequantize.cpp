// Blocks of 32 weights. In the 4- and 5-bit formats, byte i of `quants` holds weight i in its low
// half and weight i + 16 in its high half; bit i of `high` is the fifth bit of weight i.
#include <array>

#include "gguf_block.h"
#include "gguf_types.h"

namespace graft::io {
namespace {

constexpr int kBlock = 32;
constexpr int kHalfBlock = kBlock / 2;

/// The 32 fields of 4 bits in `quants`.
std::array<uint8_t, kBlock> unpack_nibbles(const uint8_t* quants) {
  std::array<uint8_t, kBlock> out;
  for (int i = 0; i < kHalfBlock; ++i) {
    out[i] = quants[i] & 15;
    out[i + kHalfBlock] = quants[i] >> 4;
  }
  return out;
}

/// The 32 fields of 5 bits in `high` (4 bytes) and `quants`.
std::array<uint8_t, kBlock> unpack_fives(const uint8_t* high, const uint8_t* quants) {
  uint32_t bits = 0;
  std::memcpy(&bits, high, sizeof(bits));
  auto out = unpack_nibbles(quants);
  for (int i = 0; i < kBlock; ++i) out[i] |= (bits >> i & 1) << 4;
  return out;
}

}  // namespace

// half d, 16 bytes: w = d (q - 8)
void dequantize_q4_0(const uint8_t* blocks, float* out, int64_t count) {
  for (int64_t b = 0; b < count; ++b, blocks += 18, out += kBlock) {
    const float d = read_half(blocks);
    const auto q = unpack_nibbles(blocks + 2);
    for (int i = 0; i < kBlock; ++i) out[i] = d * static_cast<float>(q[i] - 8);
  }
}

// half d, half m, 16 bytes: w = d q + m
void dequantize_q4_1(const uint8_t* blocks, float* out, int64_t count) {
  for (int64_t b = 0; b < count; ++b, blocks += 20, out += kBlock) {
    const float d = read_half(blocks);
    const float m = read_half(blocks + 2);
    const auto q = unpack_nibbles(blocks + 4);
    for (int i = 0; i < kBlock; ++i) out[i] = d * static_cast<float>(q[i]) + m;
  }
}

// half d, 4 bytes, 16 bytes: w = d (q - 16)
void dequantize_q5_0(const uint8_t* blocks, float* out, int64_t count) {
  for (int64_t b = 0; b < count; ++b, blocks += 22, out += kBlock) {
    const float d = read_half(blocks);
    const auto q = unpack_fives(blocks + 2, blocks + 6);
    for (int i = 0; i < kBlock; ++i) out[i] = d * static_cast<float>(q[i] - 16);
  }
}

// half d, half m, 4 bytes, 16 bytes: w = d q + m
void dequantize_q5_1(const uint8_t* blocks, float* out, int64_t count) {
  for (int64_t b = 0; b < count; ++b, blocks += 24, out += kBlock) {
    const float d = read_half(blocks);
    const float m = read_half(blocks + 2);
    const auto q = unpack_fives(blocks + 4, blocks + 8);
    for (int i = 0; i < kBlock; ++i) out[i] = d * static_cast<float>(q[i]) + m;
  }
}

// half d, 32 signed bytes: w = d q
void dequantize_q8_0(const uint8_t* blocks, float* out, int64_t count) {
  for (int64_t b = 0; b < count; ++b, blocks += 34, out += kBlock) {
    const float d = read_half(blocks);
    for (int i = 0; i < kBlock; ++i)
      out[i] = d * static_cast<float>(static_cast<int8_t>(blocks[2 + i]));
  }
}

}  // namespace graft::io
