#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/init/start.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "matrix.h"

namespace graft::init {
namespace {

// The pseudo-inverse with the singular values up to rcond times the largest cut off.
at::Tensor pseudo_inverse(const at::Tensor& M, double rcond) {
  const auto [U, S, Vt] = at::linalg_svd(M, /*full_matrices=*/false);
  const at::Tensor inverse = at::where(S > rcond * S[0], 1.0 / S, at::zeros_like(S));
  return (Vt.t() * inverse).mm(U.t());
}

at::Tensor nystrom_core(const at::Tensor& W, const at::Tensor& A, const at::Tensor& B,
                        double roundings, const NystromOptions& options) {
  const int64_t rank = A.size(0);
  const at::Tensor block = W.narrow(0, 0, rank).narrow(1, 0, rank);
  if (options.core == "pinv") return pseudo_inverse(block, options.rcond);
  // A direction that is rounding alone would come with a core too large for the type.
  return pseudo_inverse(B, roundings).mm(W).mm(pseudo_inverse(A, roundings));
}

}  // namespace

void NystromOptions::validate() const {
  GRAFT_CHECK(core == "block" || core == "pinv" || core == "cur", "init",
              "the Nystrom core must be block, pinv or cur; got '", core, "'");
  GRAFT_CHECK(rcond >= 0.0 && rcond < 1.0, "init", "rcond must be in [0, 1); got ", rcond);
  GRAFT_CHECK(core != "pinv" || subtract, "init",
              "the core 'pinv' needs subtract, since its product can be many times the weight; got "
              "subtract=false");
}

Start nystrom(const at::Tensor& W, int64_t rank, double scale, const NystromOptions& options) {
  const at::NoGradGuard no_grad;
  options.validate();
  const at::Tensor weight = nonzero_matrix(W, "the weight");
  check_rank(rank, weight);
  check_positive(scale, "the scale");
  Start start;
  start.A = weight.narrow(0, 0, rank).clone();
  start.B = weight.narrow(1, 0, rank).clone(at::MemoryFormat::Contiguous);
  if (options.core == "block") {
    start.core = start.B.narrow(0, 0, rank).clone();
  } else {
    const double epsilon = weight.scalar_type() == at::kDouble
                               ? std::numeric_limits<double>::epsilon()
                               : std::numeric_limits<float>::epsilon();
    const double roundings =
        epsilon * static_cast<double>(std::max(weight.size(0), weight.size(1)));
    const at::Tensor core = nystrom_core(weight.to(at::kDouble), start.A.to(at::kDouble),
                                         start.B.to(at::kDouble), roundings, options);
    start.core = (core / scale).to(weight.scalar_type());
  }
  start.subtract = options.subtract;
  const at::Tensor rest = weight - scale * start.B.mm(start.core).mm(start.A);
  start.explained = std::max(0.0, 1.0 - share(rest, weight));
  return start;
}

}  // namespace graft::init
