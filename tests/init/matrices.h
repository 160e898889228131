// Matrices for the tests of initialisers, and what to compare of their decompositions: projectors
// and products, never single vectors, whose signs and mixtures are free.
#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <functional>

#include "tests/support/testing.h"

namespace graft::testing {

inline at::Generator generator(uint64_t seed = 1) {
  return at::detail::createCPUGenerator(seed);
}

inline at::Tensor gaussian(int64_t n, int64_t k, uint64_t seed = 1) {
  return at::randn({n, k}, generator(seed), at::kDouble);
}

// A matrix [n, k] in fp64 whose i-th singular value, from i = 1, is value(i).
inline at::Tensor with_spectrum(int64_t n, int64_t k, const std::function<double(double)>& value,
                                uint64_t seed = 1) {
  const int64_t smaller = std::min(n, k);
  const at::Tensor U = std::get<0>(at::linalg_qr(gaussian(n, smaller, seed)));
  const at::Tensor V = std::get<0>(at::linalg_qr(gaussian(k, smaller, seed + 1000)));
  at::Tensor S = at::empty({smaller}, at::kDouble);
  for (int64_t i = 0; i < smaller; ++i) S[i] = value(static_cast<double>(i + 1));
  return (U * S).mm(V.t());
}

inline at::Tensor singular_values(const at::Tensor& M) {
  return std::get<1>(at::linalg_svd(M.to(at::kDouble), /*full_matrices=*/false));
}

// [M]_q, the best approximation of rank q, in fp64.
inline at::Tensor best(const at::Tensor& M, int64_t q) {
  const auto [U, S, Vt] = at::linalg_svd(M.to(at::kDouble), /*full_matrices=*/false);
  return (U.narrow(1, 0, q) * S.narrow(0, 0, q)).mm(Vt.narrow(0, 0, q));
}

// |a - b| / |b|, Frobenius norms, in fp64.
inline double relative(const at::Tensor& a, const at::Tensor& b) {
  REQUIRE(a.sizes() == b.sizes());
  const at::Tensor x = a.to(at::kDouble), y = b.to(at::kDouble);
  return ((x - y).norm() / y.norm()).item<double>();
}

// The largest entry of |Q^T Q - c I|.
inline double off_orthonormal(const at::Tensor& Q, double c = 1.0) {
  const at::Tensor gram = Q.to(at::kDouble).t().mm(Q.to(at::kDouble));
  return (gram - c * at::eye(gram.size(0), gram.options())).abs().max().item<double>();
}

// sum a b / (|a| |b|)
inline double cosine(const at::Tensor& a, const at::Tensor& b) {
  return ((a * b).sum() / (a.norm() * b.norm())).item<double>();
}

inline double largest(const at::Tensor& t) {
  return t.abs().max().item<double>();
}

}  // namespace graft::testing
