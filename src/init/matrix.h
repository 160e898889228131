// What the initialisers that decompose matrices share: checks, the type they compute in, norms.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/init/low_rank_svd.h>

#include <cstdint>

namespace graft::init {

/// M as the initialisers compute with it: detached, contiguous, fp32 (fp64 stays fp64). Throws,
/// with `name` in the message, unless it is a floating-point matrix, not empty and finite.
at::Tensor working_matrix(const at::Tensor& M, const char* name);

/// The same, and throws for a matrix of zeros: nothing can be found in it.
at::Tensor nonzero_matrix(const at::Tensor& M, const char* name);

/// Throws unless the rank is in [1, min(n, k)].
void check_rank(int64_t rank, const at::Tensor& M);

/// Throws unless the value is finite and > 0.
void check_positive(double value, const char* name);

/// |M|^2, summed in M's type where that is in its range (many times as fast), else in fp64. Finite
/// for a finite fp32 matrix.
double square_sum(const at::Tensor& M);

/// The share of |M|^2 that is in these singular values.
double share(const at::Tensor& singular_values, const at::Tensor& M);

}  // namespace graft::init
