#include <ATen/ATen.h>
#include <graft/moe/router.h>

#include "tests/ops/gradients.h"

namespace {

using namespace graft::moe;
using graft::testing::check_differences;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;
using graft::testing::Tensors;

at::Tensor random_logits(int64_t tokens, int64_t experts, uint64_t seed = 3) {
  at::manual_seed(seed);
  return at::randn({tokens, experts}, at::kDouble) * 1.5;
}

// The weights as one row an expert, [tokens, experts].
at::Tensor spread(const Routing& routing) {
  return at::zeros_like(routing.logits)
      .scatter_add(1, routing.experts.clamp_min(0), routing.weights);
}

RouterOptions top_k(int64_t experts, int64_t k, Selection selection = Selection::softmax_top_k) {
  return {.selection = selection, .experts = experts, .top_k = k};
}

graft::adapters::LayerContext context() {
  return {.name = "mlp.router", .seed = 9};
}

}  // namespace

TEST_CASE("T3 softmax then top-k, renormalised, equals top-k then softmax", "[moe][router]") {
  const at::Tensor logits = random_logits(50, 6);
  for (const int64_t k : {1, 2, 3, 6}) {
    const Routing a = route(top_k(6, k), logits);
    const Routing b = route(top_k(6, k, Selection::top_k_softmax), logits);
    // The formula as written.
    const at::Tensor p = at::softmax(logits, -1);
    const auto [values, indices] = p.topk(k);
    CHECK(at::equal(a.experts, indices));
    CHECK(largest_difference(a.weights, values / values.sum(-1, true)) < 1e-14);
    CHECK(at::equal(a.experts, b.experts));
    CHECK(largest_difference(a.weights, b.weights) < 1e-14);
    CHECK(largest_difference(a.probabilities, p) < 1e-15);
  }
}

TEST_CASE("T3 the router's gradient is the closed form, exactly 0 outside the chosen",
          "[moe][router]") {
  for (const double temperature : {1.0, 0.5}) {
    RouterOptions options = top_k(6, 3, Selection::top_k_softmax);
    options.temperature = temperature;
    const at::Tensor logits = random_logits(20, 6).set_requires_grad(true);
    const Routing routing = route(options, logits);
    const at::Tensor dg = graft::testing::seed_like(routing.weights);
    routing.weights.backward(dg);
    const at::Tensor g = routing.weights.detach();
    const at::Tensor chosen = g * (dg - (g * dg).sum(-1, true)) / temperature;
    const at::Tensor expected = at::zeros_like(logits).scatter(1, routing.experts, chosen);
    CHECK(largest_difference(logits.grad(), expected) < 1e-14);
    const at::Tensor outside = at::ones_like(logits, at::kBool).scatter(1, routing.experts, false);
    CHECK(logits.grad().masked_select(outside).abs().max().item<double>() == 0.0);
  }
}

TEST_CASE("T4 one expert with weights that sum to 1 gives the router no gradient",
          "[moe][router]") {
  const at::Tensor logits = random_logits(20, 4).set_requires_grad(true);
  const Routing routing = route(top_k(4, 1), logits);
  CHECK(at::equal(routing.weights, at::ones_like(routing.weights)));
  routing.weights.backward(graft::testing::seed_like(routing.weights));
  CHECK(logits.grad().abs().max().item<double>() == 0.0);

  RouterOptions plain = top_k(4, 1);
  plain.renormalise = false;
  const Routing soft = route(plain, logits);
  CHECK(largest_difference(soft.weights, at::softmax(logits, -1).gather(1, soft.experts)) < 1e-15);
}

TEST_CASE("every selection's weights have the gradients of central differences", "[moe][router]") {
  for (const Selection selection :
       {Selection::softmax_top_k, Selection::top_k_softmax, Selection::dense, Selection::top_p,
        Selection::switch_top_1, Selection::threshold, Selection::biased}) {
    for (const std::optional<bool> renormalise : {std::optional<bool>(), std::optional(true)}) {
      RouterOptions options = top_k(5, 2, selection);
      if (selection == Selection::top_p || selection == Selection::biased)
        options.renormalise = renormalise;
      options.capacity = 2;
      INFO(selection_name(selection));
      const at::Tensor tau = random_logits(6, 1, 8);
      const auto f = [&](const Tensors& in) {
        const Routing routing = route(options, in[0], {{}, in[1], {}});
        return at::cat({spread(routing), routing.probabilities}) + in[1].sum() * 0;
      };
      check_differences(f, {random_logits(6, 5), tau});
    }
  }
}

TEST_CASE("ties go to the lower index, and the first slot is the first choice", "[moe][router]") {
  const at::Tensor even = at::zeros({2, 4}, at::kDouble);
  CHECK(at::equal(route(top_k(4, 3), even).experts, at::tensor({0, 1, 2, 0, 1, 2}).view({2, 3})));
  const at::Tensor some = at::tensor({1.0, 2.0, 2.0, 0.0}, at::kDouble).view({1, 4});
  CHECK(at::equal(route(top_k(4, 3), some).experts, at::tensor({1, 2, 0}).view({1, 3})));
}

TEST_CASE("dense weights are the probabilities of all experts", "[moe][router]") {
  const at::Tensor logits = random_logits(7, 3);
  const Routing routing = route({.selection = Selection::dense, .experts = 3}, logits);
  CHECK(largest_difference(spread(routing), at::softmax(logits, -1)) < 1e-15);
  CHECK(routing.sums_to_one);
}

TEST_CASE("top_p keeps the expert that crosses the threshold", "[moe][router]") {
  // Even: seven of eight experts at 0.8, all at 1.
  const at::Tensor even = at::zeros({1, 8}, at::kDouble);
  RouterOptions options{.selection = Selection::top_p, .experts = 8};
  CHECK(expert_counts(route(options, even)).sum().item<int64_t>() == 7);
  const at::Tensor p = at::tensor({0.5, 0.2, 0.25, 0.05}, at::kDouble).view({1, 4});
  options.experts = 4;
  for (const auto& [top_p, kept, sum] :
       {std::tuple(0.4, 1, 0.5), {0.6, 2, 0.75}, {0.76, 3, 0.95}}) {
    options.top_p = top_p;
    options.renormalise = {};
    const Routing routing = route(options, p.log());
    CHECK(expert_counts(routing).sum().item<int64_t>() == kept);
    CHECK(std::abs(routing.weights.sum().item<double>() - sum) < 1e-14);
    options.renormalise = true;
    const Routing normal = route(options, p.log());
    CHECK(std::abs(normal.weights.sum().item<double>() - 1) < 1e-14);
    CHECK(std::abs(normal.weights[0][0].item<double>() - 0.5 / sum) < 1e-14);
  }
}

TEST_CASE("switch sends at most `capacity` tokens of a sequence to an expert", "[moe][router]") {
  RouterOptions options{.selection = Selection::switch_top_1, .experts = 2, .capacity = 2};
  // Two sequences of four tokens, all for expert 1 but the third of each.
  at::Tensor logits = at::zeros({2, 4, 2}, at::kDouble);
  logits.select(2, 1).fill_(1.0);
  logits.select(1, 2).select(1, 0).fill_(3.0);
  const Routing routing = route(options, logits);
  CHECK(
      at::equal(routing.experts.view({2, 4}), at::tensor({1, 1, 0, -1, 1, 1, 0, -1}).view({2, 4})));
  CHECK(at::equal(routing.chosen.view({2, 4}), at::tensor({1, 1, 0, 1, 1, 1, 0, 1}).view({2, 4})));
  CHECK(routing.weights[3][0].item<double>() == 0.0);
  CHECK(std::abs(routing.weights[0][0].item<double>() - 1 / (1 + std::exp(-1.0))) < 1e-15);
  // Padding takes no place.
  at::Tensor valid = at::ones({2, 4}, at::kBool);
  valid[0][0] = false;
  const Routing masked = route(options, logits, {.valid = valid});
  CHECK(at::equal(masked.experts.view({2, 4})[0], at::tensor({-1, 1, 0, 1})));
}

TEST_CASE("T20 the adaptive threshold leaves at least one expert, and is continuous",
          "[moe][router]") {
  RouterOptions options{.selection = Selection::threshold, .experts = 4};
  const at::Tensor logits = random_logits(100, 4), tau = random_logits(100, 1, 5) * 3;
  const Routing routing = route(options, logits, {.threshold_logits = tau});
  CHECK(largest_difference(routing.weights.sum(-1), at::ones({100}, at::kDouble)) < 1e-12);
  CHECK((routing.experts >= 0).sum(-1).min().item<int64_t>() >= 1);
  const at::Tensor p = at::softmax(logits, -1), u = at::relu(p - at::sigmoid(tau) / 4);
  CHECK(largest_difference(spread(routing), u / u.sum(-1, true)) < 1e-14);
  // An expert just above and just below the threshold.
  const auto at_logit = [&](double l) {
    return spread(route(options, at::tensor({1.0, 0.9, l, -2.0}, at::kDouble).view({1, 4}),
                        {.threshold_logits = at::zeros({1, 1}, at::kDouble)}));
  };
  const auto share = [](double l) {
    return std::exp(l) / (std::exp(1.0) + std::exp(0.9) + std::exp(l) + std::exp(-2.0)) - 0.125;
  };
  double low = -3, high = 1;
  for (int i = 0; i < 60; ++i) (share((low + high) / 2) > 0 ? high : low) = (low + high) / 2;
  CHECK(at_logit(low - 1e-9)[0][2].item<double>() == 0.0);
  CHECK(at_logit(low + 1e-9)[0][2].item<double>() > 0.0);
  CHECK(largest_difference(at_logit(low - 1e-9), at_logit(low + 1e-9)) < 1e-8);
}

TEST_CASE("T14 the bias changes who is chosen, never the weights of those chosen",
          "[moe][router]") {
  RouterOptions options = top_k(4, 2, Selection::biased);
  options.scale = 2.5;
  const at::Tensor logits = random_logits(30, 4),
                   bias = at::tensor({0.0, 5.0, 5.0, 0.0}, at::kDouble);
  const Routing routing = route(options, logits, {.bias = bias});
  CHECK(at::equal(std::get<0>(routing.experts.sort(-1)), at::tensor({1, 2}).expand({30, 2})));
  const at::Tensor s = at::sigmoid(logits).gather(1, routing.experts);
  CHECK(largest_difference(routing.weights, s / s.sum(-1, true) * 2.5) < 1e-14);
  CHECK_FALSE(routing.sums_to_one);

  at::Tensor b = at::tensor({0.5, -1.0, 0.0, 2.0}, at::kDouble);
  update_bias(b, at::tensor({10, 30, 20, 20}), 0.25);
  CHECK(at::equal(b, at::tensor({0.75, -1.25, 0.0, 2.0}, at::kDouble)));
  update_bias(b, at::tensor({7, 7, 7, 7}), 0.25);
  CHECK(at::equal(b, at::tensor({0.75, -1.25, 0.0, 2.0}, at::kDouble)));
}

TEST_CASE("padding goes to no expert and reaches no gradient, NaN or not", "[moe][router]") {
  const at::Tensor valid = at::tensor({1, 0, 1, 1, 0}).to(at::kBool);
  Router router(3, at::kDouble, top_k(4, 2), context());
  at::manual_seed(4);
  at::Tensor x = at::randn({5, 3}, at::kDouble);
  x[1].fill_(std::nan(""));
  const Routing routing = router->forward(x, valid);
  CHECK(at::equal((routing.experts >= 0).all(-1), valid));
  CHECK(expert_counts(routing).sum().item<int64_t>() == 6);
  graft::testing::seed_like(routing.weights).mul(routing.weights).sum().backward();
  const at::Tensor gradient = router->weight.grad().clone();
  router->weight.mutable_grad() = at::Tensor();
  const Routing kept = router->forward(x.index({valid}));
  CHECK(at::equal(kept.experts, routing.experts.index({valid})));
  graft::testing::seed_like(routing.weights).index({valid}).mul(kept.weights).sum().backward();
  CHECK(largest_difference(gradient, router->weight.grad()) < 1e-15);
}

TEST_CASE("biased probabilities are the sigmoids over their sum", "[moe][router]") {
  const at::Tensor logits = random_logits(7, 5), s = at::sigmoid(logits);
  const Routing routing = route({.selection = Selection::biased, .experts = 5, .top_k = 2}, logits);
  CHECK((routing.probabilities - s / s.sum(1, true)).abs().max().item<double>() < 1e-15);
}

TEST_CASE("a threshold of padding may be anything", "[moe][router]") {
  const at::Tensor valid = at::tensor({1, 0, 1}).to(at::kBool);
  at::Tensor tau = at::zeros({3}, at::kDouble);
  tau[1] = std::numeric_limits<double>::quiet_NaN();
  const Routing routing = route({.selection = Selection::threshold, .experts = 4},
                                random_logits(3, 4), {.valid = valid, .threshold_logits = tau});
  CHECK(routing.threshold.isfinite().all().item<bool>());
  CHECK(routing.weights.isfinite().all().item<bool>());
}

TEST_CASE("what the logits of padding are does not matter", "[moe][router]") {
  const at::Tensor valid = at::tensor({1, 0, 1}).to(at::kBool);
  at::Tensor logits = random_logits(3, 4);
  logits[1].fill_(std::nan(""));
  logits.set_requires_grad(true);
  const Routing routing = route(top_k(4, 2), logits, {.valid = valid});
  CHECK(at::isfinite(routing.probabilities).all().item<bool>());
  (routing.weights.sum() + routing.probabilities.square().sum()).backward();
  CHECK(at::isfinite(logits.grad()).all().item<bool>());
  CHECK(logits.grad()[1].abs().max().item<double>() == 0.0);
}

TEST_CASE("T7 permuting tokens permutes routing; permuting experts renames them", "[moe][router]") {
  const at::Tensor logits = random_logits(12, 5), order = at::randperm(12), names = at::randperm(5);
  const Routing plain = route(top_k(5, 2), logits),
                moved = route(top_k(5, 2), logits.index({order}));
  CHECK(at::equal(moved.experts, plain.experts.index({order})));
  CHECK(at::equal(moved.weights, plain.weights.index({order})));
  const Routing renamed = route(top_k(5, 2), logits.index_select(1, names));
  CHECK(at::equal(names.index({renamed.experts}), plain.experts));
  CHECK(largest_difference(renamed.weights, plain.weights) < 1e-12);
}

TEST_CASE("T27 jitter reads a copy, in training alone, the same for the same key",
          "[moe][router]") {
  RouterOptions options = top_k(4, 2);
  options.jitter = 0.1;
  Router router(6, at::kFloat, options, context());
  at::manual_seed(4);
  const at::Tensor x = at::randn({5, 6}), before = x.clone();
  router->eval();
  const at::Tensor quiet = router->forward(x).logits;
  CHECK(at::equal(quiet, at::linear(x, router->weight)));
  router->train();
  const at::Tensor first = router->forward(x).logits, second = router->forward(x).logits;
  CHECK_FALSE(at::equal(first, quiet));
  CHECK_FALSE(at::equal(first, second));
  CHECK(at::equal(x, before));
  const at::Tensor factor = jittered(at::ones({1000, 6}), 0.1, {1, 2, 3});
  CHECK(factor.min().item<double>() >= 0.9f);
  CHECK(factor.max().item<double>() <= 1.1f);
  CHECK(std::abs(factor.mean().item<double>() - 1) < 0.005);
  CHECK(std::abs(factor.std().item<double>() - 0.2 / std::sqrt(12.0)) < 0.003);
  CHECK(at::equal(factor, jittered(at::ones({1000, 6}), 0.1, {1, 2, 3})));
}

TEST_CASE("a router's start, type and buffers", "[moe][router]") {
  Router router(2000, at::kFloat, top_k(8, 2), context());
  CHECK(std::abs(router->weight.std().item<double>() - 0.02) < 0.001);
  Router wide(2000, at::kFloat, RouterOptions{.selection = Selection::switch_top_1}, context());
  CHECK(std::abs(wide->weight.std().item<double>() - 1) < 0.05);
  CHECK(router->forward(at::randn({3, 2000}).to(at::kBFloat16)).weights.scalar_type() ==
        at::kFloat);
  Router biased(4, at::kFloat, RouterOptions{.selection = Selection::biased, .experts = 3},
                context());
  CHECK(biased->parameters().size() == 1);
  CHECK(biased->buffers().size() == 1);
  Router adaptive(4, at::kFloat, RouterOptions{.selection = Selection::threshold, .experts = 3},
                  context());
  CHECK(adaptive->parameters().size() == 3);
  const Routing routing = adaptive->forward(at::randn({2, 5, 4}));
  CHECK(routing.sequences == 2);
  routing.weights.select(1, 0).sum().backward();
  CHECK(adaptive->threshold_bias.grad().defined());
}

TEST_CASE("T6 no tokens route to nobody", "[moe][router]") {
  for (const char* name : {"softmax_top_k", "top_k_softmax", "dense", "top_p", "switch_top_1",
                           "threshold", "biased"}) {
    Router router(3, at::kFloat, RouterOptions{.selection = parse_selection(name), .experts = 4},
                  context());
    const Routing routing = router->forward(at::zeros({0, 3}));
    CHECK(routing.tokens() == 0);
    CHECK(expert_counts(routing).sum().item<int64_t>() == 0);
  }
}

TEST_CASE("a router refuses what it cannot do, in one line", "[moe][router]") {
  const auto refusal = [](RouterOptions options) { return error_of([&] { options.validate(); }); };
  CHECK(contains(refusal(top_k(4, 5)), "[router] top_k must be in [1, experts]; got top_k=5"));
  CHECK(contains(refusal({.experts = 0}), "experts must be at least 1; got 0"));
  CHECK(contains(refusal({.top_p = 1.5}), "top_p must be in (0, 1]; got 1.5"));
  CHECK(contains(refusal({.temperature = 0}), "temperature must be positive"));
  CHECK(contains(refusal({.selection = Selection::dense, .renormalise = false}),
                 "dense leaves no choice of renormalise; got false"));
  CHECK(contains(refusal({.tau_max = 0.2}), "tau_max must be in (0, 1 / experts]"));
  CHECK(contains(error_of([] { parse_selection("best"); }), "softmax_top_k, top_k_softmax"));
  at::Tensor logits = at::zeros({2, 8});
  logits[0][0] = std::nan("");
  CHECK(contains(error_of([&] { route({}, logits); }), "logits must be finite"));
  CHECK(contains(error_of([&] {
                   route({}, at::zeros({2, 7}));
                 }),
                 "logits must be [..., tokens, 8]"));
  CHECK(contains(error_of([&] {
                   route({.selection = Selection::threshold}, at::zeros({2, 8}));
                 }),
                 "threshold needs one threshold logit a token; got 0 for 2 tokens"));
  CHECK(contains(error_of([&] {
                   route({}, at::zeros({2, 8}), {.valid = at::ones({3}, at::kBool)});
                 }),
                 "a mask must be bool with one value a token"));
}
