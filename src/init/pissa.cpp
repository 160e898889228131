#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/init/low_rank_svd.h>
#include <graft/init/start.h>

#include <algorithm>
#include <utility>

#include "matrix.h"

namespace graft::init {

Start pissa(const at::Tensor& W, int64_t rank, double scale, int64_t iterations,
            at::Generator generator, bool whole) {
  const at::NoGradGuard no_grad;
  const at::Tensor weight = nonzero_matrix(W, "the weight");
  check_rank(rank, weight);
  check_positive(scale, "the scale");
  Svd svd;
  if (iterations < 0) {
    svd = whole ? whole_svd(weight, rank) : leading_svd(weight, rank);
  } else {
    const int64_t q = std::min({2 * rank, weight.size(0), weight.size(1)});
    const Svd wider = randomized_svd(weight, q, iterations, std::move(generator));
    svd = {wider.U.narrow(1, 0, rank), wider.S.narrow(0, 0, rank), wider.V.narrow(1, 0, rank)};
  }
  const at::Tensor root = (svd.S / scale).sqrt();
  Start start;
  start.A = (svd.V * root).t().contiguous();
  start.B = (svd.U * root).contiguous();
  start.subtract = true;
  start.singular_values = svd.S.contiguous();
  start.explained = share(svd.S, weight);
  return start;
}

}  // namespace graft::init
