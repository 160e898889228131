// The innermost loops of packed_product: a tile of 6 rows and 16 columns in registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace graft::ops::packed {

constexpr int kTileRows = 6;
constexpr int kTileColumns = 16;

// One step of the depth for all six rows: two vectors of the packed weight, six numbers of x.
// Written in assembly because compilers spill the twelve accumulators (measured: two thirds of the
// processor's peak against nine tenths).
#define GRAFT_TILE_STEP(x_offset, w_offset)                                     \
  "vmovaps " #w_offset                                                          \
  "(%[w]), %%ymm0\n"                                                            \
  "vmovaps 32+" #w_offset                                                       \
  "(%[w]), %%ymm1\n"                                                            \
  "vbroadcastss " #x_offset                                                     \
  "(%[x]), %%ymm2\n"                                                            \
  "vbroadcastss " #x_offset                                                     \
  "(%[x], %[stride]), %%ymm3\n"                                                 \
  "vfmadd231ps %%ymm0, %%ymm2, %%ymm4\n vfmadd231ps %%ymm1, %%ymm2, %%ymm5\n"   \
  "vfmadd231ps %%ymm0, %%ymm3, %%ymm6\n vfmadd231ps %%ymm1, %%ymm3, %%ymm7\n"   \
  "vbroadcastss " #x_offset                                                     \
  "(%[x], %[stride], 2), %%ymm2\n"                                              \
  "vbroadcastss " #x_offset                                                     \
  "(%[x3]), %%ymm3\n"                                                           \
  "vfmadd231ps %%ymm0, %%ymm2, %%ymm8\n vfmadd231ps %%ymm1, %%ymm2, %%ymm9\n"   \
  "vfmadd231ps %%ymm0, %%ymm3, %%ymm10\n vfmadd231ps %%ymm1, %%ymm3, %%ymm11\n" \
  "vbroadcastss " #x_offset                                                     \
  "(%[x3], %[stride]), %%ymm2\n"                                                \
  "vbroadcastss " #x_offset                                                     \
  "(%[x3], %[stride], 2), %%ymm3\n"                                             \
  "vfmadd231ps %%ymm0, %%ymm2, %%ymm12\n vfmadd231ps %%ymm1, %%ymm2, %%ymm13\n" \
  "vfmadd231ps %%ymm0, %%ymm3, %%ymm14\n vfmadd231ps %%ymm1, %%ymm3, %%ymm15\n"

#define GRAFT_TILE_STORE(low, high)                     \
  "vmovups %%ymm" #low ", (%[y])\n vmovups %%ymm" #high \
  ", 32(%[y])\n"                                        \
  "add %[y_stride], %[y]\n"

#define GRAFT_TILE_ADD(low, high)                                                              \
  "vaddps (%[y]), %%ymm" #low ", %%ymm" #low "\n vaddps 32(%[y]), %%ymm" #high ", %%ymm" #high \
  "\n" GRAFT_TILE_STORE(low, high)

// y (+)= x w for six rows of x and a packed panel w [depth][16], 32-byte aligned; strides in
// floats.
inline void six_rows(const float* x, int64_t x_stride, const float* w, int64_t depth, float* y,
                     int64_t y_stride, bool add) {
  const float* x3 = x + 3 * x_stride;
  int64_t fours = depth / 4, rest = depth % 4;
  const int64_t stride = x_stride * 4, out_stride = y_stride * 4, adds = add;
  asm volatile(
      "vxorps %%ymm4, %%ymm4, %%ymm4\n vmovaps %%ymm4, %%ymm5\n vmovaps %%ymm4, %%ymm6\n"
      "vmovaps %%ymm4, %%ymm7\n vmovaps %%ymm4, %%ymm8\n vmovaps %%ymm4, %%ymm9\n"
      "vmovaps %%ymm4, %%ymm10\n vmovaps %%ymm4, %%ymm11\n vmovaps %%ymm4, %%ymm12\n"
      "vmovaps %%ymm4, %%ymm13\n vmovaps %%ymm4, %%ymm14\n vmovaps %%ymm4, %%ymm15\n"
      "test %[fours], %[fours]\n jz 2f\n"
      ".p2align 5\n 1:\n"                               //
      GRAFT_TILE_STEP(0, 0) GRAFT_TILE_STEP(4, 64)      //
      GRAFT_TILE_STEP(8, 128) GRAFT_TILE_STEP(12, 192)  //
      "add $16, %[x]\n add $16, %[x3]\n add $256, %[w]\n"
      "dec %[fours]\n jnz 1b\n"
      "2: test %[rest], %[rest]\n jz 4f\n"
      "3:\n"                 //
      GRAFT_TILE_STEP(0, 0)  //
      "add $4, %[x]\n add $4, %[x3]\n add $64, %[w]\n"
      "dec %[rest]\n jnz 3b\n"
      "4: test %[adds], %[adds]\n jnz 5f\n"                                                       //
      GRAFT_TILE_STORE(4, 5) GRAFT_TILE_STORE(6, 7) GRAFT_TILE_STORE(8, 9)                        //
      GRAFT_TILE_STORE(10, 11) GRAFT_TILE_STORE(12, 13) GRAFT_TILE_STORE(14, 15) "jmp 6f\n 5:\n"  //
      GRAFT_TILE_ADD(4, 5) GRAFT_TILE_ADD(6, 7) GRAFT_TILE_ADD(8, 9)                              //
      GRAFT_TILE_ADD(10, 11) GRAFT_TILE_ADD(12, 13) GRAFT_TILE_ADD(14, 15)                        //
      "6: vzeroupper\n"
      : [x] "+r"(x), [x3] "+r"(x3), [w] "+r"(w), [y] "+r"(y), [fours] "+r"(fours), [rest] "+r"(rest)
      : [stride] "r"(stride), [y_stride] "r"(out_stride), [adds] "r"(adds)
      : "memory", "cc", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8",
        "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", "ymm15");
}

#undef GRAFT_TILE_STEP
#undef GRAFT_TILE_STORE
#undef GRAFT_TILE_ADD

// The same for the one to five rows that are left over.
template <int Rows>
__attribute__((target("avx2,fma"))) void few_rows(const float* x, int64_t x_stride, const float* w,
                                                  int64_t depth, float* y, int64_t y_stride,
                                                  bool add) {
  __m256 low[Rows], high[Rows];
  for (int i = 0; i < Rows; ++i) low[i] = high[i] = _mm256_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    const __m256 w0 = _mm256_load_ps(w + k * kTileColumns),
                 w1 = _mm256_load_ps(w + k * kTileColumns + 8);
    for (int i = 0; i < Rows; ++i) {
      const __m256 value = _mm256_broadcast_ss(x + i * x_stride + k);
      low[i] = _mm256_fmadd_ps(value, w0, low[i]);
      high[i] = _mm256_fmadd_ps(value, w1, high[i]);
    }
  }
  for (int i = 0; i < Rows; ++i, y += y_stride) {
    if (add) {
      low[i] = _mm256_add_ps(low[i], _mm256_loadu_ps(y));
      high[i] = _mm256_add_ps(high[i], _mm256_loadu_ps(y + 8));
    }
    _mm256_storeu_ps(y, low[i]);
    _mm256_storeu_ps(y + 8, high[i]);
  }
}

// Eight rows of eight floats, transposed: to[k * 16 + j] = from[j * stride + k].
__attribute__((target("avx2"))) inline void transpose_8x8(const float* from, int64_t stride,
                                                          float* to) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * stride);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_store_ps(to + i * kTileColumns, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_store_ps(to + (i + 4) * kTileColumns, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

}  // namespace graft::ops::packed
