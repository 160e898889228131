/// What launchers share: from run-time types and ranks to instances of kernels, and sizes.
#pragma once

#include <type_traits>

#include "element.h"
#include "kernels.h"

namespace graft::cuda {

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// Calls f with a value of the element type.
template <class F>
cudaError_t with_element(ElementType type, const F& f) {
  switch (type) {
    case ElementType::bf16:
      return f(bf16{});
    case ElementType::fp16:
      return f(fp16{});
    case ElementType::fp32:
      return f(float{});
  }
  return cudaErrorInvalidValue;
}

/// Calls f with the padded rank as a type's constant.
template <class F>
cudaError_t with_rank(int rank, const F& f) {
  switch (padded_rank(rank)) {
    case 8:
      return f(std::integral_constant<int, 8>{});
    case 16:
      return f(std::integral_constant<int, 16>{});
    case 32:
      return f(std::integral_constant<int, 32>{});
    case 64:
      return f(std::integral_constant<int, 64>{});
  }
  return cudaErrorInvalidValue;
}

inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

/// Whether every group of eight elements of a matrix's rows is aligned for vector access.
inline bool has_aligned_rows(const void* matrix, int64_t columns) {
  return columns % 8 == 0 && is_aligned(matrix);
}

inline dim3 grid_of(int64_t x, int64_t y = 1) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), 1};
}

/// A summed dimension in `count` parts of `size`, the last one perhaps shorter.
struct Split {
  int count;
  int64_t size;
};

/// As many parts as make `wanted_blocks` of the `blocks` there are without, none shorter than
/// `unit`, of which sizes are multiples. A function of sizes alone: the order of sums must not
/// depend on the device.
inline Split split_of(int64_t length, int64_t unit, int64_t blocks, int64_t wanted_blocks,
                      int64_t most) {
  if (length == 0 || blocks == 0) return {1, length};
  int64_t count = divide_up(wanted_blocks, blocks);
  if (count > divide_up(length, unit)) count = divide_up(length, unit);
  if (count > most) count = most;
  const int64_t size = divide_up(divide_up(length, count), unit) * unit;
  return {static_cast<int>(divide_up(length, size)), size};
}

/// Sizes that a launcher accepts: not negative, and few enough blocks for a grid.
inline bool are_sizes(int64_t rows, int64_t columns) {
  constexpr int64_t kMost = int64_t{1} << 31;
  return rows >= 0 && columns >= 0 && rows < kMost && columns < kMost;
}

}  // namespace graft::cuda
