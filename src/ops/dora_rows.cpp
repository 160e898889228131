#include "dora_rows.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <graft/core/simd.h>

#include <algorithm>
#include <type_traits>

#include "cuda_dispatch.h"
#include "tensor_rows.h"
#include "vector_math.h"

namespace graft::ops {
namespace {

constexpr int64_t kRowBlock = 64;  // tokens summed by one thread at once, whatever their number
constexpr int64_t kColumns = 512;  // of a tile: its part of R stays in the nearest cache

template <class T>
struct Rank4 {
  const T* S;
  const T* R;
  int64_t columns;  // between rows of R
};

// y[j] += sum_k S[k] R[k, j] for four k.
template <class T>
GRAFT_INLINE void add_four(T* y, const Rank4<T>& of, int64_t n) {
  const T *r0 = of.R, *r1 = r0 + of.columns, *r2 = r1 + of.columns, *r3 = r2 + of.columns;
  const T s0 = of.S[0], s1 = of.S[1], s2 = of.S[2], s3 = of.S[3];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] += s0 * r0[j] + s1 * r1[j] + s2 * r2[j] + s3 * r3[j];
}

// A tile's columns of one row. base = (1 - c) b, or null.
template <class T>
GRAFT_INLINE void scale_and_add_body(T* y, const T* c, const T* base, const T* S, const T* R,
                                     int64_t rank, int64_t columns, int64_t n) {
  if (base != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] = y[j] * c[j] + base[j];
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] *= c[j];
  }
  int64_t k = 0;
  for (; k + 4 <= rank; k += 4) add_four<T>(y, {S + k, R + k * columns, columns}, n);
  for (; k < rank; ++k) {
    const T s = S[k];
    const T* r = R + k * columns;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] += s * r[j];
  }
}

GRAFT_SIMD void scale_and_add_row(float* y, const float* c, const float* base, const float* S,
                                  const float* R, int64_t rank, int64_t columns, int64_t n) {
  scale_and_add_body(y, c, base, S, R, rank, columns, n);
}
GRAFT_SIMD void scale_and_add_row(double* y, const double* c, const double* base, const double* S,
                                  const double* R, int64_t rank, int64_t columns, int64_t n) {
  scale_and_add_body(y, c, base, S, R, rank, columns, n);
}

// sums[j] += sum_t g[t, j] (y[t, j] - b[j]) and, where it is asked for, scaled = c * g. b may be
// null. All contiguous [rows, columns].
template <class T>
GRAFT_INLINE void add_products_body(T* sums, const T* g, const T* y, const T* b, const T* c,
                                    T* scaled, int64_t rows, int64_t columns) {
  for (int64_t t = 0; t < rows; ++t, g += columns, y += columns) {
    if (b != nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) sums[j] += g[j] * (y[j] - b[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) sums[j] += g[j] * y[j];
    }
    if (scaled == nullptr) continue;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) scaled[j] = g[j] * c[j];
    scaled += columns;
  }
}

GRAFT_SIMD void add_products(float* sums, const float* g, const float* y, const float* b,
                             const float* c, float* scaled, int64_t rows, int64_t columns) {
  add_products_body(sums, g, y, b, c, scaled, rows, columns);
}
GRAFT_SIMD void add_products(double* sums, const double* g, const double* y, const double* b,
                             const double* c, double* scaled, int64_t rows, int64_t columns) {
  add_products_body(sums, g, y, b, c, scaled, rows, columns);
}

// Calls f with a value of the C++ type that stands for `type`, of the two that masters have.
template <class F>
void dispatch_master(at::ScalarType type, F&& f) {
  if (type == at::kDouble)
    f(double{});
  else
    f(float{});
}

template <class T>
const T* pointer(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

}  // namespace

void scale_and_add_(const at::Tensor& y, const at::Tensor& c_in, const at::Tensor& b,
                    const at::Tensor& S_in, const at::Tensor& R_in) {
  const at::Tensor base = b.defined() ? (b * (1 - c_in)).contiguous() : b;
  if (on_device(y)) {
    y.mul_(c_in);
    if (b.defined()) y.add_(base);
    y.addmm_(S_in, R_in);
    return;
  }
  const at::Tensor c = c_in.contiguous(), S = S_in.contiguous(), R = R_in.contiguous();
  const int64_t columns = y.size(1), rank = R.size(0), stride = y.stride(0);
  dispatch_master(y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* const rows = y.mutable_data_ptr<T>();
    const T *scales = pointer<T>(c), *added = pointer<T>(base), *left = pointer<T>(S),
            *right = pointer<T>(R);
    at::parallel_for(0, y.size(0), rows_grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block += kRowBlock)
        for (int64_t first = 0; first < columns; first += kColumns)
          for (int64_t t = block; t < std::min(block + kRowBlock, end); ++t)
            scale_and_add_row(rows + t * stride + first, scales + first,
                              added == nullptr ? nullptr : added + first, left + t * rank,
                              right + first, rank, columns, std::min(kColumns, columns - first));
    });
  });
}

at::Tensor column_sums(const at::Tensor& G_in, const at::Tensor& y_in, const at::Tensor& b_in,
                       const at::Tensor& c_in, at::Tensor* scaled) {
  const auto type = G_in.scalar_type();
  const at::Tensor G = G_in.contiguous(), y = y_in.to(type).contiguous(),
                   b = b_in.defined() ? b_in.to(type).contiguous() : b_in;
  if (on_device(G)) {
    if (scaled != nullptr) *scaled = G * c_in;
    return ((b.defined() ? y - b : y) * G).sum(0);
  }
  const int64_t rows = G.size(0), columns = G.size(1);
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  const at::Tensor c = scaled != nullptr ? c_in.contiguous() : at::Tensor();
  if (scaled != nullptr) *scaled = at::empty_like(G);
  at::Tensor sums = at::zeros({blocks, columns}, G.options());
  dispatch_master(type, [&](auto zero) {
    using T = decltype(zero);
    T* const out = sums.mutable_data_ptr<T>();
    T* const product = scaled != nullptr ? scaled->mutable_data_ptr<T>() : nullptr;
    const T *from = pointer<T>(G), *values = pointer<T>(y), *bias = pointer<T>(b),
            *scales = pointer<T>(c);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kRowBlock, offset = first * columns;
        add_products(out + block * columns, from + offset, values + offset, bias, scales,
                     product != nullptr ? product + offset : nullptr,
                     std::min(kRowBlock, rows - first), columns);
      }
    });
  });
  return sums.sum(0);
}

}  // namespace graft::ops
