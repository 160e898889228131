#include <ATen/ATen.h>
#include <graft/init/start.h>

#include "matrix.h"

namespace graft::init {

Start olora(const at::Tensor& W, int64_t rank) {
  const at::NoGradGuard no_grad;
  const at::Tensor weight = nonzero_matrix(W, "the weight");
  check_rank(rank, weight);
  const auto [Q, R] = at::linalg_qr(weight.narrow(1, 0, rank));
  Start start;
  start.B = Q.contiguous();
  start.A = Q.t().mm(weight);
  start.A.narrow(1, 0, rank).copy_(R);  // with zeros below the diagonal, not roundings of zero
  start.subtract = true;
  start.explained = share(start.A, weight);
  return start;
}

}  // namespace graft::init
