/// Adapter folders turned into plain LoRA folders, without the model.
#pragma once

#include <graft/adapters/recipe.h>
#include <graft/io/adapter_config.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>

namespace graft::io {

/// What a conversion did.
struct Conversion {
  int64_t layers = 0;        ///< written
  int64_t dropped = 0;       ///< layers whose update had nothing left
  int64_t largest_rank = 0;  ///< of the written layers
  int64_t parameters = 0;    ///< numbers written for them
};

/// What a conversion may need beside the folder.
struct ConvertOptions {
  /// Only the leading units, for methods whose ranks nest (DyLoRA); 0: all.
  int64_t rank = 0;
  /// The model's Hugging Face folder, for methods whose files do not tell a layer's input size
  /// (VeRA), and for starts that are found again from the weight (PiSSA, OLoRA); empty: none.
  std::filesystem::path base = {};
  /// The folder's values before training, for starts that are not (LoRA-GA, CorDA, randomised
  /// PiSSA); empty: none.
  std::filesystem::path start = {};
};

/// Writes the plain LoRA folder with the same update on the untouched base
/// (adapters::MethodEntry::to_lora): units that are switched off are left out, each layer keeps its
/// own rank and alpha through rank_pattern and alpha_pattern, and a start that took a part of the
/// base into the factors becomes the difference from that part, of twice the rank. What the folder
/// trains besides (biases, modules_to_save) goes along unchanged.
/// Throws when the method has no plain LoRA form or the folder is plain already, when `rank` is
/// given for a method whose ranks do not nest, when no layer has an update left, and for an output
/// folder that is the input.
Conversion convert_to_lora(const std::filesystem::path& folder, const std::filesystem::path& output,
                           const ConvertOptions& options = {});

/// The plain LoRA of every layer of a folder, by the layers' names. Throws when the method has no
/// plain LoRA form, and for a folder that trains biases or whole modules besides.
std::map<std::string, adapters::PlainLora> read_plain_lora(const std::filesystem::path& folder);

/// The plain LoRA of one stored layer, with its own rank and alpha.
adapters::PlainLora plain_lora(const AdapterConfig& config, const std::string& layer,
                               const adapters::StoredLayer& stored, int64_t rank = 0);

/// The configuration with these plain layers in place of its own method: the rank and alpha that
/// most of them have, patterns for the others.
AdapterConfig plain_lora_config(const AdapterConfig& config,
                                const std::map<std::string, adapters::PlainLora>& layers);

}  // namespace graft::io
