// Small models with the names of real ones, once from torch's layers and once from graft's.
#pragma once

#include <ATen/ATen.h>
#include <graft/nn/conv.h>
#include <graft/nn/embedding.h>
#include <graft/nn/linear.h>
#include <torch/nn/module.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/support/testing.h"

namespace graft::testing {

struct TorchLayers {
  using Linear = torch::nn::Linear;
  using Embedding = torch::nn::Embedding;
};
struct GraftLayers {
  using Linear = nn::Linear;
  using Embedding = nn::Embedding;
};

/// One block: x + o_proj(tanh(q_proj x) * v_proj x), and a norm that no adapter fits.
template <class Layers>
struct TinyBlockImpl : torch::nn::Module {
  explicit TinyBlockImpl(int64_t width) {
    q_proj = register_module("q_proj", typename Layers::Linear(width, width));
    v_proj = register_module(
        "v_proj", typename Layers::Linear(torch::nn::LinearOptions(width, width).bias(false)));
    o_proj = register_module("o_proj", typename Layers::Linear(width, width));
    scale = register_parameter("scale", at::ones({width}));
  }
  at::Tensor forward(const at::Tensor& x) {
    return x * scale + o_proj->forward(at::tanh(q_proj->forward(x)) * v_proj->forward(x));
  }
  typename Layers::Linear q_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};
  at::Tensor scale;
};

/// embed -> model.layers.0, model.layers.1 -> lm_head. Vocabulary 11, width 8.
template <class Layers>
struct TinyDecoder : torch::nn::Module {
  static constexpr int64_t kWidth = 8, kVocabulary = 11;

  explicit TinyDecoder(uint64_t seed = 1) {
    at::manual_seed(seed);
    model = register_module("model", std::make_shared<torch::nn::Module>("model"));
    embed = model->register_module("embed", typename Layers::Embedding(kVocabulary, kWidth));
    auto list = model->register_module("layers", std::make_shared<torch::nn::Module>("layers"));
    for (int i = 0; i < 2; ++i)
      blocks.push_back(list->register_module(std::to_string(i),
                                             std::make_shared<TinyBlockImpl<Layers>>(kWidth)));
    lm_head = register_module(
        "lm_head", typename Layers::Linear(torch::nn::LinearOptions(kWidth, kVocabulary)));
  }
  /// tokens: [batch, time]; returns logits.
  at::Tensor forward(const at::Tensor& tokens) {
    at::Tensor x = embed->forward(tokens);
    for (const auto& block : blocks) x = block->forward(x);
    return lm_head->forward(x);
  }
  std::shared_ptr<torch::nn::Module> model;
  typename Layers::Embedding embed{nullptr};
  std::vector<std::shared_ptr<TinyBlockImpl<Layers>>> blocks;
  typename Layers::Linear lm_head{nullptr};
};

using GraftDecoder = TinyDecoder<GraftLayers>;
using TorchDecoder = TinyDecoder<TorchLayers>;

/// Some tokens for TinyDecoder: [2, 5].
inline at::Tensor some_tokens() {
  return at::arange(10, at::kLong).mul(7).remainder(11).view({2, 5});
}

/// Gives every tensor other values than those it starts with, small and reproducible.
inline void randomise(const std::vector<at::Tensor>& tensors, uint64_t seed = 42) {
  const at::NoGradGuard no_grad;
  at::manual_seed(seed);
  for (at::Tensor tensor : tensors) tensor.normal_(0.0, 0.3);
}

/// Every parameter's values, by name.
inline std::vector<std::pair<std::string, at::Tensor>> snapshot(const torch::nn::Module& module) {
  std::vector<std::pair<std::string, at::Tensor>> values;
  for (const auto& item : module.named_parameters())
    values.emplace_back(item.key(), item.value().detach().clone());
  return values;
}

/// Whether the module holds exactly these parameters with these bits.
inline bool holds_exactly(const torch::nn::Module& module,
                          const std::vector<std::pair<std::string, at::Tensor>>& values) {
  const auto parameters = module.named_parameters();
  if (parameters.size() != values.size()) return false;
  for (const auto& [name, value] : values) {
    const auto* parameter = parameters.find(name);
    if (parameter == nullptr || !at::equal(*parameter, value)) return false;
  }
  return true;
}

/// Copies equally named parameters from one module to the other.
inline void copy_parameters(const torch::nn::Module& from, torch::nn::Module& to) {
  const at::NoGradGuard no_grad;
  auto targets = to.named_parameters();
  for (const auto& item : from.named_parameters())
    if (at::Tensor* target = targets.find(item.key())) target->copy_(item.value());
}

}  // namespace graft::testing
