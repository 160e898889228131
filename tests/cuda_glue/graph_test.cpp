// Passes that a graph repeats. The emulated device makes the captured calls again at each replay,
// so that all but the capture itself is as on a GPU: memory that stays, masks, gradients, counters.
#include <ATen/ATen.h>
#include <graft/adapters/adalora.h>
#include <graft/adapters/dora.h>
#include <graft/adapters/dylora.h>
#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>
#include <graft/moe/mix_lora_recipe.h>
#include <graft/ops/linear_cross_entropy.h>
#include <graft/train/pass_graph.h>

#include <algorithm>
#include <cmath>
#include <fstream>

#include "examples/models/load.h"
#include "examples/trainer/graphed_passes.h"
#include "examples/trainer/joint_pass.h"
#include "tests/cuda_glue/device_under_test.h"
#include "tests/io/file_helpers.h"
#include "tests/support/testing.h"

namespace {

using namespace graft;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::OnDevice;
using graft::testing::TempFolder;
using graft::testing::test_device;

constexpr const char* kModel = GRAFT_GOLDENS "/programs/tiny";

struct Model {
  models::LoadedModel loaded = models::load(kModel, at::kFloat, test_device());
  AttachedAdapter adapter;
  explicit Model(const std::shared_ptr<const adapters::Recipe>& recipe)
      : adapter(attach(*loaded.decoder, recipe, options())) {
    at::manual_seed(6);
    for (const at::Tensor& p : adapter.parameters())
      p.data().add_(at::randn(p.sizes()).to(p.device()) * 0.02);
    loaded.decoder->train();
    loaded.decoder->loss_without_waiting = true;
  }
  static AttachOptions options() {
    AttachOptions options;
    options.seed = 5;
    return options;
  }
  at::Tensor pass(const at::Tensor& ids) {
    const at::Tensor loss =
        loaded.decoder->loss(ids.slice(1, 0, 16), ids.slice(1, 1, 17).contiguous(), 32.0);
    loss.backward();
    return loss.detach();
  }
};

// What a row of passes leaves: losses, gradients before they are dropped, the counters at the end.
struct Left {
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> counters;
};

// Nine passes; the gradients of two add up, a third is dropped; one pass in between is of another
// kind and never goes through the graph.
Left run_passes_of(const std::shared_ptr<const adapters::Recipe>& recipe, bool graphed,
                   bool recompute) {
  Model model(recipe);
  model.loaded.decoder->gradient_checkpointing = recompute;
  at::manual_seed(8);
  const at::Tensor ids = at::zeros({2, 17}, at::TensorOptions(test_device()).dtype(at::kLong));
  train::PassGraph graph(model.adapter, test_device(), [&] { return model.pass(ids); });
  Left left;
  for (int i = 0; i < 9; ++i) {
    const at::Tensor fresh = at::randint(0, 40, {2, 17}, at::kLong);
    if (i == 6) {
      left.tensors.push_back(model.pass(fresh.to(test_device())));
    } else {
      ids.copy_(fresh);
      left.tensors.push_back((graphed ? graph.run() : model.pass(ids)).clone());
    }
    if (i % 3 == 0) continue;
    for (at::Tensor& p : model.adapter.parameters()) {
      left.tensors.push_back(p.grad().clone());
      if (i % 3 == 2) p.mutable_grad() = at::Tensor();
    }
  }
  for (const auto& layer : model.adapter.layers())
    for (const int64_t counter : layer.adapter->counters()) left.counters.push_back(counter);
  return left;
}

}  // namespace

TEST_CASE("graph: repeated passes leave what passes without a graph leave", "[cuda][glue][graph]") {
  const OnDevice device;
  const std::pair<const char*, std::shared_ptr<const adapters::Recipe>> methods[] = {
      {"lora", adapters::make_recipe(adapters::LoraOptions{.rank = 4, .dropout = 0.2})},
      {"dora", adapters::make_recipe(adapters::DoraOptions{.rank = 4, .dropout = 0.2})},
      {"no dropout", adapters::make_recipe(adapters::LoraOptions{.rank = 4})}};
  for (const auto& [name, recipe] : methods) {
    for (const bool recompute : {false, true}) {
      INFO(name << (recompute ? ", recomputed" : ""));
      const Left wanted = run_passes_of(recipe, false, recompute),
                 got = run_passes_of(recipe, true, recompute);
      REQUIRE(got.tensors.size() == wanted.tensors.size());
      for (size_t i = 0; i < wanted.tensors.size(); ++i) {
        INFO("tensor " << i);
        CHECK(at::equal(got.tensors[i], wanted.tensors[i]));
      }
      CHECK(got.counters == wanted.counters);
      CHECK(wanted.counters.front() == (std::string(name) == "no dropout" ? 0 : 9));
    }
  }
}

TEST_CASE("graph: methods that decide something in each step are refused", "[cuda][glue][graph]") {
  const OnDevice device;
  moe::MixLoraAdapterOptions mixture;
  mixture.mixture.router.experts = 4;
  for (const auto& recipe :
       {adapters::make_recipe(adapters::DyloraOptions{}),
        adapters::make_recipe(adapters::AdaLoraOptions{}), adapters::make_recipe(mixture)}) {
    Model model(recipe);
    CHECK(contains(error_of([&] {
                     train::PassGraph(model.adapter, test_device(), [] { return at::Tensor(); });
                   }),
                   "a method's passes must all do the same; got"));
  }
  for (const char* method : {"dylora", "adalora", "mixlora", "sora", "mola", "lora"}) {
    INFO(method);
    trainer::FinetuneOptions options;
    options.common.model = kModel;
    options.method = method;
    options.cuda_graph = true;
    if (std::string(method) == "lora") options.bias = "all";
    CHECK(contains(error_of([&] { trainer::TrainingJob{options}; }), "cuda-graph repeats passes"));
  }
}

TEST_CASE("graph: linear_cross_entropy needs no wait", "[cuda][glue][graph]") {
  at::manual_seed(1);
  const at::Tensor hidden = at::randn({23, 16}), weight = at::randn({50, 16});
  at::Tensor targets = at::randint(0, 50, {23}, at::kLong);
  for (const int64_t i : {0, 7, 22}) targets[i] = -100;
  for (const bool kernels : {true, false}) {
    const OnDevice device(kernels);
    const auto loss_and_gradient = [&](bool wait, const at::Tensor& wanted) {
      const at::Tensor h = hidden.to(test_device()).detach().requires_grad_();
      ops::LinearCrossEntropyOptions options;
      options.normalizer = 20.0;
      options.without_waiting = !wait;
      options.chunk_rows = 9;
      const at::Tensor loss =
          ops::linear_cross_entropy(h, weight.to(test_device()), wanted.to(test_device()), options);
      loss.backward();
      return std::pair(loss.item<double>(), h.grad().cpu());
    };
    const auto [loss, gradient] = loss_and_gradient(true, targets);
    const auto [same_loss, same_gradient] = loss_and_gradient(false, targets);
    CHECK(std::abs(loss - same_loss) < 1e-6 * loss);
    CHECK((gradient - same_gradient).abs().max().item<double>() < 1e-7);
    CHECK(same_gradient[7].abs().max().item<double>() == 0.0);
    for (const int64_t bad : {-1, 50}) {
      at::Tensor wrong = targets.clone();
      wrong[3] = bad;
      CHECK(std::isnan(loss_and_gradient(false, wrong).first));
    }
    ops::LinearCrossEntropyOptions options;
    options.without_waiting = true;
    CHECK(contains(error_of([&] {
                     ops::linear_cross_entropy(hidden.to(test_device()), weight.to(test_device()),
                                               targets.to(test_device()), options);
                   }),
                   "without_waiting needs targets on"));
  }
}

TEST_CASE("graph: a job's steps are those of a job without", "[cuda][glue][graph]") {
  const OnDevice device;
  const TempFolder folder;
  const std::string examples = folder.path() / "examples.jsonl",
                    mixed = folder.path() / "mixed.jsonl";
  for (const std::string& path : {examples, mixed}) {
    std::ofstream file(path);
    // Each fills a row of its own: batches without segments, before those with them.
    for (int i = 0; path == mixed && i < 8; ++i)
      file << R"({"text": "one two three four five six seven eight nine ten eleven twelve"})"
           << "\n";
    for (int i = 0; i < 24; ++i) {
      file << R"({"prompt": "one ", "completion": "two)";
      for (int k = 0; k < i % 4; ++k) file << " six";
      file << "\"}\n";
    }
  }
  // Filled up, a row has another place in the mask, hence no dropout with examples.
  struct Case {
    std::string data;
    bool packing;
    double dropout;
  };
  for (const Case& data :
       {Case{GRAFT_GOLDENS "/programs/text.txt", true, 0.1}, Case{examples, true, 0.0},
        Case{examples, false, 0.0}, Case{mixed, true, 0.0}}) {
    INFO(data.data << (data.packing ? ", packed" : ", a row each"));
    std::vector<std::vector<double>> losses;
    std::vector<int64_t> lengths;
    std::vector<bool> pieces;
    for (const bool graphed : {false, true}) {
      trainer::FinetuneOptions options;
      options.common.model = kModel;
      options.common.quiet = true;
      options.common.device = test_device().is_cpu() ? "cpu" : "cuda";
      options.data = data.data;
      options.output = folder.path() / "out";
      options.eval_fraction = 0;
      options.steps = 6;
      options.seq_len = 32;
      options.batch_size = 2;
      options.grad_accum = 2;
      options.dropout = data.dropout;
      options.packing = data.packing;
      options.shuffle = data.data != mixed;
      models::LoadedModel model = models::load(kModel, at::kFloat, test_device());
      trainer::TrainingJob job(options);
      job.read_data(model.tokenizer);
      job.attach(model, 0);
      job.start();
      model.decoder->train();
      std::optional<trainer::GraphedPasses> passes;
      if (graphed) passes.emplace(*model.decoder, job, test_device());
      std::vector<double>& own = losses.emplace_back();
      while (!job.done()) {
        const auto& batches = job.begin_step();
        for (const auto& batch : batches) {
          lengths.push_back(batch.inputs.size(1));
          pieces.push_back(batch.segments.defined());
        }
        if (graphed)
          for (const auto& batch : batches) passes->run(batch);
        else
          trainer::run_passes(*model.decoder, {{&job, &batches}}, {});
        own.push_back(job.end_step().loss);
      }
    }
    // Examples of their own fill no row; others vary, too.
    if (data.data != mixed)
      CHECK((*std::min_element(lengths.begin(), lengths.end()) < 31) == (data.data == examples));
    if (data.data == mixed) {
      CHECK_FALSE(pieces.front());
      CHECK(std::count(pieces.begin(), pieces.end(), true) > 4);
    }
    for (size_t i = 0; i < losses[0].size(); ++i) {
      INFO("step " << i);
      CHECK(std::abs(losses[0][i] - losses[1][i]) < 2e-6 * losses[0][i]);
    }
  }
}
