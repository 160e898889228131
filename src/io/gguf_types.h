// The element types of GGUF files.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace graft::io {

/// Expands `count` blocks to float32.
using DequantizeBlocks = void (*)(const uint8_t* blocks, float* out, int64_t count);

/// One element type. A row of a tensor is a whole number of blocks.
struct GgufType {
  uint32_t id;
  const char* name;
  uint32_t block_elements;
  uint32_t block_bytes;
  at::ScalarType dtype;         ///< what a tensor is read as; Undefined: graft cannot read the type
  DequantizeBlocks dequantize;  ///< null for types that ATen holds as they are
};

/// The type of that number; null when no GGUF file may hold it.
const GgufType* find_gguf_type(uint32_t id);

// Blocks of 32 weights: gguf_dequantize.cpp.
void dequantize_q4_0(const uint8_t* blocks, float* out, int64_t count);
void dequantize_q4_1(const uint8_t* blocks, float* out, int64_t count);
void dequantize_q5_0(const uint8_t* blocks, float* out, int64_t count);
void dequantize_q5_1(const uint8_t* blocks, float* out, int64_t count);
void dequantize_q8_0(const uint8_t* blocks, float* out, int64_t count);

// Super-blocks of 256 weights with quantised scales: gguf_dequantize_k.cpp.
void dequantize_q2_k(const uint8_t* blocks, float* out, int64_t count);
void dequantize_q3_k(const uint8_t* blocks, float* out, int64_t count);
void dequantize_q4_k(const uint8_t* blocks, float* out, int64_t count);
void dequantize_q5_k(const uint8_t* blocks, float* out, int64_t count);
void dequantize_q6_k(const uint8_t* blocks, float* out, int64_t count);

}  // namespace graft::io
