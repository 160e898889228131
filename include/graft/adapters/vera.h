/// VeRA, vector-based random matrix adaptation: one frozen random pair for all layers, two trained
/// vectors a layer.
///
///   y = W x + b + p * (B (d * (A drop(x))))
///
/// A [r, k_max] and B [n_max, r] are drawn once for the largest of the adapted layers and frozen; a
/// layer of k inputs and n outputs uses A's first k columns and B's first n rows. d [r] starts at
/// `d_initial`, p [n] at 0, so that the layer starts as the base. There is no alpha.
/// Source: Kopiczko, Blankevoort, Asano 2023, arXiv 2310.11454. Bases, values at the start and file
/// keys are those of Hugging Face PEFT.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/ops/dropout.h>

#include <string>
#include <utility>
#include <vector>

namespace graft::adapters {

class RandomBases;
class VeraImpl;

/// Options of VeRA.
struct VeraOptions {
  using Method = VeraImpl;

  int64_t rank = 256;           ///< r, in [1, 65536]; may exceed min(in, out)
  double dropout = 0.0;         ///< on the branch's input, in [0, 1)
  double d_initial = 0.1;       ///< d at the start; not 0, which would train nothing
  int64_t projection_key = 0;   ///< seed of A and B [projection_prng_key]
  bool save_projection = true;  ///< whether files hold A and B; off, they follow from the seed

  /// Throws unless every option is in its range.
  void validate() const;
};

/// d and p of one layer, and the pair it shares with the others.
class VeraImpl : public AdapterModule<VeraImpl, VeraOptions> {
 public:
  static constexpr const char* kName = "vera";

  /// Makes d and p on the base weight's device, fp32 (fp64 for fp64 bases). Without a shared part
  /// in the context the layer draws a pair for itself.
  VeraImpl(const nn::FrozenLayer& base, const VeraOptions& options, const LayerContext& context);

  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x);
  /// W + diag(p) B diag(d) A, summed in fp32 at least and rounded once to W's dtype.
  at::Tensor merged_weight(const nn::FrozenLinear& base) const;

  std::vector<FileTensor> file_tensors() const override;
  std::vector<FileTensor> shared_file_tensors() const override;

  /// diag(p) B diag(d) A, [out, in].
  at::Tensor delta() const;

  static std::shared_ptr<RandomBases> make_shared_part(
      const VeraOptions& options,
      const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers,
      const LayerContext& context);
  static void write_config(const VeraOptions& options, nlohmann::json& config);
  static std::string describe(const VeraOptions& options);

  at::Tensor lambda_d;  ///< d [r]
  at::Tensor lambda_b;  ///< p [out]
  at::Tensor A;         ///< [r, k_max], the same tensor in every layer
  at::Tensor B;         ///< [n_max, r], the same tensor in every layer

 private:
  at::Tensor sliced_A() const;
  at::Tensor sliced_B() const;

  std::shared_ptr<RandomBases> bases_;
  int64_t in_ = 0;
};
TORCH_MODULE(Vera);

/// The built-in list's entry.
MethodEntry vera_entry();

}  // namespace graft::adapters
