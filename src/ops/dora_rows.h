// DoRA's passes over the rows of a layer's output and of the output's gradient.
#pragma once

#include <ATen/core/Tensor.h>

namespace graft::ops {

// y = c * y + (1 - c) * b + S R in place, in one pass; where c is 1 and R is 0, y keeps every bit.
// y: [tokens, out] with adjacent columns, c: [out], b: [out] or undefined, S: [tokens, r],
// R: [r, out]; all in y's type, fp32 or fp64.
void scale_and_add_(const at::Tensor& y, const at::Tensor& c, const at::Tensor& b,
                    const at::Tensor& S, const at::Tensor& R);

// sum_t G[t, j] (y[t, j] - b[j]) for each column j, in G's type.  G, y: [tokens, out], b: [out] or
// undefined; returns [out]. With `scaled`, c * G goes there in the same pass. The same bits
// whatever the number of threads.
at::Tensor column_sums(const at::Tensor& G, const at::Tensor& y, const at::Tensor& b,
                       const at::Tensor& c = {}, at::Tensor* scaled = nullptr);

}  // namespace graft::ops
