#include <ATen/ATen.h>
#include <graft/init/low_rank_svd.h>
#include <graft/init/start.h>

#include "matrix.h"

namespace graft::init {

Start lora_sb(const at::Tensor& G, int64_t rank, double scale, double step) {
  const at::NoGradGuard no_grad;
  const at::Tensor gradient = nonzero_matrix(G, "the gradient");
  check_rank(rank, gradient);
  check_positive(scale, "the scale");
  check_positive(step, "the step");
  const at::Tensor change = gradient.sign() * -step;
  const Svd svd = leading_svd(change, rank);
  Start start;
  start.A = svd.V.t().contiguous();
  start.B = svd.U.contiguous();
  start.core = at::diag(svd.S / scale);
  start.singular_values = svd.S;
  start.explained = share(svd.S, change);
  return start;
}

}  // namespace graft::init
