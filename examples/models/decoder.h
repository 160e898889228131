/// A decoder of the Llama family, written once for training and generation.
///
/// Names and shapes of modules and parameters are those of transformers' LlamaForCausalLM, so that
/// checkpoints and adapter files need no translation: model.layers.3.self_attn.q_proj, lm_head.
#pragma once

#include <graft/nn/embedding.h>
#include <graft/nn/gated_mlp.h>
#include <graft/nn/linear.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/container/modulelist.h>

#include <memory>
#include <vector>

#include "examples/models/decoder_config.h"

namespace graft::models {

/// Keys and values of the positions a generation has seen, one entry a layer.
struct KeyValueCache {
  struct Layer {
    at::Tensor keys, values;  ///< [batch, kv_heads, capacity, head_dim]
  };
  std::vector<Layer> layers;
  int64_t length = 0;    ///< positions filled
  int64_t capacity = 0;  ///< positions there is room for
  /// Those of X-LoRA's first pass, whose hidden states are others; null until there is one.
  std::shared_ptr<KeyValueCache> first_pass;
};

/// What all layers of one forward pass have in common.
struct PassContext {
  ops::RopeTable rope;  ///< of this pass's positions
  at::Tensor mask;      ///< additive, [tokens, positions], or [batch, tokens, positions] where rows
                        ///< differ; undefined: plain causal
  at::Tensor valid;     ///< bool [batch, tokens], false for padding; undefined: none
  KeyValueCache* cache = nullptr;
};

/// y = x / sqrt(mean(x^2) + eps) * weight.
class RmsNormImpl : public torch::nn::Module {
 public:
  RmsNormImpl(int64_t size, double eps);
  at::Tensor forward(const at::Tensor& x);
  at::Tensor weight;  ///< [size]

 private:
  double eps_;
};
TORCH_MODULE(RmsNorm);

/// Grouped-query attention with rotary positions.
class AttentionImpl : public torch::nn::Module {
 public:
  explicit AttentionImpl(const DecoderConfig& config);
  /// x: [batch, tokens, hidden].
  at::Tensor forward(const at::Tensor& x, PassContext& pass, size_t layer);
  nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};

 private:
  int64_t heads_, kv_heads_, head_dim_;
};
TORCH_MODULE(Attention);

/// One block: attention and MLP, each behind a norm and beside a residual.
class DecoderLayerImpl : public torch::nn::Module {
 public:
  explicit DecoderLayerImpl(const DecoderConfig& config);
  at::Tensor forward(const at::Tensor& x, PassContext& pass, size_t layer);
  Attention self_attn{nullptr};
  nn::GatedMlp mlp{nullptr};
  RmsNorm input_layernorm{nullptr}, post_attention_layernorm{nullptr};
};
TORCH_MODULE(DecoderLayer);

/// Embedding, blocks and the last norm.
class DecoderBodyImpl : public torch::nn::Module {
 public:
  explicit DecoderBodyImpl(const DecoderConfig& config);
  nn::Embedding embed_tokens{nullptr};
  torch::nn::ModuleList layers;
  RmsNorm norm{nullptr};
};
TORCH_MODULE(DecoderBody);

/// The whole model. Parameters are empty until `models::load` fills them.
class DecoderImpl : public torch::nn::Module {
 public:
  explicit DecoderImpl(const DecoderConfig& config);

  /// Hidden states after the last norm.  tokens: [batch, tokens] int64; returns [batch, tokens,
  /// hidden].
  /// `segments` [batch, tokens]: attention stays among positions of equal number; undefined: none.
  /// `valid` bool [batch, tokens]: false for padding, which mixtures of experts leave out.
  /// An active X-LoRA has its first pass here, without a graph, whose hidden states mix the second.
  at::Tensor hidden(const at::Tensor& tokens, KeyValueCache* cache = nullptr,
                    const at::Tensor& segments = {}, const at::Tensor& valid = {});
  /// Logits of every position: [batch, tokens, vocabulary].
  at::Tensor logits(const at::Tensor& tokens);
  /// Mean next-token loss; position t predicts targets[t]. tokens, targets: [batch, tokens];
  /// targets of -100 are ignored. `normalizer`: what the summed loss is divided by, when not the
  /// number of counted targets (gradient accumulation).
  at::Tensor loss(const at::Tensor& tokens, const at::Tensor& targets,
                  std::optional<double> normalizer = std::nullopt, const at::Tensor& segments = {},
                  const at::Tensor& valid = {});
  /// The same for each part of the batch alone, within the nn::BatchRows in force (without one: the
  /// whole batch is the one part). `normalizers`: one a part, what its summed loss is divided by.
  std::vector<at::Tensor> losses(const at::Tensor& tokens, const at::Tensor& targets,
                                 const std::vector<double>& normalizers,
                                 const at::Tensor& segments = {});
  /// Logits of the last position: [batch, vocabulary].
  at::Tensor next_logits(const at::Tensor& tokens, KeyValueCache& cache);
  /// An empty cache for `capacity` positions.
  KeyValueCache make_cache(int64_t batch, int64_t capacity) const;

  const DecoderConfig config;
  at::Tensor rope_factors;              ///< divides the inverse frequencies; undefined: none
  bool gradient_checkpointing = false;  ///< recompute the blocks in backward
  /// On a device, `loss` with a normalizer reads nothing on the host: see
  /// ops::LinearCrossEntropyOptions. Needs targets on the device.
  bool loss_without_waiting = false;
  DecoderBody model{nullptr};
  nn::Linear lm_head{nullptr};

 private:
  // One pass through embedding, blocks and norm.
  at::Tensor run_blocks(const at::Tensor& tokens, KeyValueCache* cache, const at::Tensor& segments,
                        const at::Tensor& valid);
  // The loss of hidden states [sequences, tokens, hidden].
  at::Tensor head_loss(const at::Tensor& hidden, const at::Tensor& targets,
                       std::optional<double> normalizer);
  ops::RopeTable rope_for(int64_t first, int64_t count);
  ops::RopeTable rope_;  // of the positions 0 .. n-1, grown on demand
};
TORCH_MODULE(Decoder);

}  // namespace graft::models
