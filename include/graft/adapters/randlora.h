/// RandLoRA, a full-rank update as a learned combination of frozen random low-rank bases.
///
///   y = W x + b + s dW drop(x),   dW = D where out >= in, else D^T
///   D = sum over b < N of B_b diag(lambda_b) A diag(gamma_b)   [q, p]
///
/// p = min(out, in), q = max(out, in), N = ceil(p / r): a larger r trains fewer numbers, N (r + p)
/// a layer. The bases A [r, p_max] and B_b [q_max, r] are drawn once for the largest of the adapted
/// layers, frozen, of unit standard deviation, and sliced to each layer. lambda [r, N] starts at 0,
/// so that the layer starts as the base, gamma [N, p] at 1 / max(N, p).
/// Source: Albert et al. 2025, arXiv 2502.00987. PEFT and the authors' code flatten the two factors
/// in different orders, so that their D pairs other columns and rows than the sum above; that
/// pairing, the scale alpha / r, the bases and the file keys of Hugging Face PEFT are the default.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/ops/rand_lora_linear.h>

#include <string>
#include <utility>
#include <vector>

namespace graft::adapters {

class RandLoraImpl;
class RandomBases;

/// How RandLoRA's bases are drawn.
enum class RandLoraBases {
  dense,       ///< uniform
  sparse,      ///< -1, 0, 1 with chances 1/6, 2/3, 1/6
  very_sparse  ///< -1 and 1 with chance 1 / (2 sqrt(p_max)) each
};

/// What alpha is divided by.
enum class RandLoraScaling {
  peft,  ///< s = alpha / r
  paper  ///< s = alpha / (r sqrt(N)), the authors' code
};

/// Options of RandLoRA.
struct RandLoraOptions {
  using Method = RandLoraImpl;

  int64_t rank = 32;     ///< r, in [1, 65536]
  double alpha = 640.0;  ///< numerator of the scale; not 0, which would switch the adapter off
  double dropout = 0.0;  ///< on the branch's input, in [0, 1)
  RandLoraBases bases = RandLoraBases::dense;                 ///< [sparse, very_sparse]
  ops::RandLoraPairing pairing = ops::RandLoraPairing::peft;  ///< which columns meet which rows
  RandLoraScaling scaling = RandLoraScaling::peft;            ///< what alpha is divided by
  int64_t projection_key = 0;   ///< seed of the bases [projection_prng_key]
  bool save_projection = true;  ///< whether files hold the bases; off, they follow from the seed

  /// Throws unless every option is in its range.
  void validate() const;
};

/// lambda and gamma of one layer, and the bases it shares with the others.
class RandLoraImpl : public AdapterModule<RandLoraImpl, RandLoraOptions> {
 public:
  static constexpr const char* kName = "randlora";

  /// Makes lambda and gamma on the base weight's device, fp32 (fp64 for fp64 bases). Without a
  /// shared part in the context the layer draws bases for itself.
  RandLoraImpl(const nn::FrozenLayer& base, const RandLoraOptions& options,
               const LayerContext& context);

  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x);
  /// W + s dW, summed in fp32 at least and rounded once to W's dtype.
  at::Tensor merged_weight(const nn::FrozenLinear& base) const;

  std::vector<FileTensor> file_tensors() const override;
  std::vector<FileTensor> shared_file_tensors() const override;

  /// s dW, [out, in].
  at::Tensor delta() const;
  /// N.
  int64_t bases() const { return lambda.size(1); }

  static std::shared_ptr<RandomBases> make_shared_part(
      const RandLoraOptions& options,
      const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers,
      const LayerContext& context);
  static void write_config(const RandLoraOptions& options, nlohmann::json& config);
  static std::string describe(const RandLoraOptions& options);

  at::Tensor lambda;  ///< [r, N]
  at::Tensor gamma;   ///< [N, p]
  at::Tensor A;       ///< [r, 1, p_max], the same tensor in every layer
  at::Tensor B;       ///< [q_max, N_max, r], the same tensor in every layer

 private:
  ops::RandLoraTerm term() const;

  std::shared_ptr<RandomBases> bases_;
  int64_t out_ = 0, in_ = 0;
  double scale_ = 1.0;
};
TORCH_MODULE(RandLora);

/// The built-in list's entry.
MethodEntry randlora_entry();

/// The same method under the name "randlora-paper": the pairing of the paper and the authors' scale
/// are its defaults. Files with either, or with an alpha_pattern, carry the peft_type
/// GRAFT_RANDLORA, because PEFT would read other numbers out of them.
MethodEntry randlora_paper_entry();

}  // namespace graft::adapters
