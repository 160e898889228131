/// LoRA-FA: LoRA whose A stays as it was drawn; only B is trained.
///
///   y = W x + b + s B A drop(x),  s = alpha / r, or alpha / sqrt(r) with `rslora`
///
/// Backward needs A drop(x) [tokens, r] but not x [tokens, in], which LoRA has to keep.
/// With `projected` the gradient of B is replaced, before the optimiser sees it, by
///   hB = 1/s^2 dL/dB (A A^T + 1e-8 I)^-1
/// so that the weight moves against G A^T (A A^T)^-1 A: of all steps of this form the one nearest
/// to the full gradient G.
///
/// A saved folder is a plain LoRA folder and is read as one. Sources: Zhang et al. 2023, arXiv
/// 2308.03303; the projection is that of the optimiser in Hugging Face PEFT.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/ops/dropout.h>

#include <string>
#include <vector>

namespace graft::adapters {

class LoraFaImpl;

/// Options of LoRA-FA; all but `projected` mean what they mean in LoRA.
struct LoraFaOptions {
  using Method = LoraFaImpl;

  int64_t rank = 8;              ///< r, in [1, min(in, out)]
  double alpha = 16.0;           ///< numerator of the scale; not 0
  double dropout = 0.0;          ///< on the branch's input, in [0, 1)
  bool rslora = false;           ///< s = alpha / sqrt(r)
  std::string init = "kaiming";  ///< how A and B start (init/initialiser.h); A must not be zero
  /// Projects B's gradient. It speaks to the optimiser and is not saved.
  bool projected = true;

  /// s for the rank in force.
  double scale() const;
  /// Throws unless every option is in its range.
  void validate() const;
};

/// A, frozen, and B of one layer. An Embedding is refused: its A starts as zeros and would stay so.
class LoraFaImpl : public AdapterModule<LoraFaImpl, LoraFaOptions> {
 public:
  static constexpr const char* kName = "lora-fa";

  /// Makes A and B on the base weight's device, fp32 (fp64 for an fp64 base).
  LoraFaImpl(const nn::FrozenLayer& base, const LoraFaOptions& options,
             const LayerContext& context);

  std::optional<ops::LoraTerm> linear_term() override;
  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x);
  /// x: [batch, in, size...]; returns [batch, out, size'...].
  at::Tensor forward(const nn::FrozenConv& base, const at::Tensor& x);

  /// W + s B A, summed in fp32 at least and rounded once to W's dtype. Throws for a convolution
  /// with groups > 1.
  at::Tensor merged_weight(const nn::FrozenLinear& base) const;
  at::Tensor merged_weight(const nn::FrozenConv& base) const;

  std::vector<FileTensor> file_tensors() const override;

  /// hB for a gradient of B, in its shape and type.
  at::Tensor projected_gradient(const at::Tensor& gradient);

  /// Replaces the gradients of all B by their projections, where the option asks for it.
  static void before_update(const std::vector<LoraFaImpl*>& adapters, const StepInfo& info);
  static void write_config(const LoraFaOptions& options, nlohmann::json& config);
  static std::string describe(const LoraFaOptions& options);

  at::Tensor lora_A;   ///< [r, in]; Conv: [r, in, kernel...]; a buffer
  at::Tensor lora_B;   ///< [out, r]; Conv: [out, r / groups, 1...]
  const double scale;  ///< s

 private:
  /// (A A^T + 1e-8 I)^-1 / s^2 in fp64, one matrix for each group of a convolution:
  /// [groups, r / groups, r / groups]. Kept until A changes, as it does when values are loaded.
  const at::Tensor& inverse_gram();

  at::Tensor inverse_gram_;
  int64_t inverse_version_ = -1;
};
TORCH_MODULE(LoraFa);

/// The built-in list's entry.
MethodEntry lora_fa_entry();

}  // namespace graft::adapters
