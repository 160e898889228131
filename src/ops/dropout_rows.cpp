#include "dropout_rows.h"

#include <graft/core/philox.h>

#include <algorithm>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define GRAFT_DROPOUT_AVX2 1
#endif

namespace graft::ops {
namespace {

constexpr int kWords = 8;  // 16-bit words of one Philox counter

// Elements [begin, columns), one counter at a time; begin is a multiple of kWords.
template <bool Accumulate, typename T>
void plain_row(T* target, const T* x, int64_t begin, int64_t columns, const RowMask& mask) {
  const T scale = static_cast<T>(mask.scale);
  for (; begin < columns; begin += kWords) {
    const Philox4 random = philox4x32({static_cast<uint32_t>((mask.first + begin) / kWords),
                                       mask.row, mask.key.site, mask.key.step},
                                      mask.key.seed);
    const uint32_t words[4] = {random.x, random.y, random.z, random.w};
    const int64_t count = std::min<int64_t>(kWords, columns - begin);
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t word = words[j / 2] >> (16 * (j % 2)) & 0xFFFF;
      const T value = word >= mask.threshold ? scale * x[begin + j] : T{0};
      target[begin + j] = Accumulate ? target[begin + j] + value : value;
    }
  }
}

#ifdef GRAFT_DROPOUT_AVX2

__attribute__((target("avx2"))) inline __m256i all(uint64_t value) {
  return _mm256_set1_epi64x(static_cast<int64_t>(value));
}

// Four counters at once, each word in the lower half of a 64-bit lane. What the upper halves hold
// does not matter: the multiplication reads the lower ones.
struct FourCounters {
  __m256i x, y, z, w;
};

__attribute__((target("avx2"))) inline FourCounters four_philox(uint32_t block,
                                                                const RowMask& mask) {
  FourCounters c = {_mm256_add_epi64(all(block), _mm256_set_epi64x(3, 2, 1, 0)), all(mask.row),
                    all(mask.key.site), all(mask.key.step)};
  const __m256i m0 = all(0xD2511F53), m1 = all(0xCD9E8D57);
  uint32_t k0 = static_cast<uint32_t>(mask.key.seed),
           k1 = static_cast<uint32_t>(mask.key.seed >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m256i p0 = _mm256_mul_epu32(c.x, m0), p1 = _mm256_mul_epu32(c.z, m1);
    c.x = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c.y), all(k0));
    c.z = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c.w), all(k1));
    c.y = p1;
    c.w = p0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

// Eight elements under one counter's words.
template <bool Accumulate>
__attribute__((target("avx2"))) inline void eight(float* target, const float* x, __m128i words,
                                                  __m128i threshold, __m256 scale) {
  const __m128i stays = _mm_cmpeq_epi16(_mm_max_epu16(words, threshold), words);
  const __m256 value = _mm256_and_ps(_mm256_castsi256_ps(_mm256_cvtepi16_epi32(stays)),
                                     _mm256_mul_ps(scale, _mm256_loadu_ps(x)));
  _mm256_storeu_ps(target, Accumulate ? _mm256_add_ps(_mm256_loadu_ps(target), value) : value);
}

// As many whole groups of 32 elements as there are; returns where it stopped.
template <bool Accumulate>
__attribute__((target("avx2"))) int64_t avx2_row(float* target, const float* x, int64_t columns,
                                                 const RowMask& mask) {
  const __m128i threshold = _mm_set1_epi16(static_cast<int16_t>(mask.threshold));
  const __m256 scale = _mm256_set1_ps(static_cast<float>(mask.scale));
  int64_t begin = 0;
  for (; begin + 4 * kWords <= columns; begin += 4 * kWords) {
    const FourCounters c = four_philox(static_cast<uint32_t>((mask.first + begin) / kWords), mask);
    const __m256i xy = _mm256_blend_epi32(c.x, _mm256_slli_epi64(c.y, 32), 0xAA);
    const __m256i zw = _mm256_blend_epi32(c.z, _mm256_slli_epi64(c.w, 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(xy, zw);  // the words of counters 0 and 2
    const __m256i odd = _mm256_unpackhi_epi64(xy, zw);   // of 1 and 3
    float* t = target + begin;
    const float* v = x + begin;
    eight<Accumulate>(t, v, _mm256_castsi256_si128(even), threshold, scale);
    eight<Accumulate>(t + 8, v + 8, _mm256_castsi256_si128(odd), threshold, scale);
    eight<Accumulate>(t + 16, v + 16, _mm256_extracti128_si256(even, 1), threshold, scale);
    eight<Accumulate>(t + 24, v + 24, _mm256_extracti128_si256(odd, 1), threshold, scale);
  }
  return begin;
}

#endif

template <bool Accumulate>
void float_row(float* target, const float* x, int64_t columns, const RowMask& mask) {
  int64_t begin = 0;
#ifdef GRAFT_DROPOUT_AVX2
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) begin = avx2_row<Accumulate>(target, x, columns, mask);
#endif
  plain_row<Accumulate>(target, x, begin, columns, mask);
}

}  // namespace

void mask_row(float* target, const float* x, int64_t columns, const RowMask& mask) {
  float_row<false>(target, x, columns, mask);
}
void mask_row(double* target, const double* x, int64_t columns, const RowMask& mask) {
  plain_row<false>(target, x, 0, columns, mask);
}
void add_masked_row(float* target, const float* x, int64_t columns, const RowMask& mask) {
  float_row<true>(target, x, columns, mask);
}
void add_masked_row(double* target, const double* x, int64_t columns, const RowMask& mask) {
  plain_row<true>(target, x, 0, columns, mask);
}

}  // namespace graft::ops
