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
  GRAFT_CHECK(std::isfinite(square_sum(work)) || at::isfinite(work).all().item<bool>(), "init",
              name, " must be finite; got a NaN or an infinity");
  return work;
}

at::Tensor nonzero_matrix(const at::Tensor& M, const char* name) {
  const at::Tensor work = working_matrix(M, name);
  GRAFT_CHECK(square_sum(work) > 0.0 || work.any().item<bool>(), "init", name,
              " must not be all zero; got zeros of shape ", M.sizes());
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

double square_sum(const at::Tensor& M) {
  const at::Tensor entries = M.reshape(-1);
  const double sum = at::dot(entries, entries).item<double>();
  if (std::isnormal(sum)) return sum;
  const at::Tensor wide = entries.to(at::kDouble);
  return at::dot(wide, wide).item<double>();
}

double share(const at::Tensor& singular_values, const at::Tensor& M) {
  return square_sum(singular_values) / square_sum(M);
}

}  // namespace graft::init
