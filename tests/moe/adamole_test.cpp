#include <graft/moe/token_scope.h>

#include "tests/moe/mixture_tests.h"

namespace {

using namespace graft::moe;
using graft::nn::FrozenLinear;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::kAdaMole;
using graft::testing::make_random;
using graft::testing::some_input;
using graft::testing::some_linear;

// The same layer with that offset on the threshold's logit, and no other say in it.
void set_threshold(AdaMoleImpl& method, double logit) {
  const at::NoGradGuard no_grad;
  method.router->threshold_weight.zero_();
  method.router->threshold_bias.fill_(logit);
}

}  // namespace

TEST_CASE("T20 AdaMoLE's gates are what lies above the threshold, divided by its sum",
          "[moe][adamole]") {
  auto method = make_random<AdaMoleImpl>(some_linear(), kAdaMole);
  const at::Tensor x = some_input().view({10, 4});
  const auto& router = *method.router;
  const at::Tensor p = at::softmax(x.mm(router.weight.t()), -1);
  const at::Tensor tau =
      at::sigmoid(at::linear(x, router.threshold_weight, router.threshold_bias)) / 4;
  const at::Tensor u = at::relu(p - tau), g = method.gates(x);
  CHECK(distance(g, u / u.sum(1, true)) < 1e-14);
  CHECK(distance(g.sum(1), at::ones({10}, at::kDouble)) < 1e-14);
  CHECK(((g > 0).sum(1) >= 1).all().item<bool>());
}

TEST_CASE("T20 AdaMoLE without a threshold is the dense softmax, and fewer work above a higher one",
          "[moe][adamole]") {
  auto method = make_random<AdaMoleImpl>(some_linear(), kAdaMole);
  const at::Tensor x = some_input().view({10, 4});
  set_threshold(method, -60);
  CHECK(distance(method.gates(x), at::softmax(x.mm(method.router->weight.t()), -1)) < 1e-12);
  at::Tensor active = at::full({10}, 4);
  for (const double logit : {-2.0, 0.0, 2.0, 30.0}) {
    set_threshold(method, logit);
    const at::Tensor now = (method.gates(x) > 0).sum(1);
    CHECK((now <= active).all().item<bool>());
    active = now;
  }
  CHECK(active.sum().item<int64_t>() < 40);
  const auto figures = AdaMoleImpl::figures({&method});
  CHECK(figures.back().first == "active_experts");
  CHECK(std::abs(figures.back().second - active.sum().item<double>() / 10) < 1e-12);
}

TEST_CASE("T20 AdaMoLE is continuous where an expert passes the threshold", "[moe][adamole]") {
  const FrozenLinear base = some_linear();
  auto method = make_random<AdaMoleImpl>(base, kAdaMole);
  const at::Tensor x = some_input().view({10, 4}).narrow(0, 0, 1);
  const at::Tensor p = at::softmax(x.mm(method.router->weight.t()), -1);
  const double tau = p.min().item<double>();  // below 1/4
  const double logit = std::log(4 * tau / (1 - 4 * tau));
  set_threshold(method, logit - 1e-9);
  const at::Tensor below = method.forward(base, x);
  set_threshold(method, logit + 1e-9);
  CHECK(distance(method.forward(base, x), below) < 1e-7);
}

TEST_CASE("T20 AdaMoLE's loss at even logits is E / 2, and its threshold learns from the task",
          "[moe][adamole]") {
  AdaMoleOptions options = kAdaMole;
  options.experts = 8;
  const FrozenLinear base = some_linear();
  auto method = make_random<AdaMoleImpl>(base, options);
  method.forward(base, some_input()).square().sum().backward();
  CHECK(method.router->threshold_weight.grad().abs().max().item<double>() > 0);
  {
    const at::NoGradGuard no_grad;
    method.router->weight.zero_();
  }
  set_threshold(method, 0);
  method.gates(some_input());
  CHECK(std::abs(AdaMoleImpl::balance({method.routing()}, options).item<double>() - 4) < 1e-12);
}

TEST_CASE("AdaMoLE's active experts are those of a token that counts", "[moe][adamole]") {
  auto method = make_random<AdaMoleImpl>(some_linear(), kAdaMole);
  at::Tensor valid = at::ones({2, 5}, at::kBool);
  valid.narrow(1, 3, 2).fill_(false);
  method.gates(some_input().narrow(1, 0, 3));
  const auto alone = AdaMoleImpl::figures({&method});
  CHECK(alone.back().first == "active_experts");
  const TokenScope scope({.valid = valid});
  method.gates(some_input());
  CHECK(AdaMoleImpl::figures({&method}).back() == alone.back());
}

TEST_CASE("AdaMoLE refuses a threshold above which no expert might be", "[moe][adamole]") {
  CHECK(contains(error_of([] { AdaMoleOptions{.experts = 4, .max_threshold = 0.3}.validate(); }),
                 "tau_max must be in (0, 1 / experts]"));
}
