/// Sizes and constants of a decoder of the Llama family.
#pragma once

#include <graft/io/gguf.h>
#include <graft/ops/rope.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace graft::models {

/// What `config.json` or a GGUF file's metadata say about a Llama-style decoder (Llama 2 and 3,
/// SmolLM2, Mistral).
struct DecoderConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t layers = 0;
  int64_t heads = 0;     ///< query heads
  int64_t kv_heads = 0;  ///< key and value heads; divides `heads`
  int64_t head_dim = 0;
  double rms_norm_eps = 1e-6;
  bool tied = false;  ///< the output layer shares the embedding's weight
  bool attention_bias = false;
  bool mlp_bias = false;
  int64_t sliding_window = 0;  ///< how many positions back attention looks; 0: all
  int64_t max_positions = 0;   ///< longest sequence the model was made for
  ops::RopeOptions rope;
  std::vector<int32_t> eos_ids;

  /// Throws unless every size is positive and they agree with each other.
  void validate(const std::string& place) const;
};

/// Reads a Hugging Face config.json. Refuses a model_type, activation or rope type that the decoder
/// does not compute.
DecoderConfig read_hf_config(const std::filesystem::path& file);

/// Reads a GGUF file's metadata (architecture "llama").
DecoderConfig read_gguf_config(const io::GgufFile& file);

}  // namespace graft::models
