/// Clipping by the global norm of the gradients (Pascanu et al. 2012, arXiv 1211.5063).
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace graft::train {

/// The Euclidean norm of the parameters' gradients together; undefined gradients count as zero.
///
/// Sums in float64 over blocks of fixed size, so that the number of threads does not show. The
/// result is not finite exactly when a gradient is not: test it before the optimizer's step.
/// Gradients: dense, float32, float64, bfloat16 or float16.
double grad_norm(const std::vector<at::Tensor>& parameters);

/// min(1, max_norm / (norm + 1e-6)), the factor of PyTorch's clip_grad_norm_, to be handed to
/// `AdamW::step`. Throws graft::Error unless norm is finite and max_norm > 0.
double clip_scale(double norm, double max_norm);

}  // namespace graft::train
