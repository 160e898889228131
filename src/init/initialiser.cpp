#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/init/initialiser.h>

#include <algorithm>
#include <cmath>

namespace graft::init {
namespace {

void check_name(std::string_view name) {
  if (std::find(names().begin(), names().end(), name) != names().end()) return;
  std::string known;
  for (const auto& n : names()) known += (known.empty() ? "" : ", ") + n;
  fail("init", concat("initialiser must be one of ", known, "; got '", name, "'"));
}

// A's and B's rank directions are orthogonal to each other, so that B A vanishes.
void orthogonal(Factors factors, at::Generator generator) {
  const int64_t rank = factors.A.size(0);
  GRAFT_CHECK(rank % 2 == 0, "init", "orthogonal needs an even rank; got ", rank);
  const auto options = factors.A.options().dtype(at::kDouble).device(at::kCPU);
  const at::Tensor X = at::randn({rank, rank}, generator, options);
  const at::Tensor Q = std::get<0>(at::linalg_qr(X));
  const at::Tensor odd = Q.slice(0, 0, rank, 2), even = Q.slice(0, 1, rank, 2);
  const int64_t in = factors.A.numel() / rank, out = factors.B.numel() / rank;
  const at::Tensor A = at::randn({in, rank / 2}, generator, options).mm(odd).t() / 10.0;
  const at::Tensor B = at::randn({rank / 2, out}, generator, options).t().mm(even) / 10.0;
  factors.A.copy_(A.reshape(factors.A.sizes()));
  factors.B.copy_(B.reshape(factors.B.sizes()));
}

}  // namespace

const std::vector<std::string>& names() {
  static const std::vector<std::string> known = {"kaiming", "gaussian", "orthogonal", "random"};
  return known;
}

void initialise(std::string_view name, Factors factors, at::Generator generator) {
  check_name(name);
  const at::NoGradGuard no_grad;
  const int64_t rank = factors.A.size(0);
  factors.B.zero_();
  const auto fan_in_uniform = [&](at::Tensor& factor) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(factor.numel() / factor.size(0)));
    factor.uniform_(-bound, bound, generator);
  };
  if (name == "kaiming" || name == "random") {
    fan_in_uniform(factors.A);
    if (name == "random") fan_in_uniform(factors.B);
  } else if (name == "gaussian") {
    factors.A.normal_(0.0, 1.0 / static_cast<double>(rank), generator);
  } else {
    orthogonal(factors, generator);
  }
}

void initialise_embedding(std::string_view name, Factors factors, at::Generator generator) {
  check_name(name);
  const at::NoGradGuard no_grad;
  if (name == "random")
    factors.A.normal_(0.0, 1.0, generator);
  else
    factors.A.zero_();
  factors.B.normal_(0.0, 1.0, generator);
}

}  // namespace graft::init
