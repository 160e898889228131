// A small model of Llama's form: attention's four layers and a gated block, twice.
#pragma once

#include <graft/nn/gated_mlp.h>

#include "tests/support/tiny_models.h"

namespace graft::testing {

/// x + o(tanh(q x) * v(k x)), then x + mlp(x).
struct BlockLayerImpl : torch::nn::Module {
  explicit BlockLayerImpl(int64_t width, int64_t intermediate) {
    self_attn = register_module("self_attn", std::make_shared<torch::nn::Module>("Attention"));
    const auto layer = [&](const char* name) {
      return self_attn->register_module(name, nn::Linear(width, width));
    };
    q_proj = layer("q_proj");
    k_proj = layer("k_proj");
    v_proj = layer("v_proj");
    o_proj = layer("o_proj");
    mlp = register_module("mlp", nn::GatedMlp(width, intermediate));
  }
  at::Tensor forward(const at::Tensor& x, const at::Tensor& valid) {
    const at::Tensor mid =
        x + o_proj->forward(at::tanh(q_proj->forward(x)) * v_proj->forward(k_proj->forward(x)));
    return mid + mlp->forward(mid, valid);
  }
  std::shared_ptr<torch::nn::Module> self_attn;
  nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};
  nn::GatedMlp mlp{nullptr};
};

/// embed -> model.layers.0, model.layers.1 -> lm_head. Vocabulary 11, width 8, blocks of 12.
struct BlockDecoder : torch::nn::Module {
  static constexpr int64_t kWidth = 8, kIntermediate = 12, kVocabulary = 11;

  explicit BlockDecoder(uint64_t seed = 1) {
    at::manual_seed(seed);
    model = register_module("model", std::make_shared<torch::nn::Module>("model"));
    embed = model->register_module("embed", nn::Embedding(kVocabulary, kWidth));
    auto list = model->register_module("layers", std::make_shared<torch::nn::Module>("layers"));
    for (int i = 0; i < 2; ++i)
      blocks.push_back(list->register_module(
          std::to_string(i), std::make_shared<BlockLayerImpl>(kWidth, kIntermediate)));
    lm_head = register_module("lm_head", nn::Linear(kWidth, kVocabulary));
  }
  /// tokens: [batch, time]; returns logits.
  at::Tensor forward(const at::Tensor& tokens, const at::Tensor& valid = {}) {
    at::Tensor x = embed->forward(tokens);
    for (const auto& block : blocks) x = block->forward(x, valid);
    return lm_head->forward(x);
  }
  std::shared_ptr<torch::nn::Module> model;
  nn::Embedding embed{nullptr};
  std::vector<std::shared_ptr<BlockLayerImpl>> blocks;
  nn::Linear lm_head{nullptr};
};

}  // namespace graft::testing
