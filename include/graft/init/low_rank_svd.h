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

/// The leading q triplets of M [n, k] to the precision of its type: from the eigenvectors of the
/// smaller Gram matrix in fp64, 1 <= q <= min(n, k). A singular value below eps * S[0] has vectors
/// that are orthonormal and otherwise arbitrary.
Svd leading_svd(const at::Tensor& M, int64_t q);

/// About the leading q triplets: subspace iteration from a Gaussian start, `iterations` times over
/// M M^T (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.4). Exact for rank(M) <= q;
/// else the error depends on how fast the singular values decay past q, so ask for twice the
/// number that is wanted. Costs 2 n k q (2 iterations + 2) operations.
Svd randomized_svd(const at::Tensor& M, int64_t q, int64_t iterations, at::Generator generator);

/// Flips the signs of U's and V's columns as Svd says.
void fix_signs(Svd& svd);

}  // namespace graft::init
