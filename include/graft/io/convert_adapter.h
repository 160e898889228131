/// Adapter folders turned into plain LoRA folders, without the model.
#pragma once

#include <cstdint>
#include <filesystem>

namespace graft::io {

/// What a conversion did.
struct Conversion {
  int64_t layers = 0;        ///< written
  int64_t dropped = 0;       ///< layers whose update had nothing left
  int64_t largest_rank = 0;  ///< of the written layers
  int64_t parameters = 0;    ///< numbers written for them
};

/// Writes the plain LoRA folder with the same update (adapters::MethodEntry::to_lora): units that
/// are switched off are left out, each layer keeps its own rank and alpha through rank_pattern and
/// alpha_pattern. What the folder trains besides (biases, modules_to_save) goes along unchanged.
/// `rank`: only the leading units, for methods whose ranks nest (DyLoRA); 0: all.
/// `base`: the model's Hugging Face folder, needed for methods whose files do not tell a layer's
/// input size (VeRA); empty: none.
/// Throws when the method has no plain LoRA form, when `rank` is given for a method whose ranks do
/// not nest, when no layer has an update left, and for an output folder that is the input.
Conversion convert_to_lora(const std::filesystem::path& folder, const std::filesystem::path& output,
                           int64_t rank = 0, const std::filesystem::path& base = {});

}  // namespace graft::io
