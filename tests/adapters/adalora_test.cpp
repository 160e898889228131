#include <ATen/ATen.h>
#include <graft/adapters/adalora.h>
#include <graft/core/random.h>

#include <cmath>

#include "tests/support/adapter_kit.h"
#include "tests/support/method_tests.h"

namespace {

using namespace graft::adapters;
using namespace graft::testing;
using graft::nn::FrozenConv;
using graft::nn::FrozenLinear;

AdaLoraImpl make(const graft::nn::FrozenLayer& base, const AdaLoraOptions& options,
                 const std::string& name = "q_proj") {
  return make_random<AdaLoraImpl>(base, options, name);
}

void set_gradients(AdaLoraImpl& adapter, uint64_t seed) {
  at::manual_seed(seed);
  for (at::Tensor& p : adapter.parameters()) p.mutable_grad() = at::randn_like(p);
}

std::vector<bool> active(const AdaLoraImpl& adapter) {
  std::vector<bool> on;
  for (int64_t i = 0; i < adapter.lora_E.size(0); ++i)
    on.push_back(adapter.lora_E[i].item<double>() != 0);
  return on;
}

}  // namespace

namespace {

MethodCase kit_case(const AdaLoraOptions& given) {
  MethodCase method;
  method.method = "adalora";
  method.recipe = [given](int64_t rank) {
    AdaLoraOptions options = given;
    options.init_rank = rank;
    options.target_rank = 1;
    return make_recipe(options);
  };
  method.count = [](const graft::nn::FrozenLayer& layer, int64_t rank) {
    const at::Tensor& weight = graft::nn::weight_of(layer);
    return rank * (weight.numel() / weight.size(0) + 1 + weight.size(0));
  };
  return method;
}

}  // namespace

TEST_CASE("AdaLoRA keeps the promises of adapters", "[adapters][adalora]") {
  // E, A and B start large: five small steps from 0.02 would not show in an fp32 loss.
  MethodCase method = kit_case({.lora_alpha = 0.5, .random_start = true});
  method.zero_at_first = [](const std::string&) { return std::vector<std::string>{}; };
  method.starts_as_base = false;
  method.unfit = {"Embedding"};
  method.unfit_layers = {"groups"};
  run_adapter_kit(method);
}

TEST_CASE("AdaLoRA starts as the base, and only E has a gradient at first", "[adapters][adalora]") {
  MethodCase method = kit_case({});
  method.zero_at_first = [](const std::string&) {
    return std::vector<std::string>{"lora_A", "lora_B"};
  };
  for (const auto& layer : all_layer_cases()) {
    if (layer.kind == "Embedding" || layer.name == "groups") continue;
    for (const auto type : {at::kFloat, at::kDouble}) {
      INFO(layer.kind << " (" << layer.name << "), " << type);
      Subject start(method, layer, layer.ranks.back(), type);
      check_starts_as_base(start);
      check_first_gradients(method, start);
    }
  }
}

TEST_CASE("AdaLoRA on a Linear is W x + b + s' B (E * A x) with the scale of the initial rank",
          "[adapters][adalora]") {
  const FrozenLinear base = some_linear(6, 5);
  AdaLoraImpl adapter = make(base, {.init_rank = 4, .target_rank = 2, .lora_alpha = 6});
  {
    const at::NoGradGuard no_grad;
    adapter.lora_E[1].zero_();  // a triplet that is off changes nothing of the scale
  }
  const at::Tensor x = random({2, 3, 5}),
                   weight =
                       base.weight +
                       6.0 / 4.00001 *
                           adapter.lora_B.mm(adapter.lora_E.view(-1).diag()).mm(adapter.lora_A);
  CHECK(adapter.active_rank() == 3);
  CHECK(distance(adapter.forward(base, x), at::linear(x, weight, base.bias)) < 1e-13);
  CHECK(distance(adapter.merged_weight(base), weight) < 1e-13);
}

TEST_CASE("AdaLoRA on a convolution is the convolution with the flat product",
          "[adapters][adalora]") {
  at::manual_seed(2);
  const FrozenConv base{random({4, 3, 3}), random({4}), {2}, {1}, {2}};
  AdaLoraImpl adapter = make(base, {.init_rank = 2, .target_rank = 1, .lora_alpha = 4});
  CHECK(adapter.lora_A.sizes() == at::IntArrayRef({2, 9}));  // PEFT's flat shapes
  CHECK(adapter.lora_B.sizes() == at::IntArrayRef({4, 2}));
  const at::Tensor x = random({2, 3, 9});
  const at::Tensor weight =
      base.weight +
      (4.0 / 2.00001 * adapter.lora_B.mm(adapter.lora_E * adapter.lora_A)).view({4, 3, 3});
  const std::vector<int64_t> stride = {2}, padding = {1}, dilation = {2};
  CHECK(distance(adapter.forward(base, x),
                 at::conv1d(x, weight, base.bias, stride, padding, dilation, 1)) < 1e-13);
  CHECK(distance(adapter.merged_weight(base), weight) < 1e-13);
}

TEST_CASE("AdaLoRA starts with E = 0 and small Gaussian factors", "[adapters][adalora]") {
  at::manual_seed(3);
  const FrozenLinear base{random({300, 200}), {}};
  const AdaLoraImpl adapter(base, {}, {"q_proj", 1}), again(base, {}, {"q_proj", 1}),
      other(base, {}, {"k_proj", 1}), wild(base, {.random_start = true}, {"q_proj", 1});
  for (const at::Tensor& factor : {adapter.lora_A, adapter.lora_B})
    CHECK(std::abs(factor.std().item<double>() / 0.02 - 1) < 0.05);
  CHECK(adapter.active_rank() == 0);
  CHECK(at::equal(adapter.lora_A, again.lora_A));
  CHECK_FALSE(at::equal(adapter.lora_A, other.lora_A));
  CHECK(wild.active_rank() == 12);
  CHECK(std::abs(wild.lora_A.std().item<double>() - 1) < 0.05);
}

TEST_CASE("AdaLoRA's penalty is the mean distance of A and B from orthonormal factors",
          "[adapters][adalora]") {
  const FrozenLinear base = some_linear(6, 5);
  const AdaLoraOptions options{.init_rank = 3, .target_rank = 1, .orth_reg_weight = 0.3};
  AdaLoraImpl a = make(base, options), b = make(some_linear(7, 4), options);
  randomise(b.parameters(), 9);
  const auto norm = [](const at::Tensor& gram) {
    return (gram - at::eye(3, at::kDouble)).square().sum().sqrt();
  };
  const at::Tensor expected = 0.3 / 4 *
                              (norm(a.lora_A.mm(a.lora_A.t())) + norm(a.lora_B.t().mm(a.lora_B)) +
                               norm(b.lora_A.mm(b.lora_A.t())) + norm(b.lora_B.t().mm(b.lora_B)));
  CHECK(distance(AdaLoraImpl::penalty({&a, &b}), expected) < 1e-14);
  check_leaf_gradients(
      [&] {
        return AdaLoraImpl::penalty({&a, &b}).view({1});
      },
      {{"A", a.lora_A}, {"B", b.lora_B}});
}

TEST_CASE("exactly orthonormal factors have a penalty of 0 and gradients of 0",
          "[adapters][adalora]") {
  AdaLoraImpl adapter = make(some_linear(6, 5), {.init_rank = 3, .target_rank = 1});
  {
    const at::NoGradGuard no_grad;
    adapter.lora_A.copy_(at::eye(3, 5));
    adapter.lora_B.copy_(at::eye(6, 3));
  }
  const at::Tensor penalty = AdaLoraImpl::penalty({&adapter});
  CHECK(penalty.item<double>() == 0.0);
  penalty.backward();
  CHECK(adapter.lora_A.grad().count_nonzero().item<int64_t>() == 0);
  CHECK(adapter.lora_B.grad().count_nonzero().item<int64_t>() == 0);
  AdaLoraImpl without =
      make(some_linear(6, 5), {.init_rank = 3, .target_rank = 1, .orth_reg_weight = 0});
  CHECK_FALSE(AdaLoraImpl::penalty({&without}).defined());
}

TEST_CASE("the budget falls from all triplets to the target along a cubic curve",
          "[adapters][adalora]") {
  const AdaLoraSchedule schedule{24, 6, 5, 7, 3, 40};
  CHECK(schedule.last_choice() == 33);
  for (int64_t t = 0; t <= 5; ++t) CHECK((schedule.budget(t) == 24 && !schedule.chooses(t)));
  CHECK(schedule.budget(6) < 24);
  for (int64_t t = 1; t <= 60; ++t) CHECK(schedule.budget(t) <= schedule.budget(t - 1));
  CHECK(schedule.budget(19) == 6 + 2);  // half way: 18 / 8 = 2.25, rounded down
  CHECK(schedule.budget(32) == 6);
  for (int64_t t = 33; t <= 60; ++t) CHECK(schedule.budget(t) == 6);
  for (int64_t t = 6; t < 33; ++t) CHECK(schedule.chooses(t) == (t % 3 == 0));
  CHECK(schedule.chooses(33));
  CHECK_FALSE(schedule.chooses(34));
  // The last choice is made whether or not its step is a multiple.
  CHECK(AdaLoraSchedule{24, 6, 5, 6, 3, 40}.chooses(34));
}

namespace {

// The importance of one parameter by its definition, element by element.
struct LiteralImportance {
  std::vector<double> average, uncertainty;
  void update(const at::Tensor& parameter, double beta1, double beta2) {
    const at::Tensor p = parameter.detach().reshape(-1), g = parameter.grad().reshape(-1);
    average.resize(p.numel());
    uncertainty.resize(p.numel());
    for (int64_t i = 0; i < p.numel(); ++i) {
      const double now = std::abs(p[i].item<double>() * g[i].item<double>());
      average[i] = beta1 * average[i] + (1 - beta1) * now;
      uncertainty[i] = beta2 * uncertainty[i] + (1 - beta2) * std::abs(now - average[i]);
    }
  }
  double score(int64_t i) const { return average[i] * uncertainty[i]; }
};

}  // namespace

TEST_CASE("a triplet's score is that of its E and the means of its rows", "[adapters][adalora]") {
  AdaLoraImpl adapter = make(some_linear(6, 5), {.init_rank = 3,
                                                 .target_rank = 1,
                                                 .tinit = 50,
                                                 .beta1 = 0.6,
                                                 .beta2 = 0.7,
                                                 .total_step = 100});
  CHECK(adapter.triplet_scores().count_nonzero().item<int64_t>() == 0);
  LiteralImportance A, B, E;
  for (int64_t step = 0; step < 4; ++step) {
    set_gradients(adapter, 100 + static_cast<uint64_t>(step));
    AdaLoraImpl::end_step({&adapter}, {.step = step});
    A.update(adapter.lora_A, 0.6, 0.7);
    B.update(adapter.lora_B, 0.6, 0.7);
    E.update(adapter.lora_E, 0.6, 0.7);
  }
  for (int64_t i = 0; i < 3; ++i) {
    double expected = E.score(i);
    for (int64_t k = 0; k < 5; ++k) expected += A.score(i * 5 + k) / 5;
    for (int64_t n = 0; n < 6; ++n) expected += B.score(n * 3 + i) / 6;
    CHECK(std::abs(adapter.triplet_scores()[i].item<double>() - expected) < 1e-15);
  }
  CHECK(adapter.active_rank() == 3);  // before tinit nothing is switched off
}

TEST_CASE("the lowest scores of all layers together are switched off", "[adapters][adalora]") {
  const AdaLoraOptions options{.init_rank = 4, .target_rank = 1, .total_step = 3};
  AdaLoraImpl a = make(some_linear(6, 5), options), b = make(some_linear(9, 7), options, "k_proj");
  set_gradients(a, 1);
  set_gradients(b, 2);
  const StepInfo info{.step = 1};
  AdaLoraImpl::end_step({&a, &b}, info);
  const at::Tensor scores = at::cat({a.triplet_scores(), b.triplet_scores()});
  CHECK(AdaLoraImpl::figures({&a, &b}).front() == std::pair<std::string, double>("budget", 3.0));
  CHECK(AdaLoraImpl::figures({&a, &b})[1] == std::pair<std::string, double>("active_rank", 1.5));
  const double third = std::get<0>(scores.sort(0, true))[2].item<double>();
  for (int64_t i = 0; i < 8; ++i) {
    const AdaLoraImpl& layer = i < 4 ? a : b;
    CHECK(active(layer)[static_cast<size_t>(i % 4)] == (scores[i].item<double>() >= third));
  }
}

TEST_CASE("equal scores keep the budget, and a full budget keeps everything",
          "[adapters][adalora]") {
  AdaLoraImpl adapter =
      make(some_linear(6, 5), {.init_rank = 4, .target_rank = 2, .total_step = 3});
  AdaLoraImpl::end_step({&adapter}, {.step = 2});  // no gradients at all: all scores are 0
  CHECK(active(adapter) == std::vector<bool>{false, false, true, true});
  AdaLoraImpl whole = make(some_linear(6, 5), {.init_rank = 4, .target_rank = 4, .total_step = 3});
  for (int64_t step = 0; step < 5; ++step) {
    set_gradients(whole, 5);
    AdaLoraImpl::end_step({&whole}, {.step = step});
  }
  CHECK(whole.active_rank() == 4);
}

TEST_CASE("triplets may come back until the choice is final", "[adapters][adalora]") {
  AdaLoraImpl adapter =
      make(some_linear(6, 5),
           {.init_rank = 4, .target_rank = 1, .tfinal = 4, .delta_t = 2, .total_step = 10});
  const auto step = [&](int64_t index, int64_t favourite) {
    {
      const at::NoGradGuard no_grad;
      adapter.lora_E.fill_(1.0);  // as an optimiser with momentum would
    }
    for (at::Tensor& p : adapter.parameters()) p.mutable_grad() = at::zeros_like(p);
    adapter.lora_E.mutable_grad()[favourite] = std::pow(10.0, index);
    AdaLoraImpl::end_step({&adapter}, {.step = index});
  };
  for (int64_t t = 0; t < 4; ++t) step(t, 0);
  step(4, 0);
  CHECK(active(adapter)[0]);
  CHECK(adapter.active_rank() == 1);
  step(5, 2);
  CHECK(adapter.active_rank() == 4);  // no choice after an odd step
  step(6, 2);                         // the last one
  CHECK(active(adapter) == std::vector<bool>{false, false, true, false});
  const at::Tensor scores = adapter.triplet_scores();
  for (int64_t t = 7; t < 10; ++t) step(t, 3);
  CHECK(active(adapter) == std::vector<bool>{false, false, true, false});
  CHECK(at::equal(adapter.triplet_scores(), scores));  // nothing is measured any more
}

TEST_CASE("the steps of the run come from the option or from the training loop",
          "[adapters][adalora]") {
  AdaLoraImpl open = make(some_linear(6, 5), {.init_rank = 4, .target_rank = 1, .tinit = 3});
  const auto refusal = [&](AdaLoraImpl& adapter, const StepInfo& info) {
    return error_of([&] { AdaLoraImpl::begin_step({&adapter}, info); });
  };
  CHECK(contains(refusal(open, {}), "[adalora] the number of steps must be known in advance"));
  CHECK(contains(refusal(open, {.total_steps = 3}),
                 "must leave steps of total_step for the budget to fall; got tinit=3, tfinal=0, "
                 "total_step=3"));
  AdaLoraImpl::begin_step({&open}, {.total_steps = 4});
  set_gradients(open, 1);
  AdaLoraImpl::end_step({&open}, {.step = 4, .total_steps = 4});
  CHECK(open.active_rank() == 1);
  // The option wins.
  AdaLoraImpl fixed =
      make(some_linear(6, 5), {.init_rank = 4, .target_rank = 1, .total_step = 100});
  set_gradients(fixed, 1);
  AdaLoraImpl::begin_step({&fixed}, {.total_steps = 0});
  AdaLoraImpl::end_step({&fixed}, {.step = 1, .total_steps = 2});
  CHECK(fixed.active_rank() == 3);
}

TEST_CASE("AdaLoRA's averages and choice can be taken up again", "[adapters][adalora]") {
  const AdaLoraOptions options{
      .init_rank = 4, .target_rank = 1, .tfinal = 3, .delta_t = 2, .total_step = 12};
  const auto run = [](AdaLoraImpl& adapter, int64_t from, int64_t to) {
    for (int64_t step = from; step < to; ++step) {
      set_gradients(adapter, 40 + static_cast<uint64_t>(step));
      const at::NoGradGuard no_grad;
      for (at::Tensor& p : adapter.parameters()) p.sub_(p.grad(), 0.1);
      AdaLoraImpl::end_step({&adapter}, {.step = step});
    }
  };
  for (const int64_t stop : {0, 5, 11}) {
    AdaLoraImpl straight = make(some_linear(6, 5), options),
                first = make(some_linear(6, 5), options), second = make(some_linear(6, 5), options);
    run(straight, 0, 12);
    run(first, 0, stop);
    {
      const at::NoGradGuard no_grad;
      const auto from = first.state_tensors(), to = second.state_tensors();
      CHECK(from.size() == 7);
      for (size_t i = 0; i < from.size(); ++i) {
        CHECK(from[i].suffix == to[i].suffix);
        at::Tensor(to[i].tensor).copy_(from[i].tensor);
      }
      for (size_t i = 0; i < 3; ++i) second.parameters()[i].copy_(first.parameters()[i]);
    }
    run(second, stop, 12);
    CHECK(at::equal(second.lora_E, straight.lora_E));
    CHECK(at::equal(second.triplet_scores(), straight.triplet_scores()));
    CHECK(straight.active_rank() == 1);
  }
}

TEST_CASE("AdaLoRA's dropout hits the branch alone, in training alone", "[adapters][adalora]") {
  const FrozenLinear base = some_linear(6, 5);
  AdaLoraImpl adapter =
      make(base, {.init_rank = 2, .target_rank = 1, .lora_alpha = 2, .dropout = 0.5});
  const at::Tensor x = random({8, 5});
  const auto site = static_cast<uint32_t>(graft::random::hash_name("q_proj"));
  const auto branch = [&](const at::Tensor& input) {
    return at::linear(x, base.weight, base.bias) +
           2.0 / 2.00001 * input.mm((adapter.lora_E * adapter.lora_A).t()).mm(adapter.lora_B.t());
  };
  CHECK(distance(adapter.forward(base, x),
                 branch(graft::ops::apply_dropout(x, {0.5, {1, site, 0}}))) < 1e-13);
  CHECK(adapter.counters() == std::vector<int64_t>{1});
  adapter.eval();
  CHECK(distance(adapter.forward(base, x), branch(x)) < 1e-13);
  CHECK(contains(error_of([&] { adapter.set_counters({}); }), "one counter a layer"));
}
