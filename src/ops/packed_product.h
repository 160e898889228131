// graft's own fp32 matrix product for frozen weights, on processors with AVX2 and FMA.
//
// What it does that general libraries do not: a sum of products in one pass over the output (the
// base's and the adapter's low-rank one), tasks that are handed out panel by panel, so that a
// disturbed core does not hold up the other, and no packing of the activations.
#pragma once

#include <cstdint>
#include <span>

namespace graft::ops {

// One product of a sum, x [rows, depth] times w: row-major, elements of a row adjacent.
struct ProductTerm {
  const float* x;
  int64_t x_stride;  // floats from row to row
  const float* w;
  int64_t w_stride;
  bool w_by_output;  // w is [columns, depth], as a layer stores it; else [depth, columns]
  int64_t depth;
};

// Whether this processor has what it takes.
bool packed_product_available();

// y [rows, columns] = sum of the terms + bias (null: none), with `y_stride` floats from row to row.
// Every element is summed in the same order whatever the number of threads.
void packed_product(std::span<const ProductTerm> terms, const float* bias, float* y,
                    int64_t y_stride, int64_t rows, int64_t columns);

}  // namespace graft::ops
