/// A model and its tokenizer from a Hugging Face folder or a GGUF file.
#pragma once

#include <filesystem>

#include "examples/models/decoder.h"
#include "examples/text/tokenizer.h"

namespace graft::models {

/// A model that is ready to run.
struct LoadedModel {
  Decoder decoder{nullptr};
  text::Tokenizer tokenizer;
};

/// Loads the model in `dtype` (fp32, bf16 or fp16) onto a device. On the CPU, a Hugging Face
/// folder's tensors of that dtype are mapped, not copied. Missing, unexpected and mis-shaped
/// tensors are listed all at once.
LoadedModel load(const std::filesystem::path& path, at::ScalarType dtype = at::kFloat,
                 const at::Device& device = at::kCPU);

/// The sizes alone, of what `load` takes.
DecoderConfig read_config(const std::filesystem::path& path);

/// The tokenizer alone: of a folder that need hold nothing but tokenizer.json, or of a GGUF file.
text::Tokenizer load_tokenizer(const std::filesystem::path& path);

/// Writes the decoder's weights and, from `source`, the model's other files: a Hugging Face folder
/// again. A GGUF source is refused, since its tokenizer has no tokenizer.json. Nothing is left
/// behind on failure.
void save_hf_folder(DecoderImpl& decoder, const std::filesystem::path& source,
                    const std::filesystem::path& output);

}  // namespace graft::models
