/// LoRA-XS: a small square matrix between two frozen factors of the weight itself.
///
///   y = W x + b + s B R A drop(x),   W = U S V^T,   A = S_r V_r^T,   B = U_r,   s = alpha / r
///
/// A [r, in] and B [out, r] hold the r largest singular triplets of W, so that B A is the best
/// approximation of W of rank r; only R [r, r] is trained, r^2 numbers a layer.
/// LoRA-SB is another start of the same three: with the first step of full training with Adam,
/// dW = -step sign(G) = U S V^T, A = V_r^T, B = U_r and R = S_r / s. The layer then starts at
/// W + [dW]_r, the best approximation of that step of rank r, and not at W.
/// A file stores A and B beside R: another library's decomposition would differ in signs.
///
/// Sources: Balazy et al. 2024, arXiv 2405.17604; Ponkshe et al. 2024, arXiv 2411.19557 (LoRA-SB).
/// PEFT has no such method: peft_type LORA_XS is graft's own.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/ops/dropout.h>

#include <string>
#include <vector>

namespace graft::adapters {

class LoraXsImpl;

/// Options of LoRA-XS.
struct LoraXsOptions {
  using Method = LoraXsImpl;

  int64_t rank = 8;      ///< r, in [1, min(in, out)]
  double alpha = 16.0;   ///< numerator of the scale; not 0
  double dropout = 0.0;  ///< on the branch's input, in [0, 1); not for Embedding
  double r_std = 1e-5;   ///< R starts as N(0, r_std^2); 0: the adapted layer starts as the base
  /// "svd", from the weight; "lora_sb", from the gradient over some batches (Linear alone).
  std::string init = "svd";
  double sb_step = 1e-5;  ///< of lora_sb: the size of the step's entries, > 0

  /// s for the rank in force.
  double scale() const;
  /// Throws unless every option is in its range.
  void validate() const;
};

/// R of one layer, and its frozen factors.
class LoraXsImpl : public AdapterModule<LoraXsImpl, LoraXsOptions> {
 public:
  static constexpr const char* kName = "lora-xs";

  /// Decomposes the base weight, or the step (not where values are about to be loaded), in fp32 or,
  /// for an fp64 base, in fp64. Throws for a rank that the layer cannot carry, a weight that is not
  /// finite, a convolution with groups, and for lora_sb where no gradient was gathered.
  LoraXsImpl(const nn::FrozenLayer& base, const LoraXsOptions& options,
             const LayerContext& context);

  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x);
  /// indices: [...]; returns [..., columns].
  at::Tensor forward(const nn::FrozenEmbedding& base, const at::Tensor& indices);
  /// x: [batch, in, size...]; returns [batch, out, size'...].
  at::Tensor forward(const nn::FrozenConv& base, const at::Tensor& x);

  /// W + s B R A, summed in fp32 at least and rounded once to W's dtype.
  at::Tensor merged_weight(const nn::FrozenLayer& base) const;

  std::vector<FileTensor> file_tensors() const override;

  static void write_config(const LoraXsOptions& options, nlohmann::json& config);
  static std::string describe(const LoraXsOptions& options);

  at::Tensor lora_A;   ///< [r, in]; Embedding: [r, rows]; Conv: [r, in, kernel...]; a buffer
  at::Tensor lora_B;   ///< [out, r]; Embedding: [columns, r]; Conv: [out, r, 1...]; a buffer
  at::Tensor lora_R;   ///< [r, r]
  const double scale;  ///< s

 private:
  /// B R in B's shape, differentiable in R.
  at::Tensor up() const;

  bool embedding_ = false;
};
TORCH_MODULE(LoraXs);

/// The built-in list's entry.
MethodEntry lora_xs_entry();

}  // namespace graft::adapters
