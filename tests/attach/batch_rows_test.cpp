// Many adapters in one batch: each is what it is on a batch of its own, bit for bit.
#include <graft/adapters/dora.h>
#include <graft/adapters/lora.h>
#include <graft/adapters/sora.h>
#include <graft/attach/attach.h>
#include <graft/nn/gated_mlp.h>
#include <graft/ops/split_rows.h>
#include <graft/train/adamw.h>
#include <graft/train/checkpoint.h>
#include <graft/train/parameter_groups.h>

#include <cmath>
#include <limits>

#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace {

using graft::attach;
using graft::AttachedAdapter;
using graft::adapters::LoraOptions;
using graft::nn::BatchParts;
using graft::nn::Selector;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::testing::randomise;
using graft::testing::TorchDecoder;
using graft::testing::uneven_sum;

const LoraOptions kLora{.rank = 2, .alpha = 4, .dropout = 0.25};
constexpr int64_t kTime = 4;
const std::vector<int64_t> kSequences = {2, 4, 2, 4};

std::string name_of(size_t job) {
  return "job" + std::to_string(job);
}

// Four adapters that have nothing in common: methods, ranks, layers, dropout, seeds.
template <class Model>
AttachedAdapter attach_job(Model& model, size_t job, const std::string& name) {
  const std::vector<std::string> targets = {".*(q_proj|v_proj)", ".*(q_proj|v_proj|o_proj)",
                                            ".*(embed|o_proj|lm_head)", ".*o_proj"};
  const graft::AttachOptions options{
      .targets = Selector::regex(targets[job]), .name = name, .seed = 10 + job};
  auto adapter =
      job == 0   ? attach(model, LoraOptions{.rank = 2, .alpha = 4, .dropout = 0.3}, options)
      : job == 1 ? attach(model, graft::adapters::DoraOptions{.rank = 3, .dropout = 0.2}, options)
      : job == 2 ? attach(model, LoraOptions{.rank = 1, .alpha = 3, .rslora = true}, options)
                 : attach(model, graft::adapters::SoraOptions{.rank = 4, .dropout = 0.5}, options);
  randomise(adapter.parameters(), 20 + job);
  return adapter;
}

at::Tensor tokens_of(size_t job, int64_t step) {
  return at::arange(kSequences[job] * kTime, at::kLong)
      .mul(7 + step)
      .add(static_cast<int64_t>(job))
      .remainder(11)
      .view({kSequences[job], kTime});
}

// What a run leaves: every step's output and gradients, and the trained values.
using Trace = std::vector<at::Tensor>;

void take(Trace& trace, AttachedAdapter& adapter, graft::train::AdamW& optimizer,
          const at::Tensor& output) {
  trace.push_back(output.detach().clone());
  for (const auto& parameter : adapter.parameters()) trace.push_back(parameter.grad().clone());
  optimizer.step(1e-2);
  optimizer.zero_grad();
  for (const auto& parameter : adapter.parameters()) trace.push_back(parameter.detach().clone());
}

constexpr int64_t kSteps = 5;

template <class Model>
Trace solo(size_t job, at::ScalarType type) {
  Model model;
  model.to(type);
  auto adapter = attach_job(model, job, "default");
  graft::train::AdamW optimizer(graft::train::parameter_groups(adapter, 0.1));
  Trace trace;
  const auto active = adapter.activate();
  for (int64_t step = 0; step < kSteps; ++step) {
    const at::Tensor output = model.forward(tokens_of(job, step));
    uneven_sum(output).backward();
    take(trace, adapter, optimizer, output);
  }
  return trace;
}

// All jobs in one model and one batch; `spoilt`: this job's loss is not finite from step 1 on, and
// it is left out from step 3 on.
template <class Model>
std::vector<Trace> joint(at::ScalarType type, std::optional<size_t> spoilt = std::nullopt) {
  Model model;
  model.to(type);
  std::vector<AttachedAdapter> adapters;
  std::vector<std::string> names;
  for (size_t job = 0; job < kSequences.size(); ++job) {
    adapters.push_back(attach_job(model, job, name_of(job)));
    names.push_back(name_of(job));
  }
  adapters.front().set_active(names);
  std::vector<graft::train::AdamW> optimizers;
  for (const auto& adapter : adapters)
    optimizers.emplace_back(graft::train::parameter_groups(adapter, 0.1));
  std::vector<Trace> traces(adapters.size());
  for (int64_t step = 0; step < kSteps; ++step) {
    std::vector<size_t> jobs;
    BatchParts parts;
    std::vector<at::Tensor> tokens;
    std::vector<int64_t> counts;
    for (size_t job = 0; job < adapters.size(); ++job) {
      if (spoilt == job && step >= 3) continue;
      jobs.push_back(job);
      counts.push_back(kSequences[job]);
      parts.push_back({name_of(job), kSequences[job]});
      tokens.push_back(tokens_of(job, step));
    }
    const auto active = adapters.front().activate();
    const auto rows = adapters.front().batch_rows(parts);
    const auto outputs = model.forward(at::cat(tokens)).split_with_sizes(counts);
    at::Tensor sum = at::zeros({}, type);
    for (size_t i = 0; i < jobs.size(); ++i) {
      const bool bad = spoilt == jobs[i] && step >= 1;
      sum = sum + uneven_sum(outputs[i]) * (bad ? std::numeric_limits<double>::quiet_NaN() : 1.0);
    }
    sum.backward();
    for (size_t i = 0; i < jobs.size(); ++i)
      take(traces[jobs[i]], adapters[jobs[i]], optimizers[jobs[i]], outputs[i]);
  }
  return traces;
}

void check_same(const Trace& found, const Trace& expected) {
  REQUIRE(found.size() == expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    INFO("tensor " << i);
    REQUIRE(at::equal(found[i], expected[i]));
  }
}

}  // namespace

TEST_CASE("four adapters in one batch equal four runs of their own, bit for bit, with dropout",
          "[attach][batch]") {
  for (const auto type : {at::kDouble, at::kFloat}) {
    const auto traces = joint<GraftDecoder>(type);
    for (size_t job = 0; job < traces.size(); ++job) {
      INFO(at::toString(type) << ", " << name_of(job));
      check_same(traces[job], solo<GraftDecoder>(job, type));
    }
  }
}

TEST_CASE("a model of torch's layers serves many adapters in one batch, too", "[attach][batch]") {
  const auto traces = joint<TorchDecoder>(at::kDouble);
  for (size_t job = 0; job < traces.size(); ++job) {
    const Trace expected = solo<TorchDecoder>(job, at::kDouble);
    REQUIRE(traces[job].size() == expected.size());
    for (size_t i = 0; i < expected.size(); ++i)
      CHECK(graft::testing::distance(traces[job][i], expected[i]) < 1e-12);
  }
}

TEST_CASE("a job that is not finite leaves the others as they are alone", "[attach][batch]") {
  for (const size_t spoilt : {size_t{0}, size_t{1}, size_t{3}}) {
    const auto traces = joint<GraftDecoder>(at::kDouble, spoilt);
    CHECK_FALSE(traces[spoilt].back().isfinite().all().item<bool>());
    for (size_t job = 0; job < traces.size(); ++job)
      if (job != spoilt) check_same(traces[job], solo<GraftDecoder>(job, at::kDouble));
  }
}

TEST_CASE("a dropped row's gradient is the mask's, against central differences",
          "[attach][batch]") {
  GraftDecoder model;
  model.to(at::kDouble);
  auto a = attach_job(model, 0, "a"), b = attach_job(model, 3, "b");
  a.set_active({"a", "b"});
  const at::Tensor tokens = at::cat({tokens_of(0, 0), tokens_of(3, 0)});
  const auto f = [&] {
    for (const auto* adapter : {&a, &b})  // the same masks every time
      for (const auto& layer : adapter->layers()) layer.adapter->set_counters({0});
    const auto rows = a.batch_rows({{"a", 2}, {"b", 4}});
    return model.forward(tokens);
  };
  for (auto& adapter : {a, b})
    graft::testing::check_leaf_gradients(f, adapter.named_parameters(), 1e-7);
}

TEST_CASE("sequences without an adapter are the base's, and an adapter without sequences rests",
          "[attach][batch]") {
  GraftDecoder model;
  const at::Tensor first = tokens_of(0, 0), second = tokens_of(1, 0);
  const at::Tensor plain = model.forward(second);
  auto a = attach_job(model, 0, "a"), b = attach_job(model, 1, "b");
  a.set_active();
  model.eval();
  const at::Tensor alone = model.forward(first);
  a.set_active({"a", "b"});
  const auto rows = a.batch_rows({{"a", 2}, {"", 4}});
  const auto outputs = model.forward(at::cat({first, second})).split_with_sizes({2, 4});
  CHECK(at::equal(outputs[0], alone));
  CHECK(at::equal(outputs[1], plain));
  uneven_sum(outputs[0]).backward();
  for (const auto& parameter : b.parameters()) CHECK_FALSE(parameter.grad().defined());
}

TEST_CASE("a part that nobody asks for has the gradient 0", "[attach][batch]") {
  at::Tensor x = at::ones({3, 2}).requires_grad_();
  const auto rows = graft::ops::split_rows(x, {1, 2});
  uneven_sum(rows[1]).backward();
  CHECK(x.grad()[0].count_nonzero().item<int64_t>() == 0);
  CHECK(x.grad().narrow(0, 1, 2).count_nonzero().item<int64_t>() == 4);
}

TEST_CASE("convolutions take their parts of a batch of images", "[attach][batch]") {
  struct Net : torch::nn::Module {
    Net() {
      at::manual_seed(3);
      first =
          register_module("first", graft::nn::Conv2d(torch::nn::Conv2dOptions(3, 4, 3).padding(1)));
      second = register_module("second", graft::nn::Conv2d(torch::nn::Conv2dOptions(4, 2, 3)));
      to(at::kDouble);
    }
    at::Tensor forward(const at::Tensor& x) { return second->forward(first->forward(x)); }
    graft::nn::Conv2d first{nullptr}, second{nullptr};
  };
  const auto put_on = [](Net& net, const std::string& name, uint64_t seed) {
    auto adapter = attach(net, kLora, {.targets = {"first"}, .name = name, .seed = seed});
    randomise(adapter.parameters(), seed);
    return adapter;
  };
  const at::Tensor x = at::sin(at::arange(3 * 3 * 8 * 8, at::kDouble)).view({3, 3, 8, 8});
  Net net;
  auto a = put_on(net, "a", 1), b = put_on(net, "b", 2);
  a.set_active({"a", "b"});
  const auto rows = a.batch_rows({{"a", 1}, {"b", 2}});
  const auto outputs = net.forward(x).split_with_sizes({1, 2});
  (uneven_sum(outputs[0]) + uneven_sum(outputs[1])).backward();
  const auto images = x.split_with_sizes({1, 2});
  for (size_t i = 0; i < 2; ++i) {
    const graft::nn::BatchRows none(std::shared_ptr<const BatchParts>{});
    Net own;
    auto alone = put_on(own, "alone", i + 1);
    const at::Tensor output = own.forward(images[i]);
    CHECK(at::equal(outputs[i], output));
    uneven_sum(output).backward();
    auto& adapter = i == 0 ? a : b;
    for (size_t p = 0; p < alone.parameters().size(); ++p)
      CHECK(at::equal(adapter.parameters()[p].grad(), alone.parameters()[p].grad()));
  }
}

TEST_CASE("a recomputed block has the batch's parts again, after their scope", "[attach][batch]") {
  const auto gradients = [](bool recompute) {
    GraftDecoder model;
    model.to(at::kDouble);
    auto a = attach_job(model, 0, "a"), b = attach_job(model, 1, "b");
    a.set_active({"a", "b"});
    at::Tensor loss;
    {
      const auto rows = a.batch_rows({{"a", 2}, {"b", 4}});
      at::Tensor x = model.embed->forward(at::cat({tokens_of(0, 0), tokens_of(1, 0)}));
      for (const auto& block : model.blocks) {
        std::vector<at::Tensor> trained;
        for (const auto& parameter : block->parameters())
          if (parameter.requires_grad()) trained.push_back(parameter);
        const auto run = [block](const at::Tensor& in) { return block->forward(in); };
        x = recompute ? graft::train::checkpoint(run, x, trained) : run(x);
      }
      loss = uneven_sum(x);
    }
    loss.backward();
    Trace found;
    for (const auto& adapter : {a, b})
      for (const auto& parameter : adapter.parameters()) found.push_back(parameter.grad());
    return found;
  };
  check_same(gradients(true), gradients(false));
}

TEST_CASE("parts that do not fit are refused", "[attach][batch]") {
  GraftDecoder model;
  auto a = attach_job(model, 0, "a"), b = attach_job(model, 1, "b");
  const auto refusal = [&](const BatchParts& parts) {
    return error_of([&] { const auto rows = a.batch_rows(parts); });
  };
  CHECK(contains(refusal({{"b", 1}, {"a", 1}}), "must be active; got 'a' beside the active 'b'"));
  a.set_active({"a", "b"});
  CHECK(contains(refusal({{"a", 1}, {"c", 1}}), "got 'c'"));
  CHECK(contains(refusal({}), "must have a part; got none"));
  CHECK(contains(refusal({{"a", 0}}), "must have a sequence; got 0 for 'a'"));
  CHECK(contains(refusal({{"a", 1}, {"b", 1}, {"a", 2}}), "got two of 'a'"));
  {
    const auto rows = a.batch_rows({{"a", 2}, {"b", 1}});
    CHECK(contains(error_of([&] { model.forward(tokens_of(1, 0)); }),
                   "the parts' 3 sequences (2 of 'a' + 1 of 'b'); got [4, 4"));
    {
      const auto inner = a.batch_rows({{"b", 4}});
      model.forward(tokens_of(1, 0));
    }
    CHECK(graft::nn::BatchRows::current()->size() == 2);
  }
  CHECK(graft::nn::BatchRows::current() == nullptr);
  a.set_active();
  a.merge();
  CHECK(contains(refusal({{"a", 1}}), "unmerge first"));
}

TEST_CASE("what the model has once cannot be trained by one part of a batch", "[attach][batch]") {
  GraftDecoder model;
  auto a = attach(model, LoraOptions{.rank = 2},
                  {.targets = {"q_proj"}, .bias = graft::TrainedBias::all, .name = "a"});
  auto b = attach_job(model, 1, "b");
  a.set_active({"a", "b"});
  CHECK(contains(error_of([&] {
                   const auto rows = a.batch_rows({{"b", 1}, {"a", 1}});
                 }),
                 "cannot share a batch: they are one for all its sequences; got 'a'"));
  const auto rows = a.batch_rows({{"b", 2}});

  graft::nn::GatedMlp block(8, 12);
  CHECK_FALSE(error_of([&] { block->forward(at::ones({3, 8})); }).empty());
}
