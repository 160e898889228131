#include "expert_kernels.h"

#include <graft/core/simd.h>

#include "vector_math.h"

namespace graft::ops {
namespace {

template <class T>
GRAFT_INLINE void add_scaled_body(T* target, const T* x, T factor, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) target[j] += factor * x[j];
}

template <class T>
GRAFT_INLINE void scaled_body(T* target, const T* x, T factor, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) target[j] = factor * x[j];
}

template <class T>
GRAFT_INLINE T dot_body(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

// target = x + the products of K rows of the factor at once: both are touched once for all of them.
template <int K, class T, class From>
GRAFT_INLINE void add_some(T* target, const From* x, const T* s_in, const T* factor, int64_t stride,
                           int64_t n) {
  T s[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) s[k] = s_in[k];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    T sum = load(x[j]);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) sum += s[k] * factor[k * stride + j];
    target[j] = sum;
  }
}

template <class T>
GRAFT_INLINE void add_products_body(T* target, const T* s, const T* factor, int64_t stride,
                                    int64_t r, int64_t n) {
  int64_t k = 0;
  for (; k + 8 <= r; k += 8) add_some<8>(target, target, s + k, factor + k * stride, stride, n);
  for (; k + 2 <= r; k += 2) add_some<2>(target, target, s + k, factor + k * stride, stride, n);
  for (; k < r; ++k) add_some<1>(target, target, s + k, factor + k * stride, stride, n);
}

template <class T, class From>
GRAFT_INLINE void products_onto_body(T* target, const From* x, const T* s, const T* factor,
                                     int64_t stride, int64_t r, int64_t n) {
  const int64_t first = r >= 8 ? 8 : r >= 2 ? 2 : 1;
  if (first == 8) {
    add_some<8>(target, x, s, factor, stride, n);
  } else if (first == 2) {
    add_some<2>(target, x, s, factor, stride, n);
  } else {
    add_some<1>(target, x, s, factor, stride, n);
  }
  add_products_body(target, s + first, factor + first * stride, stride, r - first, n);
}

template <class T>
GRAFT_INLINE void products_body(T* out, const T* x, const T* factor, int64_t stride, int64_t r,
                                int64_t n) {
  int64_t k = 0;
  for (; k + 4 <= r; k += 4) {
    const T *a = factor + k * stride, *b = a + stride, *c = b + stride, *d = c + stride;
    T sa = 0, sb = 0, sc = 0, sd = 0;
#pragma omp simd reduction(+ : sa, sb, sc, sd)
    for (int64_t j = 0; j < n; ++j) {
      sa += x[j] * a[j];
      sb += x[j] * b[j];
      sc += x[j] * c[j];
      sd += x[j] * d[j];
    }
    out[k] = sa;
    out[k + 1] = sb;
    out[k + 2] = sc;
    out[k + 3] = sd;
  }
  for (; k < r; ++k) out[k] = dot_body(x, factor + k * stride, n);
}

// K rows of the factor and R of x.
template <class T, int K, int R>
GRAFT_INLINE void outer_some(T* factor, int64_t stride, const T* s_in, int64_t s_stride, const T* x,
                             int64_t x_stride, int64_t n) {
  T s[R][K];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) s[i][k] = s_in[i * s_stride + k];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      T sum = factor[k * stride + j];
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) sum += s[i][k] * x[i * x_stride + j];
      factor[k * stride + j] = sum;
    }
  }
}

template <class T, int R>
GRAFT_INLINE void outer_rows(T* factor, int64_t stride, const T* s, const T* x, int64_t x_stride,
                             int64_t r, int64_t n) {
  int64_t k = 0;
  for (; k + 4 <= r; k += 4)
    outer_some<T, 4, R>(factor + k * stride, stride, s + k, r, x, x_stride, n);
  for (; k < r; ++k) outer_some<T, 1, R>(factor + k * stride, stride, s + k, r, x, x_stride, n);
}

template <class T>
GRAFT_INLINE void add_outer_body(T* factor, int64_t stride, const T* s, const T* x,
                                 int64_t x_stride, int64_t rows, int64_t r, int64_t n) {
  if (rows == kOuterRows) {
    outer_rows<T, kOuterRows>(factor, stride, s, x, x_stride, r, n);
    return;
  }
  for (int64_t i = 0; i < rows; ++i)
    outer_rows<T, 1>(factor, stride, s + i * r, x + i * x_stride, x_stride, r, n);
}

}  // namespace

// Function clones exist for plain functions only, hence one set for each type.
#define GRAFT_EXPERT_KERNELS(T)                                                                   \
  GRAFT_SIMD void add_scaled(T* target, const T* x, T factor, int64_t n) {                        \
    add_scaled_body<T>(target, x, factor, n);                                                     \
  }                                                                                               \
  GRAFT_SIMD void scaled(T* target, const T* x, T factor, int64_t n) {                            \
    scaled_body<T>(target, x, factor, n);                                                         \
  }                                                                                               \
  GRAFT_SIMD T dot(const T* a, const T* b, int64_t n) {                                           \
    return dot_body<T>(a, b, n);                                                                  \
  }                                                                                               \
  GRAFT_SIMD void add_products(T* target, const T* s, const T* factor, int64_t stride, int64_t r, \
                               int64_t n) {                                                       \
    add_products_body<T>(target, s, factor, stride, r, n);                                        \
  }                                                                                               \
  GRAFT_SIMD void products(T* out, const T* x, const T* factor, int64_t stride, int64_t r,        \
                           int64_t n) {                                                           \
    products_body<T>(out, x, factor, stride, r, n);                                               \
  }                                                                                               \
  GRAFT_SIMD void add_outer(T* factor, int64_t stride, const T* s, const T* x, int64_t x_stride,  \
                            int64_t rows, int64_t r, int64_t n) {                                 \
    add_outer_body<T>(factor, stride, s, x, x_stride, rows, r, n);                                \
  }
GRAFT_EXPERT_KERNELS(float)
GRAFT_EXPERT_KERNELS(double)
#undef GRAFT_EXPERT_KERNELS

#define GRAFT_PRODUCTS_ONTO(T, From)                                                   \
  GRAFT_SIMD void products_onto(T* target, const From* x, const T* s, const T* factor, \
                                int64_t stride, int64_t r, int64_t n) {                \
    products_onto_body(target, x, s, factor, stride, r, n);                            \
  }
GRAFT_PRODUCTS_ONTO(float, float)
GRAFT_PRODUCTS_ONTO(float, c10::BFloat16)
GRAFT_PRODUCTS_ONTO(double, double)
#undef GRAFT_PRODUCTS_ONTO

}  // namespace graft::ops
