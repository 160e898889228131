/// SLoRA, NLoRA and IntTune: LoRA with a small square matrix between its factors.
///
///   y = W x + b + s B N A drop(x)      A [r, in], N [r, r], B [out, r], s = alpha / r
///
/// SLoRA starts A and N at random and B at zero; NLoRA takes all three from W by the Nyström
/// approximation; IntTune trains N alone. With a start that is subtracted W is never written to,
/// the update is s (B N A - B0 N0 A0) with the values at the start, so that the model starts as it
/// was. Where N alone is trained, that is s B (N - N0) A.
///
/// Source: Guo, Chang, Wu 2025, arXiv 2502.14482. PEFT has no such method: peft_type NLORA is
/// graft's own.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/ops/dropout.h>

#include <optional>
#include <string>
#include <vector>

namespace graft::adapters {

class NloraImpl;

/// Options of SLoRA, NLoRA and IntTune.
struct NloraOptions {
  using Method = NloraImpl;

  int64_t rank = 8;      ///< r, in [1, min(in, out)]
  double alpha = 16.0;   ///< numerator of the scale; not 0
  double dropout = 0.0;  ///< on the branch's input, in [0, 1); not for Embedding, nor where a start
                         ///< is subtracted
  /// Where A, N and B start:
  ///   slora  A and N kaiming-uniform, B = 0 (an Embedding: A = 0, B ~ N(0, 1)): as the base
  ///   block, pinv, cur  A = W[:r], B = W[:, :r] and the core of that name (NystromOptions in
  ///   init/start.h)
  std::string start_by = "slora";
  double rcond = 0.1;  ///< of pinv
  /// Whether the start is subtracted. Unset: for cur and pinv. pinv cannot go without, slora has
  /// nothing to subtract.
  std::optional<bool> subtract = {};
  std::string train = "all";  ///< "all": A, N and B; "core": N alone (IntTune), not with slora

  /// Whether the start is subtracted, the default filled in.
  bool subtracts() const;
  /// s for the rank in force.
  double scale() const;
  /// Throws unless every option is in its range and they go together.
  void validate() const;
};

/// A, N and B of one layer.
class NloraImpl : public AdapterModule<NloraImpl, NloraOptions> {
 public:
  static constexpr const char* kName = "nlora";

  /// Makes the factors on the base weight's device, fp32 (fp64 for an fp64 base). Throws for a rank
  /// that the layer cannot carry, a convolution with groups, and a weight that a Nyström start
  /// cannot be taken from (not finite, all zero).
  NloraImpl(const nn::FrozenLayer& base, const NloraOptions& options, const LayerContext& context);

  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x);
  /// indices: [...]; returns [..., columns].
  at::Tensor forward(const nn::FrozenEmbedding& base, const at::Tensor& indices);
  /// x: [batch, in, size...]; returns [batch, out, size'...].
  at::Tensor forward(const nn::FrozenConv& base, const at::Tensor& x);

  /// W plus the update, summed in fp32 at least and rounded once to W's dtype.
  at::Tensor merged_weight(const nn::FrozenLayer& base) const;

  std::vector<FileTensor> file_tensors() const override;

  static void write_config(const NloraOptions& options, nlohmann::json& config);
  static std::string describe(const NloraOptions& options);

  at::Tensor lora_A;   ///< [r, in]; Embedding: [r, rows]; Conv: [r, in, kernel...]
  at::Tensor lora_B;   ///< [out, r]; Embedding: [columns, r]; Conv: [out, r, 1...]
  at::Tensor lora_N;   ///< [r, r]
  at::Tensor start_A;  ///< A0, where A, N and B are trained and their start is subtracted
  at::Tensor start_B;  ///< B0 N0, likewise
  at::Tensor start_N;  ///< N0, where N alone is trained and its start is subtracted
  const double scale;  ///< s

 private:
  /// The factors of the plain LoRA with the same update, differentiable.
  std::pair<at::Tensor, at::Tensor> factors() const;

  bool embedding_ = false;
};
TORCH_MODULE(Nlora);

/// The built-in list's entry.
MethodEntry nlora_entry();

}  // namespace graft::adapters
