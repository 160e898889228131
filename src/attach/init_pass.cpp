#include "init_pass.h"

#include <ATen/ATen.h>
#include <graft/attach/activation.h>
#include <graft/core/error.h>
#include <torch/nn/module.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <cmath>

#include "init_recorders.h"
#include "state.h"

namespace graft {
namespace {

using adapters::StartPlan;
using init::LayerFacts;

constexpr const char* kRecorder = "initialiser";

// The model as the batches find it: eval mode, no parameter asking for a gradient, no other adapter
// running, a recorder on every chosen layer. The destructor puts everything back.
class ListeningModel {
 public:
  ListeningModel(torch::nn::Module& model, const std::vector<nn::SelectedLayer>& layers,
                 ModelAdapters& shared)
      : model_(model), layers_(layers), shared_(shared), training_(model.is_training()) {
    for (const auto& module : model.modules(/*include_self=*/false))
      modes_.emplace_back(module, module->is_training());
    for (auto& parameter : model.parameters())
      if (parameter.requires_grad()) wanted_.push_back(parameter);
    for (auto& parameter : wanted_) parameter.set_requires_grad(false);
    model.eval();
    for (const auto& state : shared_.alive())
      for (const auto& slot : state->slots) slot->enabled = false;
  }

  void add(size_t layer, std::shared_ptr<nn::Adapter> recorder) {
    auto slot = nn::AdapterSlot::ensure(*layers_[layer].module);
    slots_.emplace_back(slot, slot->runs);
    slot->add(kRecorder, std::move(recorder));
    slot->set_active({kRecorder});
    slot->enabled = true;
  }

  // Layers of torch::nn report inside this scope only.
  ActivationScope activate() const {
    std::vector<std::pair<std::string, std::shared_ptr<torch::nn::Module>>> plain;
    for (const auto& layer : layers_)
      if (!is_graft_layer(*layer.module)) plain.emplace_back(layer.name, layer.module);
    return ActivationScope(plain);
  }

  ~ListeningModel() {
    for (auto& [slot, runs] : slots_) {
      slot->erase(kRecorder);
      slot->runs = runs;
    }
    for (const auto& layer : layers_)
      if (auto slot = nn::AdapterSlot::find(*layer.module); slot && slot->names().empty())
        nn::AdapterSlot::remove(*layer.module);
    for (auto& parameter : wanted_) parameter.set_requires_grad(true);
    model_.train(training_);  // reaches the children too, so they come afterwards, outer ones first
    for (const auto& [module, training] : modes_) module->train(training);
    shared_.refresh();
  }

 private:
  torch::nn::Module& model_;
  const std::vector<nn::SelectedLayer>& layers_;
  ModelAdapters& shared_;
  bool training_;
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> modes_;
  std::vector<at::Tensor> wanted_;
  std::vector<std::pair<std::shared_ptr<nn::AdapterSlot>, int64_t>> slots_;  // runs before
};

nn::FrozenLinear linear(const nn::SelectedLayer& layer, const init::Kind& kind) {
  const nn::FrozenLayer view = nn::frozen_layer(*layer.module);
  const auto* found = std::get_if<nn::FrozenLinear>(&view);
  GRAFT_CHECK(found != nullptr, "init", kind.name, " fits Linear layers; got ", nn::kind_name(view),
              " (layer '", layer.name, "')");
  return *found;
}

at::Tensor run_batch(const InitData& data, int64_t batch) {
  const at::Tensor loss = data.loss(batch);
  GRAFT_CHECK(loss.defined() && loss.numel() == 1 && std::isfinite(loss.item<double>()), "init",
              "the loss of a batch must be one finite number; got ",
              !loss.defined()     ? "none"
              : loss.numel() == 1 ? std::to_string(loss.item<double>())
                                  : std::to_string(loss.numel()) + " numbers",
              " (batch ", batch, ")");
  return loss;
}

void tell(const InitData& data, int64_t done) {
  if (data.progress) data.progress(done, data.batches);
}

// Layers that never ran have nothing to start from.
void check_ran(const std::vector<std::string>& silent) {
  GRAFT_CHECK(silent.empty(), "init", "every adapted layer must run in the batches; got ",
              silent.size(), " that did not, among them '", silent.empty() ? "" : silent.front(),
              "'");
}

InitFindings gather_gradients(ListeningModel& model, const std::vector<nn::SelectedLayer>& layers,
                              const StartPlan& plan, const InitData& data) {
  std::vector<std::shared_ptr<GradientRecorder>> recorders;
  for (size_t i = 0; i < layers.size(); ++i) {
    linear(layers[i], plan.kind);  // refuses others
    recorders.push_back(std::make_shared<GradientRecorder>());
    model.add(i, recorders.back());
  }
  const auto active = model.activate();
  const at::AutoGradMode with_gradients(true);
  for (int64_t batch = 0; batch < data.batches; ++batch) {
    run_batch(data, batch).backward();
    return_free_memory();
    tell(data, batch + 1);
  }
  std::vector<std::string> silent;
  for (size_t i = 0; i < layers.size(); ++i)
    if (recorders[i]->backward_runs == 0) silent.push_back(layers[i].name);
  check_ran(silent);
  InitFindings findings;
  for (size_t i = 0; i < layers.size(); ++i) {
    auto facts = std::make_shared<LayerFacts>();
    facts->gradient = recorders[i]->sum.div_(static_cast<double>(data.batches));
    findings.facts.emplace(layers[i].name, std::move(facts));
  }
  return findings;
}

void listen(ListeningModel& model, const std::vector<nn::SelectedLayer>& layers,
            const StartPlan& plan, InputGroups& groups) {
  for (size_t i = 0; i < layers.size(); ++i) {
    linear(layers[i], plan.kind);  // refuses others
    model.add(i, std::make_shared<InputRecorder>(groups, groups.add_layer()));
  }
}

void run_inputs(const ListeningModel& model, const std::vector<nn::SelectedLayer>& layers,
                const InitData& data, InputGroups& groups, int64_t batch) {
  const auto active = model.activate();
  groups.mask = data.mask ? data.mask(batch) : at::Tensor();
  run_batch(data, batch);
  groups.end_batch();
  std::vector<std::string> silent;
  for (size_t i = 0; i < layers.size(); ++i)
    if (groups.group_of(static_cast<int64_t>(i)) < 0) silent.push_back(layers[i].name);
  check_ran(silent);
  tell(data, batch + 1);
}

InitFindings gather_covariances(ListeningModel& model, const std::vector<nn::SelectedLayer>& layers,
                                const StartPlan& plan, const InitData& data) {
  const at::NoGradGuard no_grad;
  InputGroups groups([](int64_t) { return std::make_unique<CovarianceSink>(); });
  listen(model, layers, plan, groups);
  for (int64_t batch = 0; batch < data.batches; ++batch)
    run_inputs(model, layers, data, groups, batch);
  InitFindings findings;
  for (int64_t group = 0; group < groups.groups(); ++group) {
    auto& sink = static_cast<CovarianceSink&>(groups.sink(group));
    GRAFT_CHECK(sink.rows > 0, "init", "the masks must leave a token that counts; got none");
    const at::Tensor mean = sink.sum.div_(static_cast<double>(sink.rows));
    for (const int64_t layer : groups.members(group)) {
      auto facts = std::make_shared<LayerFacts>();
      facts->covariance = mean;
      findings.facts.emplace(layers[layer].name, std::move(facts));
    }
  }
  return findings;
}

// EVA: directions of every distinct input, and how the ranks are shared out after each batch.
class DirectionSearch {
 public:
  DirectionSearch(const std::vector<nn::SelectedLayer>& layers, const StartPlan& plan,
                  const AttachOptions& options)
      : layers_(layers),
        plan_(plan),
        options_(options),
        groups_([this](int64_t group) { return make_sink(group); }) {
    for (const auto& layer : layers) budget_ += asked_rank(layer);
  }

  InputGroups& groups() { return groups_; }

  // After a batch: new ranks, and whether every group has settled on its directions.
  bool share_out() {
    std::vector<std::vector<double>> ratios;
    for (size_t i = 0; i < layers_.size(); ++i) {
      const auto& svd = sink_of(static_cast<int64_t>(i)).svd;
      if (svd.rows() == 0) return false;  // every batch so far was too short
      const at::Tensor ratio = svd.explained_ratio().cpu().contiguous();
      ratios.emplace_back(ratio.data_ptr<double>(), ratio.data_ptr<double>() + ratio.numel());
    }
    ranks_ = init::allocate_ranks(ratios, budget_);
    bool all = true;
    for (int64_t group = 0; group < groups_.groups(); ++group) {
      int64_t most = 0;
      for (const int64_t layer : groups_.members(group)) most = std::max(most, ranks_[layer]);
      auto& sink = static_cast<DirectionSink&>(groups_.sink(group));
      sink.settled = sink.svd.settled(most);
      all = all && sink.settled;
    }
    return all;
  }

  InitFindings findings() const {
    GRAFT_CHECK(!ranks_.empty(), "init",
                "eva needs batches of at least round(rho r) tokens; got none such");
    InitFindings found;
    for (size_t i = 0; i < layers_.size(); ++i) {
      const auto& svd = sink_of(static_cast<int64_t>(i)).svd;
      auto facts = std::make_shared<LayerFacts>();
      facts->directions = svd.directions().narrow(0, 0, ranks_[i]);
      facts->singular_values = svd.singular_values();
      facts->explained = svd.explained_ratio().narrow(0, 0, ranks_[i]).sum().item<double>();
      found.facts.emplace(layers_[i].name, std::move(facts));
      found.ranks.emplace(layers_[i].name, ranks_[i]);
    }
    return found;
  }

 private:
  int64_t asked_rank(const nn::SelectedLayer& layer) const {
    return nn::find_pattern(options_.rank_pattern, layer.name).value_or(plan_.rank);
  }

  // As many directions as the group's largest rank asks for.
  std::unique_ptr<DirectionSink> make_sink(int64_t group) const {
    const init::EvaOptions& eva = plan_.options.eva;
    int64_t components = 0;
    for (const int64_t layer : groups_.members(group))
      components = std::max<int64_t>(
          components, std::llround(eva.rho * static_cast<double>(asked_rank(layers_[layer]))));
    const auto view = linear(layers_[groups_.owner(group)], plan_.kind);
    const int64_t limit = std::min(view.weight.size(0), view.weight.size(1));
    return std::make_unique<DirectionSink>(std::min(components, limit), eva.tau);
  }

  DirectionSink& sink_of(int64_t layer) const {
    return static_cast<DirectionSink&>(groups_.sink(groups_.group_of(layer)));
  }

  const std::vector<nn::SelectedLayer>& layers_;
  const StartPlan& plan_;
  const AttachOptions& options_;
  InputGroups groups_;
  int64_t budget_ = 0;
  std::vector<int64_t> ranks_;  // by layer
};

InitFindings gather_directions(ListeningModel& model, const std::vector<nn::SelectedLayer>& layers,
                               const StartPlan& plan, const AttachOptions& options) {
  const at::NoGradGuard no_grad;
  DirectionSearch search(layers, plan, options);
  listen(model, layers, plan, search.groups());
  for (int64_t batch = 0; batch < options.init_data.batches; ++batch) {
    run_inputs(model, layers, options.init_data, search.groups(), batch);
    if (search.share_out()) break;
  }
  return search.findings();
}

}  // namespace

void return_free_memory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

InitFindings run_init_pass(torch::nn::Module& model, const std::vector<nn::SelectedLayer>& layers,
                           const StartPlan& plan, const AttachOptions& options,
                           ModelAdapters& shared) {
  const InitData& data = options.init_data;
  GRAFT_CHECK(data.loss != nullptr, "init", plan.kind.name,
              " reads batches of the training data; give them in AttachOptions::init_data");
  GRAFT_CHECK(data.batches >= 1, "init", "there must be at least one batch; got ", data.batches);
  GRAFT_CHECK(plan.kind.name != "eva" || plan.rank > 0, "init",
              "eva shares out ranks, so the method must have one");
  ListeningModel listening(model, layers, shared);
  if (plan.kind.needs == init::Needs::gradient)
    return gather_gradients(listening, layers, plan, data);
  if (plan.kind.name == "eva") return gather_directions(listening, layers, plan, options);
  return gather_covariances(listening, layers, plan, data);
}

}  // namespace graft
