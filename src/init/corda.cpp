#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/init/low_rank_svd.h>
#include <graft/init/start.h>

#include <algorithm>

#include "matrix.h"

namespace graft::init {
namespace {

at::Tensor damped(const at::Tensor& C, at::ScalarType type) {
  constexpr double kDamping = 0.01;
  const at::Tensor covariance = nonzero_matrix(C, "the covariance").to(type);
  GRAFT_CHECK(covariance.size(0) == covariance.size(1), "init",
              "the covariance must be square; got shape ", covariance.sizes());
  const at::Tensor diagonal = covariance.diagonal();
  GRAFT_CHECK(diagonal.min().item<double>() >= 0.0, "init",
              "a covariance has no negative entry on its diagonal; got ",
              diagonal.min().item<double>());
  at::Tensor result = covariance.clone();
  result.diagonal().add_(diagonal.mean(), kDamping);
  return result;
}

}  // namespace

Start corda(const at::Tensor& W, const at::Tensor& C, int64_t rank, double scale,
            std::string_view mode) {
  const at::NoGradGuard no_grad;
  GRAFT_CHECK(mode == "ipm" || mode == "kpm", "init", "CorDA's mode must be ipm or kpm; got '",
              mode, "'");
  const bool largest = mode == "ipm";
  const at::Tensor weight = nonzero_matrix(W, "the weight");
  check_rank(rank, weight);
  check_positive(scale, "the scale");
  GRAFT_CHECK(C.defined() && C.dim() == 2 && C.size(0) == weight.size(1), "init",
              "the covariance must be [in, in] for the weight ", weight.sizes(), "; got ",
              C.defined() ? C.sizes() : at::IntArrayRef());
  // The smallest singular values of a product with a covariance are beyond fp32.
  const at::Tensor exact = largest ? weight : weight.to(at::kDouble);
  const at::Tensor product = exact.mm(damped(C, exact.scalar_type()));
  const int64_t smaller = std::min(product.size(0), product.size(1));
  Svd svd = leading_svd(product, largest ? rank : smaller);
  const int64_t first = largest ? 0 : smaller - rank;
  const at::Tensor U = svd.U.narrow(1, first, rank), S = svd.S.narrow(0, first, rank);
  const at::Tensor root = (S / scale).sqrt();
  Start start;
  start.B = (U * root).to(weight.scalar_type()).contiguous();
  // S^-1 U^T W is V^T C^-1 without the inverse; where S = 0, so is U^T W.
  const at::Tensor inverse = at::where(S > 0, 1.0 / (scale * root), at::zeros_like(S));
  start.A = (U.t().mm(exact) * inverse.unsqueeze(1)).to(weight.scalar_type()).contiguous();
  start.subtract = true;
  start.singular_values = S.to(weight.scalar_type()).contiguous();
  start.explained = share(S, product);
  return start;
}

}  // namespace graft::init
