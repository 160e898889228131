#include "examples/models/decoder.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/moe/xlora.h>
#include <graft/nn/adapter_slot.h>
#include <graft/nn/batch_rows.h>
#include <graft/ops/linear_cross_entropy.h>
#include <graft/ops/rms_norm.h>
#include <graft/ops/split_rows.h>
#include <graft/train/checkpoint.h>

#include <limits>

namespace graft::models {
namespace {

// A layer of the right kind without the cost of random values: its parameters are set by the
// loader.
nn::Linear empty_linear(int64_t in, int64_t out, bool bias) {
  nn::Linear linear(torch::nn::LinearOptions(1, 1).bias(bias));
  linear->options.in_features(in).out_features(out);
  linear->weight.set_data(at::empty({0, in}));
  return linear;
}

nn::Embedding empty_embedding(int64_t rows, int64_t columns) {
  nn::Embedding embedding(torch::nn::EmbeddingOptions(1, 1));
  embedding->options.num_embeddings(rows).embedding_dim(columns);
  embedding->weight.set_data(at::empty({0, columns}));
  return embedding;
}

nn::GatedMlp empty_mlp(const DecoderConfig& config) {
  const int64_t hidden = config.hidden_size, intermediate = config.intermediate_size;
  return nn::GatedMlp(empty_linear(hidden, intermediate, config.mlp_bias),
                      empty_linear(hidden, intermediate, config.mlp_bias),
                      empty_linear(intermediate, hidden, config.mlp_bias));
}

// Position q may look at the positions (q - window, q].
at::Tensor window_mask(int64_t first, int64_t count, int64_t window, const at::Device& device) {
  const at::Tensor q = at::arange(first, first + count, device).unsqueeze(1),
                   k = at::arange(0, first + count, device).unsqueeze(0);
  const at::Tensor visible = (k <= q).logical_and(k > q - window);
  return at::zeros({count, first + count}, device)
      .masked_fill_(visible.logical_not(), -std::numeric_limits<float>::infinity());
}

}  // namespace

RmsNormImpl::RmsNormImpl(int64_t size, double eps) : torch::nn::Module("RmsNorm"), eps_(eps) {
  weight = register_parameter("weight", at::ones({size}), /*requires_grad=*/false);
}

at::Tensor RmsNormImpl::forward(const at::Tensor& x) {
  return ops::rms_norm(x, weight, eps_);
}

AttentionImpl::AttentionImpl(const DecoderConfig& config)
    : torch::nn::Module("Attention"),
      heads_(config.heads),
      kv_heads_(config.kv_heads),
      head_dim_(config.head_dim) {
  const bool bias = config.attention_bias;
  q_proj = register_module("q_proj", empty_linear(config.hidden_size, heads_ * head_dim_, bias));
  k_proj = register_module("k_proj", empty_linear(config.hidden_size, kv_heads_ * head_dim_, bias));
  v_proj = register_module("v_proj", empty_linear(config.hidden_size, kv_heads_ * head_dim_, bias));
  o_proj = register_module("o_proj", empty_linear(heads_ * head_dim_, config.hidden_size, bias));
}

at::Tensor AttentionImpl::forward(const at::Tensor& x, PassContext& pass, size_t layer) {
  const int64_t batch = x.size(0), tokens = x.size(1), group = heads_ / kv_heads_;
  const auto split = [&](const at::Tensor& t, int64_t heads) {
    return t.view({batch, tokens, heads, head_dim_});
  };
  const auto qkv = nn::forward_together({q_proj, k_proj, v_proj}, x);
  at::Tensor q = ops::rope(split(qkv[0], heads_), pass.rope.cos, pass.rope.sin);
  at::Tensor k = ops::rope(split(qkv[1], kv_heads_), pass.rope.cos, pass.rope.sin);
  at::Tensor v = split(qkv[2], kv_heads_).transpose(1, 2);
  int64_t positions = tokens;
  if (pass.cache != nullptr) {
    auto& [keys, values] = pass.cache->layers[layer];
    const int64_t first = pass.cache->length;
    positions = first + tokens;
    keys.narrow(2, first, tokens).copy_(k);
    values.narrow(2, first, tokens).copy_(v);
    k = keys.narrow(2, 0, positions);
    v = values.narrow(2, 0, positions);
  }
  // Heads that share keys become the heads of one attention each: the keys are read in place, not
  // repeated.
  q = q.view({batch * kv_heads_, group, tokens, head_dim_});
  const auto share = [&](const at::Tensor& t) {
    return t.reshape({batch * kv_heads_, 1, positions, head_dim_}).expand({-1, group, -1, -1});
  };
  const bool causal = !pass.mask.defined() && tokens > 1;
  at::Tensor mask = pass.mask;
  if (mask.defined() && mask.dim() == 3)
    mask = mask.repeat_interleave(kv_heads_, 0).unsqueeze(1);  // one for each attention of `share`
  at::Tensor y = at::scaled_dot_product_attention(
      q, share(k), share(v), mask.defined() ? std::optional(mask) : std::nullopt, 0.0, causal);
  y = y.view({batch, kv_heads_, group, tokens, head_dim_})
          .permute({0, 3, 1, 2, 4})
          .reshape({batch, tokens, heads_ * head_dim_});
  return o_proj->forward(y);
}

DecoderLayerImpl::DecoderLayerImpl(const DecoderConfig& config)
    : torch::nn::Module("DecoderLayer") {
  self_attn = register_module("self_attn", Attention(config));
  mlp = register_module("mlp", empty_mlp(config));
  input_layernorm =
      register_module("input_layernorm", RmsNorm(config.hidden_size, config.rms_norm_eps));
  post_attention_layernorm =
      register_module("post_attention_layernorm", RmsNorm(config.hidden_size, config.rms_norm_eps));
}

at::Tensor DecoderLayerImpl::forward(const at::Tensor& x, PassContext& pass, size_t layer) {
  const at::Tensor mid = x + self_attn->forward(input_layernorm->forward(x), pass, layer);
  return mid + mlp->forward(post_attention_layernorm->forward(mid), pass.valid);
}

DecoderBodyImpl::DecoderBodyImpl(const DecoderConfig& config) : torch::nn::Module("DecoderBody") {
  embed_tokens =
      register_module("embed_tokens", empty_embedding(config.vocab_size, config.hidden_size));
  layers = register_module("layers", torch::nn::ModuleList());
  for (int64_t i = 0; i < config.layers; ++i) layers->push_back(DecoderLayer(config));
  norm = register_module("norm", RmsNorm(config.hidden_size, config.rms_norm_eps));
}

DecoderImpl::DecoderImpl(const DecoderConfig& config)
    : torch::nn::Module("Decoder"), config(config) {
  model = register_module("model", DecoderBody(config));
  lm_head = register_module("lm_head", empty_linear(config.hidden_size, config.vocab_size, false));
}

ops::RopeTable DecoderImpl::rope_for(int64_t first, int64_t count) {
  if (!rope_.cos.defined() || rope_.cos.size(0) < first + count) {
    at::Tensor frequencies = ops::rope_inverse_frequencies(config.rope);
    if (rope_factors.defined()) frequencies = frequencies / rope_factors.cpu();
    const at::Tensor angles = at::outer(at::arange(first + count, at::kFloat), frequencies);
    const at::Device device = model->embed_tokens->weight.device();
    rope_ = {angles.cos().to(device), angles.sin().to(device)};
  }
  return {rope_.cos.narrow(0, first, count), rope_.sin.narrow(0, first, count)};
}

at::Tensor DecoderImpl::hidden(const at::Tensor& tokens, KeyValueCache* cache,
                               const at::Tensor& segments, const at::Tensor& valid) {
  moe::XloraImpl* mixed = moe::active_xlora(*this);
  if (mixed == nullptr) return run_blocks(tokens, cache, segments, valid);
  at::Tensor first;
  {
    const at::NoGradGuard no_grad;
    if (cache != nullptr && cache->first_pass == nullptr)
      cache->first_pass =
          std::make_shared<KeyValueCache>(make_cache(tokens.size(0), cache->capacity));
    first =
        run_blocks(tokens, cache != nullptr ? cache->first_pass.get() : nullptr, segments, valid);
  }
  const moe::XloraScope scope(*mixed, first);
  return run_blocks(tokens, cache, segments, valid);
}

at::Tensor DecoderImpl::run_blocks(const at::Tensor& tokens_in, KeyValueCache* cache,
                                   const at::Tensor& segments, const at::Tensor& valid) {
  const at::Device device = model->embed_tokens->weight.device();
  const at::Tensor tokens = tokens_in.to(device);
  GRAFT_CHECK(tokens.dim() == 2 && tokens.size(1) > 0, "model",
              "tokens must be [batch, tokens]; got ", tokens.sizes());
  const int64_t first = cache ? cache->length : 0, count = tokens.size(1);
  GRAFT_CHECK(!cache || first + count <= cache->capacity, "model", "the cache must have room; got ",
              first + count, " positions for ", cache ? cache->capacity : 0);
  PassContext pass{rope_for(first, count), {}, valid.defined() ? valid.to(device) : valid, cache};
  const int64_t window = config.sliding_window;
  if (window > 0 && first + count > window)
    pass.mask = window_mask(first, count, window, device);
  else if (first > 0 && count > 1)
    pass.mask = window_mask(first, count, first + count, device);
  if (segments.defined()) {
    GRAFT_CHECK(cache == nullptr && segments.sizes() == tokens.sizes(), "model",
                "segments must have the tokens' shape and go without a cache; got ",
                segments.sizes(), " for ", tokens.sizes());
    const at::Tensor pieces = segments.to(device);
    const at::Tensor among = pieces.unsqueeze(2) != pieces.unsqueeze(1);
    const at::Tensor causal =
        pass.mask.defined() ? pass.mask : window_mask(0, count, count, device);
    pass.mask = causal.unsqueeze(0)
                    .expand({tokens.size(0), -1, -1})
                    .masked_fill(among, -std::numeric_limits<float>::infinity());
  }
  at::Tensor x = model->embed_tokens->forward(tokens);
  if (pass.mask.defined()) pass.mask = pass.mask.to(x.scalar_type());
  for (size_t i = 0; i < model->layers->size(); ++i) {
    auto layer = model->layers[i]->as<DecoderLayerImpl>();
    if (gradient_checkpointing && at::GradMode::is_enabled()) {
      std::vector<at::Tensor> trainable;
      for (const auto& parameter : layer->parameters())
        if (parameter.requires_grad()) trainable.push_back(parameter);
      x = train::checkpoint(
          [layer, pass, i](const at::Tensor& in) mutable { return layer->forward(in, pass, i); }, x,
          trainable);
    } else {
      x = layer->forward(x, pass, i);
    }
  }
  if (cache) cache->length += count;
  return model->norm->forward(x);
}

at::Tensor DecoderImpl::logits(const at::Tensor& tokens) {
  return lm_head->forward(hidden(tokens));
}

at::Tensor DecoderImpl::head_loss(const at::Tensor& hidden, const at::Tensor& targets,
                                  std::optional<double> normalizer) {
  const at::Tensor wanted = targets.reshape({-1});
  ops::LinearCrossEntropyOptions options;
  options.normalizer = normalizer;
  options.without_waiting = loss_without_waiting && normalizer;
  if (lm_head->slot == nullptr || !lm_head->slot->engaged())
    return ops::linear_cross_entropy(hidden.reshape({-1, config.hidden_size}), lm_head->weight,
                                     wanted, options);
  // An adapted output layer: its whole logits are formed.
  const at::Tensor stored = lm_head->forward(hidden).reshape({-1, config.vocab_size});
  // Softmax and sum in float32 at least, as linear_cross_entropy has them.
  const at::Tensor logits = stored.to(at::promote_types(stored.scalar_type(), at::kFloat));
  const at::Tensor sum =
      at::cross_entropy_loss(logits, wanted.to(logits.device()), {}, at::Reduction::Sum);
  return sum /
         (normalizer ? *normalizer : static_cast<double>((wanted != -100).sum().item<int64_t>()));
}

at::Tensor DecoderImpl::loss(const at::Tensor& tokens, const at::Tensor& targets,
                             std::optional<double> normalizer, const at::Tensor& segments,
                             const at::Tensor& valid) {
  return head_loss(hidden(tokens, nullptr, segments, valid), targets, normalizer);
}

std::vector<at::Tensor> DecoderImpl::losses(const at::Tensor& tokens, const at::Tensor& targets,
                                            const std::vector<double>& normalizers,
                                            const at::Tensor& segments) {
  const auto parts = nn::BatchRows::current();
  GRAFT_CHECK(normalizers.size() == (parts ? parts->size() : 1), "model",
              "there must be one normalizer a part of the batch; got ", normalizers.size(), " for ",
              parts ? parts->size() : 1);
  const at::Tensor h = hidden(tokens, nullptr, segments);
  if (normalizers.size() == 1) return {head_loss(h, targets, normalizers.front())};
  std::vector<int64_t> counts;
  for (const auto& part : *parts) counts.push_back(part.sequences);
  const auto rows = ops::split_rows(h, counts);
  const auto wanted = targets.split_with_sizes(counts, 0);
  std::vector<at::Tensor> found;
  for (size_t i = 0; i < counts.size(); ++i) {
    const nn::BatchRows alone({(*parts)[i]});  // whether the output layer is adapted is its affair
    found.push_back(head_loss(rows[i], wanted[i], normalizers[i]));
  }
  return found;
}

at::Tensor DecoderImpl::next_logits(const at::Tensor& tokens, KeyValueCache& cache) {
  const at::Tensor h = hidden(tokens, &cache);
  return lm_head->forward(h.select(1, h.size(1) - 1));
}

KeyValueCache DecoderImpl::make_cache(int64_t batch, int64_t capacity) const {
  KeyValueCache cache;
  cache.capacity = capacity;
  const auto options = model->embed_tokens->weight.options().requires_grad(false);
  for (int64_t i = 0; i < config.layers; ++i) {
    const std::vector<int64_t> shape = {batch, config.kv_heads, capacity, config.head_dim};
    cache.layers.push_back({at::zeros(shape, options), at::zeros(shape, options)});
  }
  return cache;
}

}  // namespace graft::models
