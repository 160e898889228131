#include "matrix.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>

#include <algorithm>
#include <cmath>

namespace graft::init {

at::Tensor working_matrix(const at::Tensor& M, const char* name) {
  GRAFT_CHECK(M.defined(), "init", name, " must be a matrix; got an undefined tensor");
  GRAFT_CHECK(M.dim() == 2 && M.numel() > 0, "init", name,
              " must be a matrix that is not empty; got shape ", M.sizes());
  GRAFT_CHECK(at::isFloatingType(M.scalar_type()), "init", name, " must be floating-point; got ",
              M.scalar_type());
  const auto type = M.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor work = M.detach().to(type).contiguous();
  // A sum in fp64 is finite unless an entry is not.
  GRAFT_CHECK(std::isfinite(work.sum(at::kDouble).item<double>()), "init", name,
              " must be finite; got a NaN or an infinity");
  return work;
}

at::Tensor nonzero_matrix(const at::Tensor& M, const char* name) {
  const at::Tensor work = working_matrix(M, name);
  GRAFT_CHECK(work.any().item<bool>(), "init", name, " must not be all zero; got zeros of shape ",
              M.sizes());
  return work;
}

void check_rank(int64_t rank, const at::Tensor& M) {
  GRAFT_CHECK(rank >= 1 && rank <= std::min(M.size(0), M.size(1)), "init",
              "rank must be in [1, min(out, in)]; got rank=", rank, " for a matrix of shape ",
              M.sizes());
}

void check_positive(double value, const char* name) {
  GRAFT_CHECK(std::isfinite(value) && value > 0.0, "init", name, " must be > 0; got ", value);
}

double share(const at::Tensor& singular_values, const at::Tensor& M) {
  const auto square_sum = [](const at::Tensor& t) {
    return t.square().sum(at::kDouble).item<double>();
  };
  return square_sum(singular_values) / square_sum(M);
}

}  // namespace graft::init
