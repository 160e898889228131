#include <ATen/ATen.h>
#include <graft/moe/balance_loss.h>

#include "tests/ops/gradients.h"

namespace {

using namespace graft::moe;
using graft::testing::check_differences;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;
using graft::testing::Tensors;
using N = Normalisation;

double value(const at::Tensor& loss) {
  return loss.item<double>();
}

// All logits equal, but the k chosen experts go round, so that counts are even too.
Routing even_routing(int64_t experts, int64_t k) {
  const int64_t tokens = 4 * experts;
  Routing routing =
      route({.experts = experts, .top_k = k}, at::zeros({tokens, experts}, at::kDouble));
  routing.chosen = at::remainder(at::arange(tokens).unsqueeze(1) + at::arange(k), experts);
  routing.experts = routing.chosen;
  return routing;
}

// Every token's first choice is expert 1, with p = 1.
Routing collapsed_routing(int64_t experts, int64_t k) {
  at::Tensor logits = at::zeros({12, experts}, at::kDouble);
  logits.select(1, 1).fill_(800.0);
  return route({.experts = experts, .top_k = k}, logits);
}

Routing random_routing(int64_t tokens, int64_t experts, int64_t k, uint64_t seed = 5) {
  at::manual_seed(seed);
  return route({.experts = experts, .top_k = k}, at::randn({tokens, experts}, at::kDouble));
}

double loss_of(const Routing& routing, N normalisation) {
  return value(balance_loss({routing}, {.normalisation = normalisation}));
}

}  // namespace

TEST_CASE("T11 balance losses at even logits and at collapse", "[moe][balance]") {
  for (const int64_t experts : {2, 4, 8}) {
    for (const int64_t k : {1, 2, 3}) {
      if (k > experts) continue;
      INFO("E " << experts << ", K " << k);
      const double E = static_cast<double>(experts), K = static_cast<double>(k);
      const Routing even = even_routing(experts, k), collapsed = collapsed_routing(experts, k);
      const auto check = [&](N normalisation, double at_even, double at_collapse) {
        CHECK(std::abs(loss_of(even, normalisation) - at_even) < 1e-12);
        CHECK(std::abs(loss_of(collapsed, normalisation) - at_collapse) < 1e-12);
      };
      check(N::first_choice, 1, E);
      check(N::per_token, K, E);
      check(N::per_slot, 1, E / K);
      check(N::per_choice, 1, E / K);
      check(N::unscaled, K / E, 1);
      CHECK(std::abs(value(z_loss({even})) - std::log(E) * std::log(E)) < 1e-12);
    }
  }
}

TEST_CASE("T11 balance losses of selections that take as many experts as they like",
          "[moe][balance]") {
  const at::Tensor even = at::zeros({6, 8}, at::kDouble);
  const Routing top_p = route({.selection = Selection::top_p, .experts = 8}, even);
  CHECK(std::abs(loss_of(top_p, N::per_token) - 7) < 1e-12);
  const Routing adaptive = route({.selection = Selection::threshold, .experts = 8}, even,
                                 {.threshold_logits = at::zeros({6, 1}, at::kDouble)});
  CHECK(std::abs(loss_of(adaptive, N::above_threshold) - 4) < 1e-12);
  // The capacity cuts what is worked on, not what the loss counts.
  RouterOptions options{.selection = Selection::switch_top_1, .experts = 2, .capacity = 1};
  at::Tensor logits = at::zeros({5, 2}, at::kDouble);
  logits.select(1, 0).fill_(800);
  CHECK(std::abs(loss_of(route(options, logits), N::first_choice) - 2) < 1e-12);
}

TEST_CASE("balance losses are those of their formula, and differ by K", "[moe][balance]") {
  const Routing routing = random_routing(40, 6, 2);
  const at::Tensor P = routing.probabilities.mean(0);
  const at::Tensor c =
      at::one_hot(routing.experts, 6).sum(c10::IntArrayRef({0, 1})).to(at::kDouble);
  CHECK(std::abs(loss_of(routing, N::per_token) - value(6 * (c / 40 * P).sum())) < 1e-13);
  CHECK(std::abs(loss_of(routing, N::per_slot) * 2 - loss_of(routing, N::per_token)) < 1e-13);
  CHECK(std::abs(loss_of(routing, N::per_choice) * 2 - loss_of(routing, N::per_token)) < 1e-13);
  CHECK(std::abs(loss_of(routing, N::unscaled) * 6 - loss_of(routing, N::per_token)) < 1e-13);
  const at::Tensor f = at::one_hot(routing.logits.argmax(-1), 6).to(at::kDouble).mean(0);
  CHECK(std::abs(loss_of(routing, N::first_choice) - value(6 * (f * P).sum())) < 1e-13);
}

TEST_CASE("even use is not the smallest loss", "[moe][balance]") {
  at::Tensor p = at::zeros({10, 2}, at::kDouble);
  p.slice(0, 0, 6).copy_(at::tensor({0.51, 0.49}, at::kDouble));
  p.slice(0, 6).copy_(at::tensor({0.01, 0.99}, at::kDouble));
  const Routing routing = route({.experts = 2, .top_k = 1}, p.log());
  CHECK(std::abs(loss_of(routing, N::per_token) - 0.924) < 1e-12);
}

TEST_CASE("T12 pooled layers look even where each has collapsed", "[moe][balance]") {
  at::Tensor first = at::zeros({4, 2}, at::kDouble), second = first.clone();
  first.select(1, 0).fill_(800);
  second.select(1, 1).fill_(800);
  const RouterOptions options{.experts = 2, .top_k = 1};
  const std::vector<Routing> layers = {route(options, first), route(options, second)};
  CHECK(value(balance_loss(layers, {.reduction = Reduction::pooled})) == 1.0);
  CHECK(value(balance_loss(layers, {.reduction = Reduction::mean})) == 2.0);
  CHECK(value(balance_loss(layers, {.reduction = Reduction::sum})) == 4.0);
  const double z = value(z_loss(layers, Reduction::pooled));
  CHECK(std::abs(z - 800.0 * 800.0) < 1e-6);
  CHECK(std::abs(value(z_loss(layers, Reduction::sum)) - 2 * z) < 1e-6);
}

TEST_CASE("pooling joins layers of different lengths token by token", "[moe][balance]") {
  const Routing a = random_routing(10, 4, 2, 1), b = random_routing(30, 4, 2, 2);
  const Routing joined = route({.experts = 4, .top_k = 2}, at::cat({a.logits, b.logits}));
  const double pooled = value(balance_loss({a, b}, {.reduction = Reduction::pooled}));
  CHECK(std::abs(pooled - loss_of(joined, N::per_token)) < 1e-14);
  CHECK(std::abs(value(z_loss({a, b}, Reduction::pooled)) - value(z_loss({joined}))) < 1e-14);
}

TEST_CASE("T13 the balance loss's gradient is the closed form, to rounding and by differences",
          "[moe][balance]") {
  const RouterOptions options{.experts = 5, .top_k = 2};
  for (const N normalisation :
       {N::first_choice, N::per_token, N::per_slot, N::per_choice, N::unscaled}) {
    const at::Tensor logits = random_routing(12, 5, 2).logits.clone().set_requires_grad(true);
    const Routing routing = route(options, logits);
    balance_loss({routing}, {.normalisation = normalisation}).backward();
    const at::Tensor chosen =
        normalisation == N::first_choice ? routing.experts.narrow(1, 0, 1) : routing.experts;
    const at::Tensor c = at::one_hot(chosen, 5).sum(c10::IntArrayRef({0, 1})).to(at::kDouble);
    const double divisor = normalisation == N::per_slot || normalisation == N::per_choice ? 24 : 12;
    const at::Tensor F = c * ((normalisation == N::unscaled ? 1 : 5) / divisor);
    const at::Tensor p = at::softmax(logits.detach(), -1);
    const at::Tensor expected = p * (F - (p * F).sum(-1, true)) / 12;
    CHECK(largest_difference(logits.grad(), expected) < 1e-14);
    check_differences(
        [&](const Tensors& in) {
          return balance_loss({route(options, in[0])}, {.normalisation = normalisation});
        },
        {logits.detach()});
  }
  const RouterOptions adaptive{.selection = Selection::threshold, .experts = 4};
  at::manual_seed(8);
  check_differences(
      [&](const Tensors& in) {
        const Routing routing = route(adaptive, in[0], {.threshold_logits = in[1]});
        return balance_loss({routing}, balance_of("adamole")) + z_loss({routing});
      },
      {at::randn({6, 4}, at::kDouble), at::randn({6, 1}, at::kDouble)});
  const RouterOptions biased{.selection = Selection::biased, .experts = 4};
  check_differences(
      [&](const Tensors& in) {
        return balance_loss({route(biased, in[0])}, balance_of("deepseek"));
      },
      {at::randn({2, 3, 4}, at::kDouble)});
}

TEST_CASE("T13 padding leaves losses and gradients as they are without it", "[moe][balance]") {
  const RouterOptions options{.experts = 4, .top_k = 2};
  at::manual_seed(6);
  const at::Tensor logits = at::randn({20, 4}, at::kDouble), valid = at::rand({20}) > 0.4;
  for (const N normalisation :
       {N::first_choice, N::per_token, N::per_slot, N::per_choice, N::unscaled}) {
    const auto run = [&](const at::Tensor& of, const at::Tensor& mask) {
      const at::Tensor leaf = of.clone().set_requires_grad(true);
      const Routing routing = route(options, leaf, {.valid = mask});
      const at::Tensor loss = balance_loss({routing}, {.normalisation = normalisation});
      (loss + z_loss({routing})).backward();
      return std::tuple(value(loss), value(z_loss({routing})), leaf.grad());
    };
    const auto [padded, padded_z, gradient] = run(logits, valid);
    const auto [plain, plain_z, expected] = run(logits.index({valid}), {});
    CHECK(std::abs(padded - plain) < 1e-14);
    CHECK(std::abs(padded_z - plain_z) < 1e-14);
    CHECK(largest_difference(gradient.index({valid}), expected) < 1e-14);
    CHECK(gradient.index({valid.logical_not()}).abs().max().item<double>() == 0.0);
  }
}

TEST_CASE("T13 a shift of a token's logits moves the z-loss alone", "[moe][balance]") {
  const Routing plain = random_routing(10, 4, 2);
  const Routing moved = route({.experts = 4, .top_k = 2}, plain.logits + 3);
  CHECK(at::equal(plain.experts, moved.experts));
  CHECK(std::abs(loss_of(plain, N::per_token) - loss_of(moved, N::per_token)) < 1e-14);
  const at::Tensor sums = at::logsumexp(plain.logits, -1);
  CHECK(std::abs(value(z_loss({moved})) - value((sums + 3).square().mean())) < 1e-12);
}

TEST_CASE("a loss by sequence is the mean over sequences", "[moe][balance]") {
  const RouterOptions options{.experts = 4, .top_k = 2};
  at::manual_seed(6);
  const at::Tensor logits = at::randn({3, 7, 4}, at::kDouble);
  const Routing all = route(options, logits);
  double mean = 0;
  for (int64_t i = 0; i < 3; ++i) mean += loss_of(route(options, logits[i]), N::per_slot) / 3;
  CHECK(std::abs(value(balance_loss({all}, balance_of("deepseek"))) - mean) < 1e-14);
  CHECK(std::abs(value(balance_loss({all}, balance_of("megatron"))) - mean) > 1e-4);
  // A sequence of padding alone does not count.
  at::Tensor valid = at::ones({3, 7}, at::kBool);
  valid[1].fill_(false);
  const Routing padded = route(options, logits, {.valid = valid});
  const double two = (loss_of(route(options, logits[0]), N::per_slot) +
                      loss_of(route(options, logits[2]), N::per_slot)) /
                     2;
  CHECK(std::abs(value(balance_loss({padded}, balance_of("deepseek"))) - two) < 1e-14);
}

TEST_CASE("losses by their sources' names", "[moe][balance]") {
  const Routing a = random_routing(10, 4, 1, 1), b = random_routing(10, 4, 1, 2);
  const auto of = [&](const char* source) {
    return value(balance_loss({a, b}, balance_of(source)));
  };
  CHECK(std::abs(of("switch") - (loss_of(a, N::first_choice) + loss_of(b, N::first_choice))) <
        1e-13);
  CHECK(of("mixlora") == of("mixtral"));
  CHECK(std::abs(of("mixlora") - value(balance_loss({a, b}, {.reduction = Reduction::pooled}))) <
        1e-13);
  CHECK(std::abs(of("mola") - (loss_of(a, N::per_choice) + loss_of(b, N::per_choice))) < 1e-13);
  CHECK(std::abs(of("llava_mole") * 4 - of("mixlora")) < 1e-13);
  CHECK(contains(error_of([] { balance_of("best"); }),
                 "a source must be one of switch, mixtral, mixlora"));
}

TEST_CASE("T6 losses of no tokens are 0", "[moe][balance]") {
  const Routing none = route({.experts = 4}, at::zeros({0, 4}, at::kDouble));
  const Routing padding =
      route({.experts = 4}, at::zeros({2, 4}, at::kDouble), {.valid = at::zeros({2}, at::kBool)});
  for (const Routing& routing : {none, padding}) {
    for (const N normalisation :
         {N::first_choice, N::per_token, N::per_slot, N::per_choice, N::unscaled})
      CHECK(loss_of(routing, normalisation) == 0.0);
    CHECK(value(z_loss({routing})) == 0.0);
  }
}

TEST_CASE("T21 LoRAMoE's dispersion of typed importances", "[moe][balance]") {
  // A zero router: every expert has 1 / E of every token.
  const Routing routing =
      route({.selection = Selection::dense, .experts = 6}, at::zeros({4, 5, 6}, at::kDouble));
  CHECK(largest_difference(routing.weights, at::full({20, 6}, 1.0 / 6, at::kDouble)) < 1e-15);
  const at::Tensor types = at::tensor({0, 1, 1, 0});
  const at::Tensor Z = typed_importances(routing, types, 0.1);
  CHECK(std::abs(value(dispersion_loss(Z)) - 0.01 * 24 / 23) < 1e-9);
  CHECK(std::abs(value(dispersion_loss(Z)) - 0.010435) < 1e-6);
  CHECK(std::abs(value(dispersion_loss(Z * 7)) - value(dispersion_loss(Z))) < 1e-9);
  CHECK(std::abs(value(dispersion_loss(Z * 7, Dispersion::paper)) -
                 7 * value(dispersion_loss(Z, Dispersion::paper))) < 1e-12);
  CHECK(value(dispersion_loss(typed_importances(routing, types, 0.0))) < 1e-12);
  // The first half of the experts has type 1.
  CHECK(std::abs(Z[0][1].item<double>() - 1.1 * 5 / 6) < 1e-12);
  CHECK(std::abs(Z[0][0].item<double>() - 0.9 * 5 / 6) < 1e-12);
  CHECK(std::abs(Z[3][0].item<double>() - 1.1 * 5 / 6) < 1e-12);
  at::manual_seed(3);
  const Routing uneven =
      route({.selection = Selection::dense, .experts = 2}, at::randn({3, 4, 2}, at::kDouble));
  const at::Tensor sums = typed_importances(uneven, at::tensor({0, 0, 1}), 0.0);
  for (int64_t sequence = 0; sequence < 3; ++sequence)  // each sequence's own tokens
    CHECK(largest_difference(sums.select(1, sequence),
                             uneven.probabilities.narrow(0, 4 * sequence, 4).sum(0)) < 1e-14);
  check_differences(
      [&](const Tensors& in) {
        const Routing dense = route({.selection = Selection::dense, .experts = 4}, in[0]);
        return dispersion_loss(typed_importances(dense, at::tensor({0, 1}), 0.1));
      },
      {at::randn({2, 3, 4}, at::kDouble)});
}

TEST_CASE("balance losses refuse what they cannot do", "[moe][balance]") {
  const Routing a = random_routing(4, 3, 1), b = random_routing(4, 4, 1);
  CHECK(contains(error_of([&] { balance_loss({}); }), "at least one layer"));
  CHECK(contains(error_of([&] {
                   balance_loss({a, b}, balance_of("mixlora"));
                 }),
                 "pooled layers must have the same experts and slots; got 4 and 3"));
  CHECK(contains(error_of([&] { balance_loss({a}, balance_of("adamole")); }),
                 "above_threshold needs a router that selects by threshold"));
}
