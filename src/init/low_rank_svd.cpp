#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/core/error.h>
#include <graft/init/low_rank_svd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "matrix.h"

namespace graft::init {
namespace {

void check_count(int64_t q, const at::Tensor& M) {
  GRAFT_CHECK(q >= 1 && q <= std::min(M.size(0), M.size(1)), "init",
              "the number of singular triplets must be in [1, min(out, in)]; got ", q,
              " for a matrix of shape ", M.sizes());
}

Svd transposed(Svd svd) {
  return {std::move(svd.V), std::move(svd.S), std::move(svd.U)};
}

at::Tensor orthonormal_columns(const at::Tensor& X) {
  return std::get<0>(at::linalg_qr(X));
}

// A basis of X's columns between two steps of an iteration, orthonormal to about fp32. In fp32 by
// the Cholesky factor of the Gram matrix in fp64, a few products where Householder's reflections
// take most of an iteration's time (Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015, "Roundoff error
// analysis of the CholeskyQR2 algorithm": its error is the square of X's condition in fp64's
// roundings). By reflections for fp64 and where the columns are too close to dependent for that.
at::Tensor iteration_basis(const at::Tensor& X) {
  constexpr double kLeastDiagonal = 1e-5;  // of the factor's, over the largest
  if (X.scalar_type() == at::kDouble) return orthonormal_columns(X);
  const at::Tensor wide = X.to(at::kDouble);
  const auto [L, failed] = at::linalg_cholesky_ex(wide.t().mm(wide));
  const at::Tensor diagonal = L.diagonal();
  if (failed.item<int>() != 0 ||
      !(diagonal.min().item<double>() > kLeastDiagonal * diagonal.max().item<double>()))
    return orthonormal_columns(X);
  return at::linalg_solve_triangular(L, wide.t(), /*upper=*/false).t().to(at::kFloat);
}

// The leading q triplets of M Q Q^T, for Q with orthonormal columns. U and V are orthonormal to
// rounding whatever the singular values are, zeros included.
Svd svd_in_span(const at::Tensor& M, const at::Tensor& Q, int64_t q) {
  const auto [basis, R] = at::linalg_qr(M.mm(Q));
  const auto [P, S, Wt] = at::linalg_svd(R, /*full_matrices=*/false);
  return {basis.mm(P.narrow(1, 0, q)), S.narrow(0, 0, q).contiguous(),
          Q.mm(Wt.narrow(0, 0, q).t())};
}

// T_degree(G) X by the three-term recurrence, T the Chebyshev polynomial of [0, cut]: at most 1 on
// that interval, growing as fast as any polynomial of the degree can above it.
at::Tensor chebyshev(const at::Tensor& G, const at::Tensor& X, double cut, int64_t degree) {
  at::Tensor previous = X, current = at::addmm(X, G, X, -1.0, 2.0 / cut);
  for (int64_t i = 1; i < degree; ++i) {
    at::Tensor next = at::addmm(current, G, current, -2.0, 4.0 / cut).sub_(previous);
    previous = std::exchange(current, std::move(next));
  }
  return current;
}

// A basis of about the leading eigenvectors of G, by subspace iteration with Chebyshev filters
// (Zhou, Saad, Tiago, Chelikowsky 2006, "Self-consistent-field calculations using
// Chebyshev-filtered subspace iteration"): what lies under the block's least Ritz value is damped.
// Goes on until the first `q` have residuals of fp32's size or no longer improve.
at::Tensor filtered_subspace(const at::Tensor& G, int64_t q, int64_t block) {
  constexpr double kGrowth = 1e4;  // of one filter: what fp32 can tell apart afterwards
  constexpr double kSettled = 2e-6;
  constexpr int kRounds = 10;
  const auto generator = at::detail::createCPUGenerator(0);
  at::Tensor Q =
      iteration_basis(G.mm(at::randn({G.size(0), block}, generator, at::kFloat).to(G.options())));
  double last = std::numeric_limits<double>::infinity();
  for (int round = 0; round < kRounds; ++round) {
    const at::Tensor image = G.mm(Q);
    const auto [values, vectors] = at::linalg_eigh(Q.t().mm(image));
    Q = Q.mm(vectors);
    const double low = values[0].item<double>(), high = values[block - 1].item<double>();
    if (high <= 0.0) break;  // M = 0
    const at::Tensor rest = image.mm(vectors) - Q * values;
    const double residual =
        rest.narrow(1, block - q, q).square().sum(0).max().sqrt().item<double>() / high;
    if (residual < kSettled || residual > 0.5 * last) break;
    last = residual;
    // Too small a value says nothing in fp32 about where to cut; the plain iteration then does.
    if (low < 1e-5 * high) {
      Q = iteration_basis(G.mm(Q));
      continue;
    }
    const double growth = std::acosh(std::max(2.0 * high / low - 1.0, 1.0 + 1e-4));
    const auto degree = std::clamp<int64_t>(std::lround(std::log(kGrowth) / growth), 2, 20);
    Q = iteration_basis(chebyshev(G, Q, low, degree));
  }
  return Q;
}

// A basis that holds the leading q right singular vectors of the tall M [n, k] to about fp32, from
// its Gram matrix in fp32, which loses what is below the root of fp32's precision. Of few vectors
// the filter is faster, of many a whole eigendecomposition.
at::Tensor leading_subspace(const at::Tensor& M, int64_t q) {
  const int64_t k = M.size(1);
  const at::Tensor G = M.t().mm(M);
  const int64_t wide = std::max(2 * q, q + 24);
  if (wide * 12 <= k) return filtered_subspace(G, q, wide);
  const int64_t block = std::min(q + 16, k);
  return std::get<1>(at::linalg_eigh(G)).narrow(1, k - block, block);
}

// The leading triplets of the tall fp32 matrix M: the basis found in fp32, put right in fp64 by
// subspace iteration until M^T U = V S to the precision of fp32. False where it does not get there.
bool refined_svd(const at::Tensor& M, int64_t q, Svd& svd) {
  constexpr double kTolerance = 8 * std::numeric_limits<float>::epsilon();
  constexpr int kSteps = 8;
  const at::Tensor M64 = M.to(at::kDouble), Mt = M64.t();
  at::Tensor Q = leading_subspace(M, q).to(at::kDouble);
  for (int step = 0; step < kSteps; ++step) {
    Q = orthonormal_columns(Mt.mm(M64.mm(Q)));
    svd = svd_in_span(M64, Q, q);
    const at::Tensor rest = Mt.mm(svd.U) - svd.V * svd.S;
    const double residual = rest.square().sum(0).max().sqrt().item<double>();
    if (residual <= kTolerance * svd.S[0].item<double>()) {
      svd = {svd.U.to(at::kFloat), svd.S.to(at::kFloat), svd.V.to(at::kFloat)};
      return true;
    }
  }
  return false;
}

}  // namespace

Svd leading_svd(const at::Tensor& M, int64_t q) {
  const at::NoGradGuard no_grad;
  const at::Tensor work = working_matrix(M, "the matrix");
  check_count(q, work);
  const bool wide = work.size(0) < work.size(1);
  const int64_t smaller = std::min(work.size(0), work.size(1));
  Svd svd;
  if (work.scalar_type() == at::kDouble || smaller <= 64 || 4 * q > smaller ||
      !refined_svd(wide ? work.t() : work, q, svd))
    return whole_svd(work, q);
  if (wide) svd = transposed(std::move(svd));
  fix_signs(svd);
  return svd;
}

Svd whole_svd(const at::Tensor& M, int64_t q) {
  const at::NoGradGuard no_grad;
  const at::Tensor work = working_matrix(M, "the matrix");
  check_count(q, work);
  const auto [U, S, Vt] = at::linalg_svd(work, /*full_matrices=*/false);
  Svd svd{U.narrow(1, 0, q).contiguous(), S.narrow(0, 0, q).contiguous(),
          Vt.narrow(0, 0, q).t().contiguous()};
  fix_signs(svd);
  return svd;
}

Svd randomized_svd(const at::Tensor& M, int64_t q, int64_t iterations, at::Generator generator) {
  const at::NoGradGuard no_grad;
  const at::Tensor work = working_matrix(M, "the matrix");
  check_count(q, work);
  GRAFT_CHECK(iterations >= 0, "init", "iterations must be >= 0; got ", iterations);
  const bool wide = work.size(0) < work.size(1);
  const at::Tensor tall = wide ? work.t() : work, flat = tall.t();
  const at::Tensor start =
      at::randn({tall.size(1), q}, std::move(generator), at::kFloat).to(work.options());
  at::Tensor range = tall.mm(start);
  for (int64_t i = 0; i < iterations; ++i)
    range = tall.mm(iteration_basis(flat.mm(iteration_basis(range))));
  range = orthonormal_columns(range);
  // The triplets of range range^T M, by way of its transpose.
  Svd svd = transposed(svd_in_span(flat, range, q));
  if (wide) svd = transposed(std::move(svd));
  fix_signs(svd);
  return svd;
}

void fix_signs(Svd& svd) {
  const at::Tensor places = svd.V.abs().argmax(0, /*keepdim=*/true);
  const at::Tensor negative = svd.V.gather(0, places) < 0;
  svd.U = at::where(negative, -svd.U, svd.U);
  svd.V = at::where(negative, -svd.V, svd.V);
}

}  // namespace graft::init
