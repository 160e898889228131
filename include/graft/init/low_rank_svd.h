/// The leading part of a singular value decomposition, of which LibTorch's C++ side has none.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace graft::init {

/// M = U diag(S) V^T, S descending. The signs are fixed: in each column of V the entry of the
/// largest magnitude is positive.
struct Svd {
  at::Tensor U;  ///< [n, q], orthonormal columns
  at::Tensor S;  ///< [q]
  at::Tensor V;  ///< [k, q], orthonormal columns
};

/// The leading q triplets of M [n, k] to the precision of its type, 1 <= q <= min(n, k):
/// |M^T u - s v| is within a few roundings of S[0]. fp16 and bf16 are taken to fp32 first. Vectors
/// of singular values that are closer than that, or smaller, are orthonormal and otherwise
/// arbitrary.
///
/// fp32: a basis of the leading space is found in fp32 from the smaller Gram matrix, by Chebyshev
/// filters for few triplets and from its eigenvectors for more, and put right in fp64 by subspace
/// iteration until the residual above is reached; the whole decomposition (LAPACK's gesdd) where it
/// is not, for fp64, and where q is more than a quarter of the smaller side. Against gesdd of the
/// whole matrix in fp32, one thread, q = 16 and q = 64: 192 x 576 takes 0.4 of its time and the
/// same, 576 x 576 0.4 and 0.65, 1536 x 576 0.3 and 0.5, 576 x 1536 0.2 and 0.26. A decomposition
/// of the Gram matrix in fp64 takes 0.9 for 576 x 576.
Svd leading_svd(const at::Tensor& M, int64_t q);

/// The leading q triplets from LAPACK's decomposition (gesdd) of the whole matrix.
Svd whole_svd(const at::Tensor& M, int64_t q);

/// About the leading q triplets: subspace iteration from a Gaussian start, `iterations` times over
/// M M^T (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.4). Exact for rank(M) <= q;
/// else the error depends on how fast the singular values decay past q, so ask for twice the
/// number that is wanted. Costs 2 n k q (2 iterations + 2) operations. `generator`: of the CPU.
Svd randomized_svd(const at::Tensor& M, int64_t q, int64_t iterations, at::Generator generator);

/// Flips the signs of U's and V's columns as Svd says; of entries of one magnitude the first
/// counts.
void fix_signs(Svd& svd);

}  // namespace graft::init
