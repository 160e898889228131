// The optimiser, and a whole decoder with an adapter, on emulated kernels.
#include <ATen/ATen.h>
#include <graft/adapters/dora.h>
#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>
#include <graft/moe/mix_lora_recipe.h>
#include <graft/ops/device_paths.h>
#include <graft/train/adamw.h>
#include <graft/train/clip_grad.h>

#include <cmath>
#include <functional>

#include "examples/models/decoder.h"
#include "examples/models/load.h"
#include "tests/cuda_glue/device_under_test.h"
#include "tests/support/testing.h"

namespace {

using namespace graft;
using graft::testing::OnDevice;
using graft::testing::test_device;

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.cpu() - b.cpu()).abs().max().item<double>();
}

// Parameters after three steps, one of them with live rows.
std::vector<at::Tensor> after_steps(at::ScalarType type, const at::Device& device, double* norm) {
  at::manual_seed(3);
  std::vector<at::Tensor> parameters = {at::randn({300, 70}, type), at::randn({5}, type),
                                        at::randn({6, 4}, type)};
  for (at::Tensor& p : parameters) p = p.to(device).set_requires_grad(true);
  nn::LiveRows live{0, 1, 4};
  train::ParameterGroup first{{{"a", parameters[0]}, {"b", parameters[1]}}, 1.0, 0.1, {}};
  train::ParameterGroup second{{{"c", parameters[2]}}, 0.5, 0.0, {{"c", [&] { return live; }}}};
  train::AdamW optimizer({first, second});
  for (int step = 0; step < 3; ++step) {
    for (at::Tensor& p : parameters) p.mutable_grad() = at::randn(p.sizes(), type).to(device);
    live.end = 4 + step % 2;
    *norm = train::grad_norm(parameters);
    optimizer.step(1e-2, step == 1 ? 0.25 : 1.0);
  }
  std::vector<at::Tensor> result;
  for (const at::Tensor& p : parameters) result.push_back(p.detach());
  return result;
}

// What results(device) gives on kernels and on LibTorch's operators beside the CPU's: each tensor
// within bound(i) of its largest number, and no call gone the other way.
void check_both_ways(const std::function<std::vector<at::Tensor>(const at::Device&)>& results,
                     const std::function<double(size_t)>& bound) {
  const auto wanted = results(at::kCPU);
  for (const bool kernels : {true, false}) {
    INFO((kernels ? "kernels" : "LibTorch"));
    const OnDevice device(kernels);
    ops::reset_device_paths();
    const auto got = results(test_device());
    REQUIRE(got.size() == wanted.size());
    for (size_t i = 0; i < got.size(); ++i) {
      INFO("result " << i);
      const double size = wanted[i].abs().max().item<double>();
      CHECK(largest_difference(got[i], wanted[i]) < bound(i) * size + 1e-7);
    }
    for (const ops::DevicePath& path : ops::device_paths()) {
      INFO(path.operation << ": " << path.reason);
      CHECK(path.reason.empty() == kernels);
    }
    CHECK(ops::device_paths().size() >= 5);
  }
}

}  // namespace

TEST_CASE("glue: AdamW and the gradients' norm", "[cuda][glue]") {
  for (const auto type : {at::kFloat, at::kDouble}) {
    double norm = 0;
    const auto wanted = after_steps(type, at::kCPU, &norm);
    for (const bool kernels : {true, false}) {
      INFO(at::toString(type) << (kernels ? ", kernels" : ", LibTorch"));
      const OnDevice device(kernels);
      ops::reset_device_paths();
      double got_norm = 0;
      const auto got = after_steps(type, test_device(), &got_norm);
      for (size_t i = 0; i < got.size(); ++i) CHECK(largest_difference(got[i], wanted[i]) < 2e-6);
      CHECK(std::abs(got_norm - norm) < 1e-9 * norm);
      const bool counted = kernels && type == at::kFloat;
      CHECK(testing::contains(ops::describe_device_paths(), "adamw: 3 by graft's kernel") ==
            counted);
      CHECK(testing::contains(ops::describe_device_paths(), "grad_norm: 3 by graft's kernel") ==
            counted);
    }
  }
}

TEST_CASE("glue: a decoder with an adapter, loss and gradients", "[cuda][glue]") {
  const std::pair<const char*, std::shared_ptr<const adapters::Recipe>> methods[] = {
      {"lora", adapters::make_recipe(adapters::LoraOptions{.rank = 4})},
      {"dora", adapters::make_recipe(adapters::DoraOptions{.rank = 4})}};
  for (const auto& [name, recipe] : methods) {
    INFO(name);
    const auto results = [&, recipe = recipe](const at::Device& device) {
      models::LoadedModel model = models::load(GRAFT_GOLDENS "/programs/tiny", at::kFloat, device);
      AttachOptions options;
      options.seed = 5;
      const AttachedAdapter handle = attach(*model.decoder, recipe, options);
      at::manual_seed(6);
      std::vector<at::Tensor> results;
      for (const at::Tensor& p : handle.parameters())
        p.data().add_(at::randn(p.sizes()).to(device) * 0.02);
      model.decoder->train();
      const at::Tensor ids = at::randint(0, 40, {2, 17}, at::kLong);
      const at::Tensor loss = model.decoder->loss(ids.slice(1, 0, 16), ids.slice(1, 1, 17));
      loss.backward();
      results.push_back(loss.detach());
      for (const at::Tensor& p : handle.parameters()) results.push_back(p.grad().clone());
      return results;
    };
    check_both_ways(results, [](size_t) { return 2e-5; });
  }
}

TEST_CASE("glue: a decoder with MixLoRA trains two steps", "[cuda][glue][mixture]") {
  moe::MixLoraAdapterOptions method;
  method.mixture.router.experts = 4;
  method.mixture.experts = {.rank = 3, .alpha = 6.0, .dropout = 0.1};
  // Losses with the balance penalty of two steps and of the pass after them, then the parameters.
  const auto results = [&](const at::Device& device) {
    models::LoadedModel model = models::load(GRAFT_GOLDENS "/programs/tiny", at::kFloat, device);
    AttachOptions options;
    options.seed = 5;
    const AttachedAdapter handle = attach(*model.decoder, method, options);
    at::manual_seed(6);
    train::ParameterGroup group;
    for (const auto& [name, p] : handle.named_parameters()) {
      p.data().add_(at::randn(p.sizes()).to(device) * 0.1);
      group.parameters.emplace_back(name, p);
    }
    train::AdamW optimizer({group});
    model.decoder->train();
    std::vector<at::Tensor> results;
    for (int step = 0; step < 3; ++step) {
      const at::Tensor ids = at::randint(0, 40, {2, 17}, at::kLong);
      handle.begin_step({.step = step});
      const at::Tensor task = model.decoder->loss(ids.slice(1, 0, 16), ids.slice(1, 1, 17));
      const at::Tensor loss = task + handle.penalty();
      results.push_back(loss.detach());
      if (step == 2) break;
      for (const at::Tensor& p : handle.parameters()) p.mutable_grad() = at::Tensor();
      loss.backward();
      optimizer.step(1e-2);
      handle.end_step({.step = step});
    }
    for (const at::Tensor& p : handle.parameters()) results.push_back(p.detach().clone());
    return results;
  };
  // AdamW's first steps divide a gradient by its own size, rounding errors included.
  check_both_ways(results, [](size_t i) { return i < 3 ? 2e-5 : 1e-3; });
}
