/// The two products at the heart of the low-rank kernels, from registers to registers of one warp.
///
/// A lane is (g, t) = (lane / 4, lane % 4). Tensor cores sum over the "k" dimension in any order,
/// and number rows and columns in any order, as long as both operands agree. Both products use that
/// freedom so that a lane holds whole octets of a row, eight neighbouring columns: one vector of
/// memory and one counter of the dropout generator, without a detour through shared memory.
#pragma once

#include "element.h"

namespace graft::cuda {

/// sums += X V^T for 16 rows and 32 columns of X. The lane brings columns 8t .. 8t + 7 of rows g
/// (`top`) and g + 8 (`bottom`); factor(row) is columns 8t .. 8t + 7 of V's row. sums[j]: rows g
/// and g + 8, columns 8j + 2t and 8j + 2t + 1 of the product.
template <class T, int Tiles, class Factor>
GPU_DEVICE void shrink_step(float (&sums)[Tiles][4], const Octet<T>& top, const Octet<T>& bottom,
                            int g, const Factor& factor) {
  Fragment<T, 4> a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[i].set(0, pair_of(top, 2 * i));
    a[i].set(1, pair_of(bottom, 2 * i));
    a[i].set(2, pair_of(top, 2 * i + 1));
    a[i].set(3, pair_of(bottom, 2 * i + 1));
  }
#pragma unroll
  for (int j = 0; j < Tiles; ++j) {
    const Octet<T> v = factor(8 * j + g);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Fragment<T, 2> b;
      b.set(0, pair_of(v, 2 * i));
      b.set(1, pair_of(v, 2 * i + 1));
      multiply_add<T>(sums[j], a[i], b);
    }
  }
}

/// The row of a 16-row tile that is a lane's `slot`-th of four in `outer_step`.
GPU_DEVICE int outer_row(int t, int slot) {
  return t + 4 * slot;
}

/// sums += U^T X for 16 rows, `Ranks` columns of U a lane and 64 columns of X. The lane brings
/// columns 8g .. 8g + 7 of its four rows of X, and of the same rows of U the columns Ranks * g ..
/// Ranks * g + Ranks - 1. sums[m][i]: with h = 0, 1 and b = 0, 1, sums[m][i][2h + b] belongs to
/// column Ranks * g + 2m
/// + h of U and column 8 (2t + b) + i of X. (Ranks = 1: h = 1 is zero.)
template <class T, int Ranks, int Tiles = (Ranks + 1) / 2>
GPU_DEVICE void outer_step(float (&sums)[Tiles][8][4], const Octet<T> (&x)[4],
                           const Group<T, Ranks> (&u)[4]) {
  Fragment<T, 4> a[Tiles];
#pragma unroll
  for (int m = 0; m < Tiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool padding = 2 * m + h >= Ranks;
      const int rank = padding ? 0 : 2 * m + h;
      const T zero = from_float<T>(0.0f);
      a[m].set(h, padding ? make_pair(zero, zero) : make_pair(u[0].v[rank], u[1].v[rank]));
      a[m].set(2 + h, padding ? make_pair(zero, zero) : make_pair(u[2].v[rank], u[3].v[rank]));
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    Fragment<T, 2> b;
    b.set(0, pair_across(x[0], x[1], i));
    b.set(1, pair_across(x[2], x[3], i));
#pragma unroll
    for (int m = 0; m < Tiles; ++m) multiply_add<T>(sums[m][i], a[m], b);
  }
}

/// Two neighbouring numbers of a row whose length is even.
template <class T>
GPU_DEVICE void store_pair(T* p, float low, float high) {
  *reinterpret_cast<Group<T, 2>*>(p) = {from_float<T>(low), from_float<T>(high)};
}

}  // namespace graft::cuda
