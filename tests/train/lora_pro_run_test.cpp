// LoRA-Pro as an optimiser among others: training, resuming, clipping, refusing.
#include <ATen/ATen.h>
#include <graft/adapters/dora.h>
#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>
#include <graft/train/clip_grad.h>
#include <graft/train/lora_pro.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/ops/gradients.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::adapters::LoraOptions;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::train::lora_pairs;
using graft::train::LoraPair;
using graft::train::LoraPro;
using graft::train::LoraProForm;
using graft::train::LoraProOptions;
using graft::train::NamedTensors;

at::Tensor leaf(const at::Tensor& values) {
  return values.detach().clone().set_requires_grad(true);
}

std::vector<LoraPair> some_pairs(at::ScalarType type = at::kFloat) {
  at::manual_seed(5);
  const auto values = [&](at::IntArrayRef shape) { return leaf(at::randn(shape, type)); };
  return {{"a", values({3, 10}), values({12, 3}), 2.0}, {"b", values({2, 5}), values({8, 2}), 0.5}};
}

void set_gradients(const std::vector<LoraPair>& pairs, int64_t t) {
  at::manual_seed(100 + t);
  for (const LoraPair& pair : pairs) {
    const at::Tensor A = pair.A.detach(), B = pair.B.detach();
    const at::Tensor G = at::randn({B.size(0), A.size(1)}, A.options());
    pair.A.mutable_grad() = B.t().matmul(G) * pair.scale;
    pair.B.mutable_grad() = G.matmul(A.t()) * pair.scale;
  }
}

// The target of `fitted`, and 1/2 |T - U|^2 of the nearest U of rank 4.
at::Tensor fit_target() {
  at::manual_seed(9);
  return at::randn({12, 10}, at::kDouble);
}
double least_loss() {
  return at::linalg_svdvals(fit_target()).narrow(0, 4, 6).square().sum().item<double>() / 2;
}

// 1/2 |s B A - T|^2 after some steps from a new LoRA; `make_update` gives what takes a step.
template <class MakeUpdate>
double fitted(double scale, int steps, MakeUpdate&& make_update) {
  const at::Tensor target = fit_target();
  const double bound = 1 / std::sqrt(10.0);
  const LoraPair pair = {"w", leaf(at::rand({4, 10}, at::kDouble) * (2 * bound) - bound),
                         leaf(at::zeros({12, 4}, at::kDouble)), scale};
  const auto update = make_update(pair);
  at::Tensor loss;
  for (int step = 0; step <= steps; ++step) {
    loss = (pair.B.matmul(pair.A) * pair.scale - target).square().sum() / 2;
    pair.A.mutable_grad() = pair.B.mutable_grad() = at::Tensor();
    loss.backward();
    if (step < steps) update();
  }
  return loss.item<double>();
}

double fitted_by_sgd(double scale, int steps, double lr) {
  return fitted(scale, steps, [lr](const LoraPair& pair) {
    return [pair, lr] {
      const at::NoGradGuard no_grad;
      for (at::Tensor factor : {pair.A, pair.B}) factor.sub_(factor.grad() * lr);
    };
  });
}

double fitted_by_pro(double scale, int steps, double lr, LoraProForm form) {
  return fitted(scale, steps, [=](const LoraPair& pair) {
    return [optimizer = std::make_shared<LoraPro>(std::vector{pair}, LoraProOptions{.form = form}),
            lr] { optimizer->step(lr); };
  });
}

at::Tensor loss_of(GraftDecoder& model) {
  const at::Tensor tokens = graft::testing::some_tokens();
  return at::cross_entropy_loss(model.forward(tokens).view({10, GraftDecoder::kVocabulary}),
                                tokens.roll({1}, {1}).reshape({10}));
}

}  // namespace

TEST_CASE("LoRA-Pro fits a small problem faster than plain SGD, each at its best rate",
          "[train][lora_pro]") {
  constexpr int kSteps = 15;
  for (const double scale : {2.0, 0.25}) {
    double plain = std::numeric_limits<double>::infinity(), pro = plain;
    for (const double lr : {0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0}) {
      const double loss = fitted_by_sgd(scale, kSteps, lr);
      if (std::isfinite(loss)) plain = std::min(plain, loss);
      pro = std::min(pro, fitted_by_pro(scale, kSteps, lr, LoraProForm::sgd));
    }
    INFO("scale " << scale << ": plain " << plain << ", LoRA-Pro " << pro);
    CHECK(pro - least_loss() < 0.5 * (plain - least_loss()));
  }
}

TEST_CASE("LoRA-Pro reaches the best loss of its rank at one rate for every scale",
          "[train][lora_pro]") {
  for (const auto form : {LoraProForm::sgd, LoraProForm::adamw})
    for (const double scale : {2.0, 0.25})
      CHECK(fitted_by_pro(scale, 60, 0.3, form) < 1.05 * least_loss());
}

TEST_CASE("LoRA-Pro trains an attached model, its embedding too", "[train][lora_pro]") {
  for (const auto form : {LoraProForm::sgd, LoraProForm::adamw}) {
    GraftDecoder model;
    auto adapter =
        graft::attach(model, LoraOptions{.rank = 2}, {.targets = {"embed", "q_proj", "o_proj"}});
    const auto pairs = lora_pairs(adapter);
    REQUIRE(pairs.size() == 5);
    CHECK(pairs[0].name == adapter.layers()[0].name);
    CHECK(pairs[0].scale == 8.0);
    LoraPro optimizer(pairs, {.form = form});
    CHECK(optimizer.parameters().size() == 10);
    const double before = loss_of(model).item<double>();
    const double lr = form == LoraProForm::sgd ? 1.0 : 0.01;
    for (int step = 0; step < 30; ++step) {
      optimizer.zero_grad();
      CHECK_FALSE(pairs[0].A.grad().defined());
      loss_of(model).backward();
      optimizer.step(lr);
    }
    CHECK(loss_of(model).item<double>() < 0.8 * before);
  }
}

TEST_CASE("LoRA-Pro resumes bit for bit from its state", "[train][lora_pro]") {
  for (const auto form : {LoraProForm::sgd, LoraProForm::adamw}) {
    const auto pairs = some_pairs();
    LoraPro whole(pairs, {.form = form});
    std::vector<LoraPair> copies;
    NamedTensors state;
    for (int64_t t = 0; t < 6; ++t) {
      if (t == 3) {
        state = whole.state_dict();
        for (const LoraPair& pair : pairs)
          copies.push_back({pair.name, leaf(pair.A), leaf(pair.B), pair.scale});
      }
      set_gradients(pairs, t);
      whole.step(1e-2);
    }
    REQUIRE(state.size() == (form == LoraProForm::sgd ? 1 : 5));
    CHECK(state[0].first == "step");
    CHECK(state[0].second.item<int64_t>() == 3);
    if (form == LoraProForm::adamw) {
      CHECK(state[1].first == "a.exp_avg");
      CHECK(state[2].first == "a.exp_avg_sq");
      CHECK(state[1].second.sizes() == at::IntArrayRef({12, 10}));
      std::swap(state[1], state[4]);  // names decide, not places
    }
    LoraPro resumed(copies, {.form = form});
    resumed.load_state_dict(state);
    CHECK(resumed.step_count() == 3);
    for (int64_t t = 3; t < 6; ++t) {
      set_gradients(copies, t);
      resumed.step(1e-2);
    }
    for (size_t i = 0; i < pairs.size(); ++i) {
      CHECK(at::equal(pairs[i].A, copies[i].A));
      CHECK(at::equal(pairs[i].B, copies[i].B));
    }
  }
}

TEST_CASE("LoRA-Pro's gradient norm is that of the equivalent gradients", "[train][lora_pro]") {
  const auto pairs = some_pairs(at::kDouble);
  set_gradients(pairs, 0);
  LoraPro optimizer(pairs, {.form = LoraProForm::sgd});
  const double norm = optimizer.grad_norm(), lr = 1e-7;
  std::vector<at::Tensor> before;
  for (const LoraPair& pair : pairs) before.push_back(pair.B.matmul(pair.A).detach());
  const at::Tensor kept = pairs[0].A.grad().clone();
  optimizer.step(lr, graft::train::clip_scale(norm, 0.5));
  CHECK(at::equal(pairs[0].A.grad(), kept));
  double square = 0.0;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const at::Tensor moved = pairs[i].B.matmul(pairs[i].A).detach() - before[i];
    square += (moved * (pairs[i].scale / lr)).square().sum().item<double>();
  }
  REQUIRE(norm > 1.0);
  CHECK(std::abs(std::sqrt(square) - 0.5) < 1e-5);
}

TEST_CASE("LoRA-Pro refuses adapters that train something else", "[train][lora_pro]") {
  const auto refusal = [](const auto& method, const graft::AttachOptions& options) {
    GraftDecoder model;
    const auto adapter = graft::attach(model, method, options);
    return error_of([&] { lora_pairs(adapter); });
  };
  const graft::AttachOptions at_q = {.targets = {"q_proj"}};
  CHECK(contains(refusal(graft::adapters::DoraOptions{.rank = 2}, at_q),
                 "only LoRA layers have the factors that this optimiser steps; got dora (layer "));
  CHECK(contains(refusal(LoraOptions{.rank = 2, .lr_ratio = 16}, at_q), "got lr_ratio=16"));
  CHECK(contains(refusal(LoraOptions{.rank = 2, .bias = true}, at_q),
                 "the adapter trains 2 other parameters: "));
  graft::AttachOptions biases = at_q, whole = at_q;
  biases.bias = graft::TrainedBias::adapted_layers;
  CHECK(contains(refusal(LoraOptions{.rank = 2}, biases), "2 other parameters: "));
  whole.modules_to_save = {"lm_head"};
  CHECK(contains(refusal(LoraOptions{.rank = 2}, whole), "2 other parameters: "));
}

TEST_CASE("LoRA-Pro refuses bad pairs and options in words", "[train][lora_pro]") {
  const at::Tensor A = leaf(at::ones({2, 5})), B = leaf(at::ones({8, 2}));
  const auto error = [](const std::vector<LoraPair>& pairs) {
    return error_of([&] { LoraPro optimizer(pairs); });
  };
  CHECK(contains(error({}), "there must be a pair to train"));
  CHECK(
      contains(error({{"q", A, B}, {"q", leaf(A), leaf(B)}}), "names must differ; got 'q' twice"));
  CHECK(contains(error({{"q", A, B}, {"k", leaf(A), B}}), "in one pair; got one in 'q' and 'k'"));
  const at::Tensor square = leaf(at::ones({2, 2}));
  CHECK(contains(error({{"q", square, square}}), "two tensors"));
  CHECK(contains(error({{"q", A, leaf(at::ones({8, 3}))}}), "got [2, 5] and [8, 3] (layer 'q')"));
  CHECK(contains(error({{"q", A, at::Tensor()}}), "got undefined (layer 'q')"));
  CHECK(contains(error({{"q", A, at::ones({8, 2})}}), "leaf that requires a gradient"));
  CHECK(contains(error({{"q", A, leaf(at::ones({8, 2}, at::kDouble))}}), "one type"));
  CHECK(contains(error({{"q", leaf(at::ones({2, 5}, at::kBFloat16)), B}}), "float32 or float64"));
  CHECK(contains(error({{"q", leaf(at::ones({2, 0})), B}}), "not empty"));
  CHECK(contains(error({{"q", leaf(at::ones({2})), B}}), "a matrix or a kernel"));
  CHECK(contains(error({{"q", A, B, 0.0}}), "scale must be finite and not 0; got 0"));
  CHECK(contains(error({{"q", A, B, std::nan("")}}), "scale must be finite"));
  const auto options_error = [&](const LoraProOptions& options) {
    return error_of([&] { LoraPro optimizer({{"q", A, B}}, options); });
  };
  CHECK(contains(options_error({.beta1 = 1.0}), "beta1 must be in [0, 1); got 1"));
  CHECK(contains(options_error({.beta2 = -0.1}), "beta2"));
  CHECK(contains(options_error({.eps = 0.0}), "eps must be > 0"));
  CHECK(contains(options_error({.weight_decay = -1.0}), "weight_decay must be >= 0; got -1"));
  CHECK(contains(options_error({.damping = 0.0}), "damping must be in (0, 1); got 0"));
}

TEST_CASE("LoRA-Pro refuses a step that it cannot take and changes nothing", "[train][lora_pro]") {
  const auto pairs = some_pairs();
  LoraPro optimizer(pairs, {.weight_decay = 0.5});
  const auto error = [&](double lr, double grad_scale = 1.0) {
    return error_of([&] { optimizer.step(lr, grad_scale); });
  };
  set_gradients(pairs, 0);
  const at::Tensor A = pairs[0].A.detach().clone();
  CHECK(contains(error(std::nan("")), "lr must be finite"));
  CHECK(contains(error(-1.0), "lr must be finite and >= 0; got -1"));
  CHECK(contains(error(2.0), "lr * weight_decay must be below 1; got 1"));
  CHECK(contains(error(0.1, std::numeric_limits<double>::infinity()), "grad_scale"));
  pairs[1].B.mutable_grad()[0][0] = std::nan("");
  CHECK(contains(error(0.1), "factors and gradients must be finite; got others (layer 'b')"));
  pairs[1].B.mutable_grad() = at::Tensor();
  CHECK(contains(error(0.1), "every factor must have a gradient; 1 have none: b B"));
  CHECK(contains(error_of([&] { optimizer.grad_norm(); }), "1 have none: b B"));
  CHECK(at::equal(pairs[0].A, A));
  CHECK(optimizer.step_count() == 0);
}

TEST_CASE("LoRA-Pro refuses a state that does not fit and keeps its own", "[train][lora_pro]") {
  const auto pairs = some_pairs();
  LoraPro optimizer(pairs);
  set_gradients(pairs, 0);
  optimizer.step(0.1);
  NamedTensors state = optimizer.state_dict();
  state.erase(state.begin() + 1);
  state[2].second = at::zeros({2});
  state.emplace_back("c.exp_avg", at::zeros({2}));
  const std::string message = error_of([&] { optimizer.load_state_dict(state); });
  CHECK(contains(message, "missing: [a.exp_avg], unexpected: [c.exp_avg]"));
  CHECK(contains(message, "of another shape or dtype: [b.exp_avg]"));
  state = optimizer.state_dict();
  state.push_back(state.back());
  CHECK(contains(error_of([&] { optimizer.load_state_dict(state); }), "given twice: 1"));
  state = optimizer.state_dict();
  state[0].second = at::scalar_tensor(-1, at::kLong);
  CHECK(contains(error_of([&] { optimizer.load_state_dict(state); }), "dtype: [step]"));
  CHECK(optimizer.step_count() == 1);
}
