// Scalar pieces of vectorised loops: conversions of stored numbers and an exponential without
// branches. Everything is forced inline so that each clone of a GRAFT_SIMD function vectorises its
// own copy.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__GNUC__)
#define GRAFT_INLINE __attribute__((always_inline)) inline
#else
#define GRAFT_INLINE inline
#endif

namespace graft::ops {

// What numbers stored as T are computed in: float64 for float64, float32 for the rest.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

GRAFT_INLINE double load(double value) {
  return value;
}
GRAFT_INLINE float load(float value) {
  return value;
}
GRAFT_INLINE float load(c10::BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.x) << 16);
}
GRAFT_INLINE float load(c10::Half value) {
  return static_cast<float>(value);
}

// The number as T, rounded to nearest even.
template <class T>
GRAFT_INLINE T store(Compute<T> value) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return T(static_cast<uint16_t>(value != value ? 0x7fc0u : rounded), T::from_bits());
  } else {
    return static_cast<T>(
        value);  // LibTorch's Half rounds to nearest even, beyond 65504 to infinity
  }
}

GRAFT_INLINE float power_of_two(uint32_t exponent) {
  return std::bit_cast<float>((exponent + 127u) << 23);
}

// e^x within 2 units in the last place, subnormal results and NaN included.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r is its Taylor polynomial of degree 7, whose remainder is
// a tenth of a unit; 2^n is applied in two factors, since n itself may lie outside of a float's
// exponents.
GRAFT_INLINE float fast_exp(float argument) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;  // 9 bits, so that n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr auto kLimitBits = std::bit_cast<uint32_t>(105.0f);  // e^105 is infinite, e^-105 zero
  constexpr uint32_t kInfinityBits = 0x7f800000u;
  // Held to [-105, 105] in the integers, which cannot trap: with float comparisons GCC would keep
  // branches and not vectorise. NaN lies above the infinity and passes.
  const auto bits = std::bit_cast<uint32_t>(argument);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const bool beyond = (magnitude > kLimitBits) & (magnitude <= kInfinityBits);
  const uint32_t held = beyond ? kLimitBits : magnitude;
  const float x = std::bit_cast<float>((bits & 0x80000000u) | held);
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound);
  const auto half = static_cast<uint32_t>(static_cast<int32_t>(exponent) >> 1);
  return p * power_of_two(half) * power_of_two(exponent - half);
}

// The exact path for gradient checks; not vectorised.
GRAFT_INLINE double fast_exp(double x) {
  return std::exp(x);
}

}  // namespace graft::ops
