/// The gated activation of Llama's feed-forward block (Shazeer 2020, arXiv 2002.05202).
#pragma once

#include <ATen/core/Tensor.h>

namespace graft::ops {

/// silu(gate) * up = gate * sigmoid(gate) * up, elementwise.
///
/// gate, up: one shape [..., n] and dtype, float32, float64, bfloat16 or float16 (float32 inside);
/// views such as the halves of one [..., 2n] product are read in place. Returns a contiguous tensor
/// of that shape.
///
/// Differentiable once, in both; saves gate and up, and goes over the memory once in each
/// direction. Throws graft::Error on other dtypes and devices and on unequal shapes.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

}  // namespace graft::ops
