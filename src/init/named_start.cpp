#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/init/named_start.h>

#include <algorithm>
#include <cmath>

namespace graft::init {
namespace {

// PEFT's spelling of a scale mode and ours.
const std::vector<std::string> kDirections = {"ArBr", "A2rBr", "ArB2r", "random"},
                               kScales = {"stable", "weight_svd", "gd_scale", "unit"};

void check_one_of(const char* option, const std::string& value,
                  const std::vector<std::string>& known) {
  std::string list;
  for (const auto& name : known) list += (list.empty() ? "" : ", ") + name;
  GRAFT_CHECK(std::find(known.begin(), known.end(), value) != known.end(), "init", option,
              " must be one of ", list, "; got '", value, "'");
}

const at::Tensor& needed(const at::Tensor* fact, const Kind& kind, const char* what) {
  GRAFT_CHECK(fact != nullptr && fact->defined(), "init", kind.name, " needs ", what,
              ", gathered over some batches; got none");
  return *fact;
}

// The core goes into A: B N A = B (N A), and both factors get the same norm, since a large one
// makes the other's gradient large.
Start folded_nystrom(const at::Tensor& W, int64_t rank, double scale, NystromOptions options) {
  options.subtract = true;
  Start start = nystrom(W, rank, scale, options);
  start.A = start.core.mm(start.A);
  start.core = at::Tensor();
  const double a = start.A.norm().item<double>(), b = start.B.norm().item<double>();
  GRAFT_CHECK(a > 0 && b > 0, "init", "nystrom needs a weight whose first ", rank,
              " rows and columns are not all zeros; got zeros");
  const double balance = std::sqrt(b / a);
  start.A = start.A * balance;
  start.B = start.B / balance;
  return start;
}

Start eva(const LayerFacts& facts, int64_t rank, int64_t out, const EvaOptions& options) {
  Start start;
  start.A = facts.directions.narrow(0, 0, rank).clone();
  if (options.whiten) start.A.div_(facts.singular_values.narrow(0, 0, rank).sqrt().unsqueeze(1));
  start.B = at::zeros({out, rank}, start.A.options());
  start.singular_values = facts.singular_values;
  start.explained = facts.explained;
  return start;
}

}  // namespace

void StartOptions::validate() const {
  check_one_of("lora_ga direction", lora_ga.direction, kDirections);
  check_one_of("lora_ga scale", lora_ga.scale, kScales);
  GRAFT_CHECK(std::isfinite(lora_ga.gamma) && lora_ga.gamma > 0, "init",
              "lora_ga stable_gamma must be positive; got ", lora_ga.gamma);
  GRAFT_CHECK(std::isfinite(eva.rho) && eva.rho >= 1, "init", "eva rho must be at least 1; got ",
              eva.rho);
  GRAFT_CHECK(eva.tau > 0 && eva.tau < 1, "init", "eva tau must be in (0, 1); got ", eva.tau);
  check_one_of("corda_method", corda_method, {"ipm", "kpm"});
  nystrom.validate();
}

int64_t rank_of_start(const Kind& kind, int64_t rank, int64_t out, int64_t in) {
  return kind.name == "lora_ga" ? std::min(rank, std::max<int64_t>(1, std::min(out, in) / 2))
                                : rank;
}

Start named_start(const Kind& kind, const at::Tensor& W, const LayerFacts* facts, int64_t rank,
                  double scale, const StartOptions& options, at::Generator generator) {
  if (kind.name == "olora") return olora(W, rank);
  if (kind.name == "nystrom") return folded_nystrom(W, rank, scale, options.nystrom);
  if (kind.name == "lora_ga")
    return lora_ga(needed(facts ? &facts->gradient : nullptr, kind, "gradients"), W, rank, scale,
                   options.lora_ga, std::move(generator));
  if (kind.name == "corda")
    return corda(W, needed(facts ? &facts->covariance : nullptr, kind, "inputs"), rank, scale,
                 options.corda_method);
  if (kind.name == "eva") {
    needed(facts ? &facts->directions : nullptr, kind, "inputs");
    return eva(*facts, rank, W.size(0), options.eva);
  }
  GRAFT_CHECK(kind.needs == Needs::weight, "init",
              "a start from the weight must be pissa, olora or nystrom; got '", kind.name, "'");
  return pissa(W, rank, scale, kind.iterations, std::move(generator), options.whole_svd);
}

}  // namespace graft::init
