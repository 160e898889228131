// The innermost loops of mixtures: a row or a few rows against an expert's narrow factor, which
// lies with adjacent columns as `factor` [r][stride]. float and double; one order of summation
// each.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace graft::ops {

// What add_outer takes at most.
constexpr int64_t kOuterRows = 4;

#define GRAFT_EXPERT_KERNELS(T)                                                                    \
  /* target += factor * x */                                                                       \
  void add_scaled(T* target, const T* x, T factor, int64_t n);                                     \
  /* target = factor * x */                                                                        \
  void scaled(T* target, const T* x, T factor, int64_t n);                                         \
  /* <a, b> */                                                                                     \
  T dot(const T* a, const T* b, int64_t n);                                                        \
  /* target[j] += sum_k s[k] factor[k][j] */                                                       \
  void add_products(T* target, const T* s, const T* factor, int64_t stride, int64_t r, int64_t n); \
  /* out[k] = sum_j x[j] factor[k][j] */                                                           \
  void products(T* out, const T* x, const T* factor, int64_t stride, int64_t r, int64_t n);        \
  /* factor[k][j] += sum_i s[i][k] x[i][j] over `rows` rows; s: [rows][r], x: [rows][x_stride] */  \
  void add_outer(T* factor, int64_t stride, const T* s, const T* x, int64_t x_stride,              \
                 int64_t rows, int64_t r, int64_t n);
GRAFT_EXPERT_KERNELS(float)
GRAFT_EXPERT_KERNELS(double)
#undef GRAFT_EXPERT_KERNELS

// target[j] = x[j] + sum_k s[k] factor[k][j], r >= 1
#define GRAFT_PRODUCTS_ONTO(T, From)                                                        \
  void products_onto(T* target, const From* x, const T* s, const T* factor, int64_t stride, \
                     int64_t r, int64_t n);
GRAFT_PRODUCTS_ONTO(float, float)
GRAFT_PRODUCTS_ONTO(float, c10::BFloat16)
GRAFT_PRODUCTS_ONTO(double, double)
#undef GRAFT_PRODUCTS_ONTO

}  // namespace graft::ops
