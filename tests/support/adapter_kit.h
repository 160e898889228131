// What every adapter method must do, on every kind of layer that it fits. A method joins with
//
//   TEST_CASE("LoRA keeps the promises of adapters", "[adapters][lora]") {
//     graft::testing::run_adapter_kit({.method = "lora", .recipe = ..., .count = ...});
//   }
//
// The promises are numbered I1 to I13 in the order of the functions below.
#pragma once

#include <graft/attach/attach.h>
#include <graft/nn/adapter_slot.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace graft::testing {

/// A method as the kit sees it.
struct MethodCase {
  std::string method;
  /// The method with this rank; methods without a rank ignore it. Deterministic: no dropout.
  std::function<std::shared_ptr<const adapters::Recipe>(int64_t rank)> recipe;
  /// How many numbers one layer trains, in closed form.
  std::function<int64_t(const nn::FrozenLayer&, int64_t rank)> count;
  /// Parameters whose gradient is exactly zero in the first step, by kind of layer ("Linear").
  std::function<std::vector<std::string>(const std::string& kind)> zero_at_first;
  /// Kinds that the method does not fit, or cannot merge: "Embedding", "Conv".
  std::vector<std::string> unfit = {}, unmergeable = {};
  /// Whether the adapted layer starts as the base, bit for bit (I1), or only to rounding (I2).
  bool starts_as_base = true, starts_to_rounding = false;
  /// Off where the method's gradients are not those of its output on purpose (DoRA holds its norm
  /// constant): the method's own tests hold them to their formula.
  bool exact_gradients = true;
  /// Off where a saved folder reads back as another method (LoRA-FA saves plain LoRA).
  bool reads_back = true;
  /// Layers by name that the method does not fit: "groups".
  std::vector<std::string> unfit_layers = {};
  /// Of the gradient descent that must lower the loss; less for factors that start large.
  double training_lr = 0.02;
};

/// One layer, as graft's and as torch's module, and inputs for it.
struct LayerCase {
  std::string name, kind;
  std::function<std::shared_ptr<torch::nn::Module>()> graft_layer, torch_layer;
  std::function<at::Tensor(torch::nn::Module&, const at::Tensor&)> forward;
  std::vector<at::Tensor> inputs;  // float64, or indices
  std::vector<int64_t> ranks;
  bool mergeable = true;
};

/// A model of one layer, called "layer".
struct OneLayer : torch::nn::Module {
  explicit OneLayer(std::shared_ptr<torch::nn::Module> m)
      : layer(register_module("layer", std::move(m))) {}
  std::shared_ptr<torch::nn::Module> layer;
};

template <class Graft, class Torch, class Options>
LayerCase layer_case(std::string name, std::string kind, const Options& options,
                     std::vector<at::Tensor> inputs, std::vector<int64_t> ranks,
                     bool mergeable = true) {
  LayerCase layer;
  layer.name = std::move(name);
  layer.kind = std::move(kind);
  layer.graft_layer = [options] { return std::make_shared<Graft>(options); };
  layer.torch_layer = [options] { return std::make_shared<Torch>(options); };
  layer.forward = [](torch::nn::Module& module, const at::Tensor& x) {
    if (auto* graft_layer = module.as<Graft>()) return graft_layer->forward(x);
    return module.as<Torch>()->forward(x);
  };
  layer.inputs = std::move(inputs);
  layer.ranks = std::move(ranks);
  layer.mergeable = mergeable;
  return layer;
}

/// The layers: n > k and n < k, with and without bias, no tokens, one and three dimensions, strided
/// inputs; convolutions with stride, dilation, groups and each way of padding.
inline std::vector<LayerCase> all_layer_cases() {
  using torch::nn::Conv1dOptions, torch::nn::Conv2dOptions, torch::nn::Conv3dOptions;
  using torch::nn::EmbeddingOptions, torch::nn::LinearOptions;
  at::manual_seed(11);
  const auto random = [](std::vector<int64_t> shape) { return at::randn(shape, at::kDouble); };
  const auto linear = layer_case<nn::LinearImpl, torch::nn::LinearImpl, LinearOptions>;
  const auto conv1 = layer_case<nn::Conv1dImpl, torch::nn::Conv1dImpl, Conv1dOptions>;
  const auto conv2 = layer_case<nn::Conv2dImpl, torch::nn::Conv2dImpl, Conv2dOptions>;
  const auto conv3 = layer_case<nn::Conv3dImpl, torch::nn::Conv3dImpl, Conv3dOptions>;
  const std::vector<at::Tensor> rows = {random({3, 5}), random({2, 3, 5}), random({5}),
                                        random({0, 5}), random({5, 4}).t()};
  std::vector<LayerCase> cases = {
      linear("5 to 7", "Linear", LinearOptions(5, 7), rows, {1, 2, 5}, true),
      linear("5 to 3, no bias", "Linear", LinearOptions(5, 3).bias(false), rows, {1, 3}, true),
      linear("square", "Linear", LinearOptions(4, 4), {random({3, 4}), random({2, 2, 4})}, {2},
             true),
      layer_case<nn::EmbeddingImpl, torch::nn::EmbeddingImpl, EmbeddingOptions>(
          "9 rows of 4", "Embedding", EmbeddingOptions(9, 4),
          {at::tensor({1, 8, 1, 0}), at::tensor({3, 4, 4, 2}).view({2, 2}),
           at::zeros({0}, at::kLong)},
          {1, 4}),
      conv1("strided, dilated", "Conv1d", Conv1dOptions(3, 4, 3).stride(2).padding(1).dilation(2),
            {random({2, 3, 9}), random({3, 9})}, {1, 4}, true),
      conv1("'same', even kernel", "Conv1d", Conv1dOptions(3, 4, 4).padding(torch::kSame),
            {random({2, 3, 7})}, {2}, true),
      conv1("groups", "Conv1d", Conv1dOptions(4, 6, 3).groups(2), {random({2, 4, 6})}, {2, 4},
            false),
      conv2("no bias", "Conv2d", Conv2dOptions(2, 3, {3, 2}).stride({1, 2}).bias(false),
            {random({2, 2, 5, 6})}, {1, 3}, true),
      conv2("'valid'", "Conv2d", Conv2dOptions(2, 3, 2).padding(torch::kValid),
            {random({1, 2, 4, 4})}, {2}, true),
      conv3("padded", "Conv3d", Conv3dOptions(2, 2, 2).padding({1, 0, 1}),
            {random({1, 2, 3, 3, 2})}, {2}, true),
  };
  for (const auto& [mode, name] :
       std::vector<std::pair<torch::nn::detail::conv_padding_mode_t, std::string>>{
           {torch::kReflect, "reflect"},
           {torch::kCircular, "circular"},
           {torch::kReplicate, "replicate"}})
    cases.push_back(conv2(name, "Conv2d", Conv2dOptions(2, 3, 3).padding({1, 2}).padding_mode(mode),
                          {random({1, 2, 4, 5})}, {2}, true));
  return cases;
}

/// An attached method on one layer, and how to run it.
struct Subject {
  Subject(const MethodCase& method, const LayerCase& layer, int64_t rank, at::ScalarType type,
          bool of_torch = false)
      : layer(layer), model(of_torch ? layer.torch_layer() : layer.graft_layer()) {
    at::manual_seed(3);
    const at::NoGradGuard no_grad;
    for (auto& parameter : model.layer->parameters()) parameter.normal_(0.0, 0.5);
    model.to(type);
    adapter.emplace(attach(model, method.recipe(rank), {.targets = {"layer"}, .seed = 5}));
    for (const auto& x : layer.inputs) inputs.push_back(x.is_floating_point() ? x.to(type) : x);
  }
  at::Tensor run(const at::Tensor& x) { return layer.forward(*model.layer, x); }
  at::Tensor run() { return run(inputs.front()); }
  nn::FrozenLayer frozen() const { return nn::frozen_layer(*model.layer); }

  LayerCase layer;
  OneLayer model;
  std::optional<AttachedAdapter> adapter;
  std::vector<at::Tensor> inputs;
};

inline double tolerance_of(at::ScalarType type) {
  return type == at::kDouble ? 1e-12 : 1e-5;
}

/// Calls check(adapted, base) for the outputs of each input with the adapter on and off.
template <class Check>
void with_and_without(Subject& s, const Check& check) {
  for (const auto& x : s.inputs) {
    const at::Tensor adapted = s.run(x);
    s.adapter->disable();
    check(adapted, s.run(x));
    s.adapter->enable();
  }
}

/// I1: at the start the layer computes what it did without the adapter.
inline void check_starts_as_base(Subject& s) {
  with_and_without(s, [](const at::Tensor& adapted, const at::Tensor& base) {
    CHECK(at::equal(adapted, base));
  });
}

/// I2: the same to rounding.
inline void check_starts_to_rounding(Subject& s, at::ScalarType type) {
  const double rounding = type == at::kDouble ? 1e-13 : 1e-6;
  with_and_without(s, [&](const at::Tensor& adapted, const at::Tensor& base) {
    CHECK(distance(adapted, base) < rounding);
  });
}

/// I3: the merged layer computes the same, and unmerging puts the weight's bits back.
inline void check_merge(Subject& s, at::ScalarType type) {
  randomise(s.adapter->parameters());
  const at::Tensor weight = nn::weight_of(s.frozen()).clone();
  std::vector<at::Tensor> before;
  for (const auto& x : s.inputs) before.push_back(s.run(x));
  s.adapter->merge();
  CHECK_FALSE(at::equal(nn::weight_of(s.frozen()), weight));
  for (size_t i = 0; i < before.size(); ++i)
    CHECK(distance(s.run(s.inputs[i]), before[i]) < tolerance_of(type));
  s.adapter->unmerge();
  CHECK(at::equal(nn::weight_of(s.frozen()), weight));
  for (size_t i = 0; i < before.size(); ++i) CHECK(at::equal(s.run(s.inputs[i]), before[i]));
}

/// I5: what is trained, and how many numbers.
inline void check_trained(const MethodCase& method, Subject& s, int64_t rank) {
  CHECK(s.adapter->parameter_count() == method.count(s.frozen(), rank));
  for (const auto& [name, tensor] : s.adapter->named_parameters()) {
    CHECK(name.starts_with("layer.adapters.default."));
    CHECK(tensor.requires_grad());
  }
  CHECK_FALSE(nn::weight_of(s.frozen()).requires_grad());
}

/// I6: which gradients of the first step are zero, and that no other one is.
inline void check_first_gradients(const MethodCase& method, Subject& s) {
  const auto zero = method.zero_at_first(s.layer.kind);
  uneven_sum(s.run()).backward();
  for (const auto& [name, tensor] : s.adapter->named_parameters()) {
    const std::string last = name.substr(name.rfind('.') + 1);
    const bool expected = std::find(zero.begin(), zero.end(), last) != zero.end();
    INFO(name);
    REQUIRE(tensor.grad().defined());
    CHECK((tensor.grad().abs().max().item<double>() == 0.0) == expected);
  }
}

/// I7: gradients of the parameters and of the input are those of central differences.
inline void check_gradients(Subject& s) {
  randomise(s.adapter->parameters());
  NamedTensors leaves = s.adapter->named_parameters();
  at::Tensor x = s.inputs.front();
  if (x.is_floating_point()) {
    x = x.detach().clone().set_requires_grad(true);
    leaves.emplace_back("x", x);
  }
  check_leaf_gradients([&] { return s.run(x); }, leaves);
}

/// The base keeps its bits over several steps while the adapter learns.
inline void check_training(Subject& s, double lr) {
  const auto base = nn::weight_of(s.frozen()).clone();
  const at::Tensor target = s.run().detach() + 1.0;
  const auto loss = [&] { return (s.run() - target).square().mean(); };
  const double before = loss().item<double>();
  for (int step = 0; step < 5; ++step) {
    loss().backward();
    const at::NoGradGuard no_grad;
    for (at::Tensor parameter : s.adapter->parameters()) {
      parameter.sub_(parameter.grad(), lr);
      parameter.mutable_grad().zero_();
    }
  }
  CHECK(loss().item<double>() < before);
  CHECK(at::equal(base, nn::weight_of(s.frozen())));
}

/// Switching off gives the base, switching on the adapter again, bit for bit.
inline void check_switch(Subject& s) {
  randomise(s.adapter->parameters());
  const at::Tensor adapted = s.run(), base = nn::apply(s.frozen(), s.inputs.front());
  CHECK_FALSE(at::equal(adapted, base));
  s.adapter->disable();
  CHECK(at::equal(s.run(), base));
  s.adapter->enable();
  CHECK(at::equal(s.run(), adapted));
}

/// I11: a saved adapter, read into a fresh model, computes the same bits.
inline void check_files(const MethodCase& method, Subject& s, int64_t rank, at::ScalarType type) {
  randomise(s.adapter->parameters());
  const at::Tensor expected = s.run();
  std::string folder = (std::filesystem::temp_directory_path() / "graft-kit-XXXXXX").string();
  REQUIRE(::mkdtemp(folder.data()) != nullptr);
  s.adapter->save(folder);
  Subject other(method, s.layer, rank, type);
  other.adapter->detach();
  other.adapter.emplace(attach_from(other.model, folder));
  CHECK(at::equal(other.run(), expected));
  CHECK(other.adapter->parameter_count() == s.adapter->parameter_count());
  std::filesystem::remove_all(folder);
}

/// Inside a scope, torch's own layer computes what graft's does, with the same gradients.
inline void check_scope(const MethodCase& method, Subject& s, int64_t rank, at::ScalarType type) {
  Subject plain(method, s.layer, rank, type, /*of_torch=*/true);
  randomise(s.adapter->parameters());
  randomise(plain.adapter->parameters());
  for (size_t i = 0; i < s.inputs.size(); ++i) {
    const at::Tensor expected = s.run(s.inputs[i]);
    const auto active = plain.adapter->activate();
    const at::Tensor found = plain.run(plain.inputs[i]);
    CHECK(distance(found, expected) < tolerance_of(type));
    uneven_sum(expected).backward();
    uneven_sum(found).backward();
  }
  const auto ours = s.adapter->parameters(), theirs = plain.adapter->parameters();
  for (size_t i = 0; i < ours.size(); ++i)
    CHECK(distance(theirs[i].grad(), ours[i].grad()) < 10 * tolerance_of(type));
}

/// I13: more dimensions, no rows and strides make no difference to the rows' values.
inline void check_shapes(Subject& s) {
  randomise(s.adapter->parameters());
  for (const auto& x : s.inputs) {
    const at::Tensor y = s.run(x);
    CHECK(y.sizes() == nn::apply(s.frozen(), x).sizes());
    CHECK(distance(s.run(x.contiguous()), y) < tolerance_of(at::kDouble));
    if (s.layer.kind != "Linear" || x.dim() < 2) continue;
    const at::Tensor flat = s.run(x.reshape({-1, x.size(-1)}));
    CHECK(distance(flat.view(y.sizes()), y) < tolerance_of(at::kDouble));
  }
}

/// All of it, on every layer that the method fits and in both types.
inline void run_adapter_kit(const MethodCase& method) {
  const auto lists = [](const std::vector<std::string>& kinds, const std::string& kind) {
    return std::any_of(kinds.begin(), kinds.end(),
                       [&](const auto& item) { return kind.starts_with(item); });
  };
  for (const auto& layer : all_layer_cases()) {
    if (lists(method.unfit, layer.kind) || lists(method.unfit_layers, layer.name)) continue;
    for (const int64_t rank : layer.ranks) {
      for (const auto type : {at::kFloat, at::kDouble}) {
        INFO(layer.kind << " (" << layer.name << "), rank " << rank << ", " << type);
        const auto fresh = [&] { return Subject(method, layer, rank, type); };
        const auto with = [&](auto&& check, auto&&... rest) {
          Subject subject = fresh();
          check(subject, rest...);
        };
        if (method.starts_to_rounding)
          with(check_starts_to_rounding, type);
        else if (method.starts_as_base)
          with(check_starts_as_base);
        if (layer.mergeable && !lists(method.unmergeable, layer.kind)) with(check_merge, type);
        with([&](Subject& s) { check_trained(method, s, rank); });
        with([&](Subject& s) { check_first_gradients(method, s); });
        with(check_training, method.training_lr);
        with(check_switch);
        // Files are flushed to the disk, which is slow: once a layer, the types in turn.
        const auto saved_type = layer.ranks.size() % 2 == 0 ? at::kFloat : at::kDouble;
        if (method.reads_back && rank == layer.ranks.back() && type == saved_type)
          with([&](Subject& s) { check_files(method, s, rank, type); });
        with([&](Subject& s) { check_scope(method, s, rank, type); });
        if (type != at::kDouble) continue;
        with(check_shapes);
        if (method.exact_gradients && rank == layer.ranks.back()) with(check_gradients);
      }
    }
  }
}

}  // namespace graft::testing
