/// LoRA, low-rank adaptation, and its rank-stabilised scale.
///
///   Linear:     y = W x + b + s (B drop(A x) + c)
///   Embedding:  y = W[i] + s B A[:, i]
///   ConvNd:     y = W * x + b + s B * (A * drop(x))      A with the base's geometry, B with a
///   kernel of one
///
/// s = alpha / r, or alpha / sqrt(r) with `rslora`. With an initialiser that takes a part of W into
/// the factors (PiSSA, OLoRA, LoRA-GA, CorDA) B A becomes B A - B0 A0, where A0 and B0 are the
/// values at the start: the model starts as it was, W is never written to, and what is saved is the
/// plain LoRA of rank 2r with the factors [A - A0; A0] and [B, B - B0].
/// Sources: Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732 (rsLoRA). Values
/// at the start, file keys and the Embedding and Conv forms are those of Hugging Face PEFT.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/ops/dropout.h>

#include <string>
#include <vector>

namespace graft::adapters {

class LoraImpl;

/// Options of LoRA.
struct LoraOptions {
  using Method = LoraImpl;

  int64_t rank = 8;      ///< r, in [1, min(in, out)]
  double alpha = 16.0;   ///< numerator of the scale; not 0, which would switch the adapter off
  double dropout = 0.0;  ///< on the low-rank branch's input, in [0, 1); not for Embedding
  bool rslora = false;   ///< s = alpha / sqrt(r)
  bool bias = false;     ///< c, a trained bias on B; not for Embedding
  /// How A and B start (init/initialiser.h): "kaiming", "gaussian", "orthogonal", "pissa", "olora",
  /// "lora_ga", "corda", "eva". Those that take a part of W exclude dropout and a lora bias.
  std::string init = "kaiming";
  init::StartOptions start = {};  ///< what the initialiser is told
  /// LoRA+ (Hayou et al. 2024, arXiv 2402.12354): the learning rate of B over that of A. It speaks
  /// to the optimiser and is not saved. [loraplus_lr_ratio]
  double lr_ratio = 1.0;

  /// s for the rank in force.
  double scale() const;
  /// Throws unless every option is in its range.
  void validate() const;
};

/// A and B of one layer.
class LoraImpl : public AdapterModule<LoraImpl, LoraOptions> {
 public:
  static constexpr const char* kName = "lora";

  /// Makes A and B on the base weight's device, fp32 (fp64 for an fp64 base). Throws for a rank
  /// that the layer cannot carry, an unknown initialiser, and dropout or bias on an Embedding.
  LoraImpl(const nn::FrozenLayer& base, const LoraOptions& options, const LayerContext& context);

  std::optional<ops::LoraTerm> linear_term() override;
  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x);
  /// indices: [...]; returns [..., columns].
  at::Tensor forward(const nn::FrozenEmbedding& base, const at::Tensor& indices);
  /// x: [batch, in, size...]; returns [batch, out, size'...].
  at::Tensor forward(const nn::FrozenConv& base, const at::Tensor& x);

  /// W + s B A, summed in fp32 at least and rounded once to W's dtype. Throws for a convolution
  /// with groups > 1: B A then mixes channels that the base's kernel keeps apart.
  at::Tensor merged_weight(const nn::FrozenLayer& base) const;
  /// b + s c; throws for a lora bias on a layer without a bias.
  at::Tensor merged_bias(const nn::FrozenLayer& base) const;

  /// With A0 and B0: copies of the rank-2r factors, which give A and B0 back up to a rounding.
  std::vector<FileTensor> file_tensors() const override;
  void take_file_tensors(const std::vector<FileTensor>& values) override;
  /// With A0 and B0: A and B0, to the bit.
  std::vector<FileTensor> state_tensors() override;
  std::vector<FileTensor> trained_file_tensors() const override;

  /// s B A as a dense matrix: [out, in] (Linear), [columns, rows] (Embedding), [out, in * kernel]
  /// (Conv).
  at::Tensor delta() const;

  static void write_config(const LoraOptions& options, nlohmann::json& config);
  static ParameterRule rule(const LoraOptions& options, std::string_view parameter);
  static std::string describe(const LoraOptions& options);

  at::Tensor lora_A;     ///< [r, in]; Embedding: [r, rows]; Conv: [r, in, kernel...]
  at::Tensor lora_B;     ///< [out, r]; Embedding: [columns, r]; Conv: [out, r / groups, 1...]
  at::Tensor lora_bias;  ///< c [out], or undefined
  at::Tensor start_A;    ///< A0, or undefined where W keeps all of itself
  at::Tensor start_B;    ///< B0
  const double scale;    ///< s

 private:
  // [A - A0; A0] and [B, B - B0], or A and B.
  std::pair<at::Tensor, at::Tensor> factors() const;

  bool embedding_ = false;
};
TORCH_MODULE(Lora);

/// The recipe for a folder of PEFT's that counts on its start being found again: a start by PiSSA
/// has the roundings of PEFT's decomposition then. Other recipes are returned as they are.
std::shared_ptr<const Recipe> found_again_as_peft(std::shared_ptr<const Recipe> recipe);

/// The built-in list's entry.
MethodEntry lora_entry();

}  // namespace graft::adapters
