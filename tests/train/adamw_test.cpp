#include <torch/optim/adamw.h>

#include <ATen/ATen.h>
#include <graft/train/adamw.h>
#include <graft/train/clip_grad.h>

#include <cmath>
#include <limits>

#include "tests/ops/gradients.h"

namespace {

using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;
using graft::train::AdamW;
using graft::train::NamedTensors;
using graft::train::ParameterGroup;

at::Tensor leaf(const at::Tensor& values) {
  return values.detach().clone().set_requires_grad(true);
}

// A few shapes, one of them larger than the piece that a thread takes.
NamedTensors parameters(at::ScalarType type = at::kFloat) {
  at::manual_seed(30);
  return {{"a", leaf(at::randn({20000}, type))},
          {"b", leaf(at::randn({3, 5}, type))},
          {"c", leaf(at::randn({1}, type))}};
}

// Gradients of step t: some large, some tiny, some zero.
void set_gradients(const NamedTensors& list, int64_t t) {
  at::manual_seed(100 + t);
  for (const auto& [name, parameter] : list) {
    const at::Tensor spread = at::exp(3 * at::randn(parameter.sizes(), parameter.options()));
    at::Tensor gradient = at::randn(parameter.sizes(), parameter.options()) * spread;
    gradient.masked_fill_(gradient.abs() < 0.01, 0.0);
    parameter.mutable_grad() = gradient.detach();
  }
}

}  // namespace

TEST_CASE("AdamW takes the steps that torch::optim::AdamW takes", "[train][adamw]") {
  for (const auto type : {at::kFloat, at::kDouble}) {
    NamedTensors ours = parameters(type), theirs = parameters(type);
    AdamW optimizer({{{ours[0], ours[1]}, 1.0, 0.1}, {{ours[2]}, 0.5, 0.0}});
    const auto options = [](double weight_decay) {
      return std::make_unique<torch::optim::AdamWOptions>(
          torch::optim::AdamWOptions(1e-2).weight_decay(weight_decay));
    };
    std::vector<torch::optim::OptimizerParamGroup> groups;
    groups.emplace_back(std::vector<at::Tensor>{theirs[0].second, theirs[1].second}, options(0.1));
    groups.emplace_back(std::vector<at::Tensor>{theirs[2].second}, options(0.0));
    torch::optim::AdamW reference(std::move(groups), torch::optim::AdamWOptions(1e-2));
    for (int64_t t = 0; t < 20; ++t) {
      const double lr = 1e-2 / static_cast<double>(t + 1);
      set_gradients(ours, t);
      set_gradients(theirs, t);
      static_cast<torch::optim::AdamWOptions&>(reference.param_groups()[0].options()).lr(lr);
      static_cast<torch::optim::AdamWOptions&>(reference.param_groups()[1].options()).lr(lr / 2);
      optimizer.step(lr);
      reference.step();
    }
    // A few units in the last place of numbers of size 1 to 4.
    const double tolerance = type == at::kFloat ? 2e-6 : 1e-14;
    for (size_t i = 0; i < ours.size(); ++i) {
      INFO("parameter " << ours[i].first << ", dtype " << at::toString(type));
      CHECK(largest_difference(ours[i].second, theirs[i].second) < tolerance);
    }
    CHECK(optimizer.step_count() == 20);
  }
}

TEST_CASE("AdamW's first step without decay moves by the learning rate", "[train][adamw]") {
  const at::Tensor p = leaf(at::zeros({2}));
  AdamW optimizer({{{{"p", p}}}});
  p.mutable_grad() = at::tensor({3.0f, -0.02f});
  optimizer.step(0.1);
  CHECK(largest_difference(p, at::tensor({-0.1f, 0.1f})) < 1e-6);
}

TEST_CASE("AdamW's grad_scale equals scaling the gradients first", "[train][adamw]") {
  NamedTensors scaled = parameters(at::kDouble), plain = parameters(at::kDouble);
  AdamW first({{scaled, 1.0, 0.01}}), second({{plain, 1.0, 0.01}});
  for (int64_t t = 0; t < 3; ++t) {
    set_gradients(scaled, t);
    set_gradients(plain, t);
    const double scale = graft::train::clip_scale(graft::train::grad_norm(first.parameters()), 1.0);
    REQUIRE(scale < 1.0);
    const at::Tensor before = scaled[0].second.grad().clone();
    first.step(1e-2, scale);
    CHECK(at::equal(scaled[0].second.grad(), before));
    for (const auto& entry : plain) entry.second.mutable_grad().mul_(scale);
    second.step(1e-2);
  }
  for (size_t i = 0; i < plain.size(); ++i) {
    CHECK(largest_difference(scaled[i].second, plain[i].second) < 1e-14);
  }
}

TEST_CASE("AdamW resumes bit for bit from its state", "[train][adamw]") {
  NamedTensors straight = parameters();
  AdamW whole({{straight, 1.0, 0.1}});
  NamedTensors saved_parameters, state;
  for (int64_t t = 0; t < 6; ++t) {
    if (t == 3) {
      state = whole.state_dict();
      for (const auto& [name, p] : straight) saved_parameters.emplace_back(name, leaf(p));
    }
    set_gradients(straight, t);
    whole.step(1e-2);
  }
  REQUIRE(state.size() == 7);
  CHECK(state[0].first == "step");
  CHECK(state[1].first == "a.exp_avg");
  CHECK(state[2].first == "a.exp_avg_sq");
  CHECK(state[0].second.item<int64_t>() == 3);

  AdamW resumed({{saved_parameters, 1.0, 0.1}});
  std::swap(state[1], state[6]);  // names decide, not places
  resumed.load_state_dict(state);
  CHECK(resumed.step_count() == 3);
  for (int64_t t = 3; t < 6; ++t) {
    set_gradients(saved_parameters, t);
    resumed.step(1e-2);
  }
  for (size_t i = 0; i < straight.size(); ++i) {
    CHECK(at::equal(straight[i].second, saved_parameters[i].second));
  }
}

TEST_CASE("AdamW takes transposed parameters and gradients of any layout", "[train][adamw]") {
  at::manual_seed(31);
  const at::Tensor values = at::randn({4, 6}), gradient = at::randn({4, 6});
  const at::Tensor dense = leaf(values);
  const at::Tensor transposed = values.t().contiguous().t().set_requires_grad(true);
  AdamW first({{{{"p", dense}}}}), second({{{{"p", transposed}}}});
  dense.mutable_grad() = gradient;
  transposed.mutable_grad() = gradient;
  first.step(0.1);
  second.step(0.1);
  CHECK(at::equal(dense, transposed));
  second.load_state_dict(first.state_dict());
  dense.mutable_grad() = gradient.t().contiguous().t();
  first.step(0.1);
  second.step(0.1);
  CHECK(at::equal(dense, transposed));
}

TEST_CASE("AdamW gives the same bits for every number of threads", "[train][adamw]") {
  graft::testing::check_threads([] {
    NamedTensors list = parameters();
    AdamW optimizer({{list, 1.0, 0.1}});
    for (int64_t t = 0; t < 2; ++t) {
      set_gradients(list, t);
      optimizer.step(1e-2);
    }
    return graft::testing::Tensors{list[0].second.detach(), list[1].second.detach()};
  });
}

TEST_CASE("AdamW names parameters without a gradient and changes nothing", "[train][adamw]") {
  NamedTensors list;
  for (int i = 0; i < 13; ++i) {
    list.emplace_back("layer" + std::to_string(i), leaf(at::ones({2})));
  }
  AdamW optimizer({{list}});
  list[3].second.mutable_grad() = at::ones({2});
  const std::string message = error_of([&] { optimizer.step(0.1); });
  CHECK(contains(message, "12 of 13 have none: layer0, layer1, layer2, layer4"));
  CHECK(contains(message, "layer10 and 2 more"));
  CHECK_FALSE(contains(message, "layer11"));
  CHECK(at::equal(list[3].second, at::ones({2})));
  CHECK(optimizer.step_count() == 0);
}

TEST_CASE("AdamW passes over parameters without a gradient when asked to", "[train][adamw]") {
  NamedTensors list = parameters();
  AdamW optimizer({{list, 1.0, 0.1}}, {.allow_missing_gradients = true});
  set_gradients(list, 0);
  list[1].second.mutable_grad() = at::Tensor();
  const at::Tensor kept = list[1].second.detach().clone(), moved = list[0].second.detach().clone();
  optimizer.step(0.1);
  CHECK(at::equal(list[1].second, kept));
  CHECK_FALSE(at::equal(list[0].second, moved));
}

TEST_CASE("AdamW drops gradients, and a graph notices that it changed a parameter",
          "[train][adamw]") {
  const at::Tensor p = leaf(at::ones({2}));
  AdamW optimizer({{{{"p", p}}}});
  const at::Tensor stale = (p * p).sum();
  p.mutable_grad() = at::ones({2});
  optimizer.step(0.1);
  optimizer.zero_grad();
  CHECK_FALSE(p.grad().defined());
  CHECK_THROWS(stale.backward());
}

TEST_CASE("AdamW refuses a state that does not fit and keeps its own", "[train][adamw]") {
  NamedTensors list = parameters();
  AdamW optimizer({{list}});
  set_gradients(list, 0);
  optimizer.step(0.1);
  NamedTensors state = optimizer.state_dict();
  state.erase(state.begin() + 1);
  state[2].second = at::zeros({2});
  state.emplace_back("d.exp_avg", at::zeros({2}));
  const std::string message = error_of([&] { optimizer.load_state_dict(state); });
  CHECK(contains(message, "missing: [a.exp_avg]"));
  CHECK(contains(message, "unexpected: [d.exp_avg]"));
  CHECK(contains(message, "of another shape or dtype: [b.exp_avg]"));
  CHECK(contains(error_of([&] { optimizer.load_state_dict({}); }), "missing: [step, a.exp_avg"));

  state = optimizer.state_dict();
  state.push_back(state.back());
  CHECK(contains(error_of([&] { optimizer.load_state_dict(state); }), "given twice: 1"));
  state = optimizer.state_dict();
  state[0].second = at::scalar_tensor(-1, at::kLong);
  CHECK(contains(error_of([&] { optimizer.load_state_dict(state); }), "dtype: [step]"));
  CHECK(optimizer.step_count() == 1);
}

TEST_CASE("AdamW refuses bad parameters and options in words", "[train][adamw]") {
  const at::Tensor p = leaf(at::ones({2}));
  const auto error = [](const NamedTensors& list) {
    return error_of([&] { AdamW optimizer({{list}}); });
  };
  CHECK(contains(error({}), "there must be a parameter to train"));
  CHECK(contains(error({{"p", p}, {"q", p}}), "listed once; got it as 'p' and 'q'"));
  CHECK(contains(error({{"p", p}, {"p", leaf(p)}}), "names must differ; got 'p' twice"));
  CHECK(contains(error({{"p", at::ones({2})}}), "requires a gradient; 'p' is not"));
  CHECK(contains(error({{"p", p * 2}}), "must be a leaf"));
  CHECK(contains(error({{"p", at::Tensor()}}), "got undefined ('p')"));
  CHECK(contains(error({{"p", leaf(at::ones({2}).to(at::kBFloat16))}}), "float32 or float64"));
  CHECK(contains(error({{"p", at::ones({4, 4}).narrow(1, 0, 2).set_requires_grad(true)}}),
                 "dense in memory"));
  const auto options_error = [&](const graft::train::AdamWOptions& options) {
    return error_of([&] { AdamW optimizer({{{{"p", p}}}}, options); });
  };
  CHECK(contains(options_error({.beta1 = 1.0}), "beta1 must be in [0, 1); got 1"));
  CHECK(contains(options_error({.beta2 = -0.1}), "beta2"));
  CHECK(contains(options_error({.eps = 0.0}), "eps must be > 0"));
  CHECK(contains(error_of([&] {
                   AdamW optimizer({{{{"p", p}}, -1.0, 0.0}});
                 }),
                 "lr_scale must be >= 0; got -1 (group 0)"));
  CHECK(contains(error_of([&] { AdamW optimizer({{{{"p", p}}, 1.0, -0.1}}); }), "weight_decay"));

  AdamW optimizer({{{{"p", p}}}});
  p.mutable_grad() = at::ones({2});
  CHECK(contains(error_of([&] { optimizer.step(std::nan("")); }), "lr must be finite"));
  CHECK(contains(error_of([&] { optimizer.step(0.1, std::numeric_limits<double>::infinity()); }),
                 "grad_scale must be finite"));
  CHECK(at::equal(p, at::ones({2})));
}
