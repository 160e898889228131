/// Root mean square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467).
#pragma once

#include <ATen/core/Tensor.h>

namespace graft::ops {

/// y = cast(x / sqrt(mean(x^2) + eps)) * weight, row by row over the last dimension.
///
/// x: [..., n] float32, float64, bfloat16 or float16; weight: [n] of any of these. Returns x's
/// shape and dtype. The order is the one of Hugging Face's Llama: normalise in float32 (float64 for
/// float64), round to x's dtype, then multiply by the weight.
///
/// Differentiable once, in x and, when it requires a gradient, in the weight. Saves x and one
/// reciprocal norm a row. Throws graft::Error on other dtypes, devices or shapes and on eps < 0.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

}  // namespace graft::ops
