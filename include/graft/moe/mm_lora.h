/// MM-LoRA: one LoRA expert for each kind of tokens, of its own rank (Arcana: visual and language).
///
///   y = W x + b + s B_k A_k drop(x),   k the token's kind
///
/// A TokenScope tells the kinds; tokens without one are of the kind `default_kind`. A_k and B_k are
/// trained. The gate is a mask: tokens of other kinds add exactly 0 to an expert's gradients.
/// Source: Sun et al. 2024, arXiv 2410.13733.
#pragma once

#include <graft/moe/linear_mixture.h>

namespace graft::moe {

/// Options of MM-LoRA; the defaults are those of Arcana's code: kind 0 visual, kind 1 language.
struct MmLoraOptions {
  using Method = class MmLoraImpl;

  std::vector<int64_t> ranks = {64, 192};  ///< of each kind, in [1, min(in, out)]
  double scale = 2.0;                      ///< s, whatever the rank; not 0
  double dropout = 0.0;                    ///< on the experts' input, in [0, 1)
  std::string init = "kaiming";            ///< "kaiming", "gaussian", "orthogonal", "random"
  int64_t default_kind = 1;                ///< in [0, number of kinds)

  /// Throws unless every option is in its range.
  void validate() const;
};

/// The experts of one layer.
class MmLoraImpl : public LinearMixture<MmLoraImpl, MmLoraOptions> {
 public:
  static constexpr const char* kName = "mm-lora";

  MmLoraImpl(const nn::FrozenLayer& base, const MmLoraOptions& options,
             const adapters::LayerContext& context);

  /// Throws for kinds that are not one a token, or none of the experts.
  at::Tensor gates(const at::Tensor& x);
  std::vector<FileTensor> file_tensors() const override { return experts.file_tensors(); }

  static void write_config(const MmLoraOptions& options, nlohmann::json& config);
  static std::string describe(const MmLoraOptions& options);
};
TORCH_MODULE(MmLora);

/// The built-in list's entry.
adapters::MethodEntry mm_lora_entry();

}  // namespace graft::moe
