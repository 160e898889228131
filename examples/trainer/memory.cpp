#include "examples/trainer/memory.h"

#include <fmt/format.h>
#include <graft/ops/linear_cross_entropy.h>

#include <algorithm>

namespace graft::trainer {
namespace {

constexpr int64_t kMaster = 4;  // bytes of an fp32 number

}  // namespace

int64_t weight_bytes(const models::DecoderConfig& c, at::ScalarType type) {
  const int64_t queries = c.heads * c.head_dim, keys = c.kv_heads * c.head_dim;
  const int64_t biases = (c.attention_bias ? queries + 2 * keys + c.hidden_size : 0) +
                         (c.mlp_bias ? 2 * c.intermediate_size + c.hidden_size : 0);
  const int64_t block =
      c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size + 2) + biases;
  const int64_t numbers = c.layers * block + c.hidden_size * (c.vocab_size * (c.tied ? 1 : 2) + 1);
  return numbers * static_cast<int64_t>(c10::elementSize(type));
}

int64_t activation_bytes(const models::DecoderConfig& c, const PassShape& pass) {
  const auto size = static_cast<int64_t>(c10::elementSize(pass.type));
  const int64_t queries = c.heads * c.head_dim, keys = c.kv_heads * c.head_dim;
  const int64_t tokens = pass.rows * pass.tokens, input = c.hidden_size * size;
  const int64_t mask = pass.segments ? c.kv_heads * pass.tokens : 0;
  const int64_t block =
      (c.hidden_size + 3 * queries + 2 * keys + 2 * c.intermediate_size + mask) * size +
      (c.heads + 7 * pass.rank) * kMaster;
  const int64_t kept = tokens * ((c.layers + 2) * input + (pass.recompute ? 0 : c.layers) * block);
  // Then, whichever is more: a chunk of logits and its copy on the way, or what one block's
  // backward holds at once, which is widest in its feed-forward part.
  const int64_t logits =
      std::min(ops::LinearCrossEntropyOptions().logits_bytes, tokens * c.vocab_size * kMaster);
  const int64_t backward = tokens * ((2 * c.hidden_size + 4 * c.intermediate_size) * kMaster +
                                     (pass.recompute ? block : 0));
  return kept + std::max(2 * logits, backward);
}

std::string describe(const MemoryUse& use) {
  const auto mib = [](int64_t bytes) {
    return fmt::format("{:.{}f} MiB", static_cast<double>(bytes) / (1 << 20),
                       bytes < 10 << 20 ? 1 : 0);
  };
  return fmt::format("weights {}, adapter {}, optimiser {}, activations {}, in all {}",
                     mib(use.weights), mib(use.adapter), mib(use.optimiser), mib(use.activations),
                     mib(use.total()));
}

}  // namespace graft::trainer
