#include <graft/moe/token_scope.h>

#include "tests/moe/mixture_tests.h"

namespace {

using namespace graft::moe;
using graft::nn::FrozenLinear;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::kLoraMoe;
using graft::testing::make_random;
using graft::testing::random;
using graft::testing::some_input;
using graft::testing::some_linear;

}  // namespace

TEST_CASE("T21 LoRAMoE with a router of zeros is the mean of its experts", "[moe][loramoe]") {
  const FrozenLinear base = some_linear();
  auto method = make_random<LoraMoeImpl>(base, kLoraMoe);
  {
    const at::NoGradGuard no_grad;
    method.router->weight.zero_();
  }
  at::Tensor mean = at::zeros_like(base.weight);
  for (int64_t e = 0; e < 4; ++e) {
    const auto lora = method.extract_expert(e);
    mean += lora.B.mm(lora.A) * lora.scale / 4;
  }
  CHECK(distance(method.forward(base, some_input()),
                 at::linear(some_input(), base.weight + mean, base.bias)) < 1e-13);
}

TEST_CASE("LoRAMoE's gates are the softmax over all experts", "[moe][loramoe]") {
  auto method = make_random<LoraMoeImpl>(some_linear(), kLoraMoe);
  const at::Tensor x = some_input().view({10, 4});
  CHECK(distance(method.gates(x), at::softmax(x.mm(method.router->weight.t()), -1)) < 1e-14);
}

TEST_CASE("T21 LoRAMoE's loss is that of its code: 0.010435 for 24 entries with delta 0.1",
          "[moe][loramoe]") {
  LoraMoeOptions options{.rank = 1, .experts = 6, .delta = 0.1};
  auto method = make_random<LoraMoeImpl>(some_linear(), options);
  {
    const at::NoGradGuard no_grad;
    method.router->weight.zero_();
  }
  const at::Tensor x = random({4, 3, 4}), types = at::tensor({0, 1, 1, 0}, at::kLong);
  const auto loss = [&] {
    method.gates(x);
    return LoraMoeImpl::balance({method.routing(), method.routing()}, options).item<double>();
  };
  CHECK(std::abs(loss()) < 1e-15);  // no types: delta does not count
  const TokenScope scope({.sequence_types = types});
  const double variance = 0.01 * 24 / 23;
  CHECK(std::abs(loss() - 2 * variance) < 1e-9);  // two layers, summed
  CHECK(std::abs(variance - 0.010435) < 1e-6);
  // var(Z) / mean(Z) instead: Z is three tokens' share, 3 / 6.
  options.paper_dispersion = true;
  CHECK(std::abs(loss() - 2 * variance * 0.5) < 1e-9);
  options.delta = 0;
  CHECK(std::abs(loss()) < 1e-15);
}

TEST_CASE("LoRAMoE wants one type a sequence", "[moe][loramoe]") {
  auto method = make_random<LoraMoeImpl>(some_linear(), kLoraMoe);
  const TokenScope scope({.sequence_types = at::tensor({0, 1, 1}, at::kLong)});
  method.gates(some_input());
  CHECK(contains(error_of([&] { LoraMoeImpl::balance({method.routing()}, kLoraMoe); }),
                 "there must be one type a sequence, [2]; got [3]"));
  CHECK(contains(error_of([] { LoraMoeOptions{.experts = 1, .balance_loss = 0.1}.validate(); }),
                 "[loramoe] experts must be at least 1, and 2 for a balance loss; got 1"));
  CHECK(
      contains(error_of([] { LoraMoeOptions{.delta = 1}.validate(); }), "delta must be in [0, 1)"));
}
