/// Numbers in memory (bf16, fp16, fp32), eight at a time, and the tensor cores' fragments of them.
///
/// fp32 goes through the same bf16 instruction as a sum of three bf16 numbers, x = x0 + x1 + x2,
/// each the rounded rest of those before: 24 bits in three times 8. Of the nine products six are
/// kept; the others are below 2^-25 of the whole. Products of rank r do r multiplications a number
/// read, so at the ranks here even six times as many leave the kernels bound by memory. (An
/// infinite fp32 input gives NaN instead of infinity.)
#pragma once

#include <type_traits>

#include "gpu.h"

namespace graft::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

GPU_DEVICE float to_float(float v) {
  return v;
}
GPU_DEVICE float to_float(bf16 v) {
  return __bfloat162float(v);
}
GPU_DEVICE float to_float(fp16 v) {
  return __half2float(v);
}

template <class T>
GPU_DEVICE T from_float(float v) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(v);
  else if constexpr (std::is_same_v<T, fp16>)
    return __float2half_rn(v);
  else
    return v;
}

GPU_DEVICE uint32_t bits_of(bf16 v) {
  return __bfloat16_as_ushort(v);
}
GPU_DEVICE uint32_t bits_of(fp16 v) {
  return __half_as_ushort(v);
}

/// N neighbouring elements, moved as one vector where memory is aligned for it.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Group {
  T v[N];
};

template <class T, int N>
GPU_DEVICE Group<T, N> load_aligned(const T* p) {
  return *reinterpret_cast<const Group<T, N>*>(p);
}

/// Two elements that are neighbours along the summed dimension of a product.
template <class T>
struct Pair {
  uint32_t bits;
};
template <>
struct Pair<float> {
  float low, high;
};

template <class T>
GPU_DEVICE Pair<T> make_pair(T low, T high) {
  if constexpr (std::is_same_v<T, float>)
    return {low, high};
  else
    return {bits_of(low) | bits_of(high) << 16};
}

/// Eight neighbouring elements of a row: the columns of one counter of the dropout generator.
template <class T>
struct alignas(16) Octet {
  uint32_t words[4];
};
template <>
struct alignas(16) Octet<float> {
  float v[8];
};

template <class T>
GPU_DEVICE Octet<T> zero_octet() {
  return {};
}

/// All eight from memory aligned to 16 bytes.
template <class T>
GPU_DEVICE Octet<T> load_octet(const T* p) {
  return *reinterpret_cast<const Octet<T>*>(p);
}

GPU_DEVICE float element(const Octet<float>& x, int i) {
  return x.v[i];
}
template <class T>
GPU_DEVICE T element(const Octet<T>& x, int i) {
  const auto bits = static_cast<unsigned short>(x.words[i / 2] >> (16 * (i % 2)));
  if constexpr (std::is_same_v<T, bf16>)
    return __ushort_as_bfloat16(bits);
  else
    return __ushort_as_half(bits);
}

template <class T>
GPU_DEVICE Octet<T> make_octet(const T (&v)[8]) {
  Octet<T> x;
  for (int i = 0; i < 8; ++i) {
    if constexpr (std::is_same_v<T, float>)
      x.v[i] = v[i];
    else
      x.words[i / 2] = i % 2 == 0 ? bits_of(v[i]) : x.words[i / 2] | bits_of(v[i]) << 16;
  }
  return x;
}

/// The first `valid` of eight, zeros after; `aligned`: p is a multiple of 16 bytes.
template <class T>
GPU_DEVICE Octet<T> load_octet(const T* p, int64_t valid, bool aligned) {
  if (aligned && valid >= 8) return load_octet(p);
  if (valid <= 0) return zero_octet<T>();
  T v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < valid ? p[i] : from_float<T>(0.0f);
  return make_octet(v);
}

template <class T>
GPU_DEVICE void store_octet(T* p, const Octet<T>& x, int64_t valid, bool aligned) {
  if (aligned && valid >= 8) {
    *reinterpret_cast<Octet<T>*>(p) = x;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < valid) p[i] = element(x, i);
  }
}

/// Elements 2i and 2i + 1.
template <class T>
GPU_DEVICE Pair<T> pair_of(const Octet<T>& x, int i) {
  if constexpr (std::is_same_v<T, float>)
    return {x.v[2 * i], x.v[2 * i + 1]};
  else
    return {x.words[i]};
}

/// Element i of one octet and of another: neighbours in a column.
template <class T>
GPU_DEVICE Pair<T> pair_across(const Octet<T>& x, const Octet<T>& y, int i) {
  if constexpr (std::is_same_v<T, float>)
    return {x.v[i], y.v[i]};
  else
    return {gpu::byte_permute(x.words[i / 2], y.words[i / 2], i % 2 == 0 ? 0x5410 : 0x7632)};
}

/// A thread's share of an operand: N pairs, fp32 as three bf16 parts.
template <class T, int N>
struct Fragment {
  static constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;
  uint32_t words[kParts][N];

  GPU_DEVICE void set(int i, Pair<T> pair) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint32_t low = bits_of(__float2bfloat16_rn(pair.low)),
                       high = bits_of(__float2bfloat16_rn(pair.high));
        words[part][i] = low | high << 16;
        pair.low -= gpu::float_of_bits(low << 16);
        pair.high -= gpu::float_of_bits(high << 16);
      }
    } else {
      words[0][i] = pair.bits;
    }
  }
};

/// d += a b for tiles of 16 x 16 and 16 x 8, as gpu::mma_m16n8k16 lays them out.
template <class T>
GPU_DEVICE void multiply_add(float (&d)[4], const Fragment<T, 4>& a, const Fragment<T, 2>& b) {
  if constexpr (std::is_same_v<T, float>) {
    // The smallest first.
    gpu::mma_m16n8k16(d, a.words[0], b.words[2], bf16{});
    gpu::mma_m16n8k16(d, a.words[2], b.words[0], bf16{});
    gpu::mma_m16n8k16(d, a.words[1], b.words[1], bf16{});
    gpu::mma_m16n8k16(d, a.words[0], b.words[1], bf16{});
    gpu::mma_m16n8k16(d, a.words[1], b.words[0], bf16{});
    gpu::mma_m16n8k16(d, a.words[0], b.words[0], bf16{});
  } else {
    gpu::mma_m16n8k16(d, a.words[0], b.words[0], T{});
  }
}

}  // namespace graft::cuda
