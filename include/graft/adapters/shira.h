/// SHiRA, sparse high-rank adapters: a few entries of the weight itself are trained.
///
///   y = x (W + s S)^T + b,   S zero but for K = r (in + out) fixed entries
///
/// Only the entries' values are trained, as many numbers as LoRA of rank r trains; the update's
/// rank is not bounded by r. The positions are drawn once and stored in files. s is 1 in training.
///
/// Source: Bhardwaj et al. 2024, arXiv 2406.13175. Positions of a given seed, values at the start
/// and file keys are those of Hugging Face PEFT.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/nn/checks_file_tensors.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace graft::adapters {

class ShiraImpl;

/// Options of SHiRA.
struct ShiraOptions {
  using Method = ShiraImpl;

  int64_t rank = 32;  ///< r, at least 1 with r (in + out) <= in * out
  /// Which entries are trained [mask_type]: "random", or "magnitude", the largest of |W| (the
  /// paper's SHiRA-WM). Files may name any other: their positions say all.
  std::string mask = "random";
  /// Seed of random positions, the same for every layer as in PEFT; none: each layer has its own
  /// positions, from the run's seed.
  std::optional<int64_t> random_seed = std::nullopt;
  bool init_zero =
      true;  ///< values start at 0; off: N(0, 1), no identity, for tests [init_weights]

  /// Throws unless every option is in its range.
  void validate() const;
};

/// The trained entries of one layer.
class ShiraImpl : public AdapterModule<ShiraImpl, ShiraOptions>, public nn::ChecksFileTensors {
 public:
  static constexpr const char* kName = "shira";

  /// Chooses the positions (not where values are about to be loaded) and makes the values on the
  /// base weight's device, fp32 (fp64 for an fp64 base). Throws for more entries than the weight
  /// has and an unknown mask. Random positions take 8 in * out bytes while they are drawn.
  ShiraImpl(const nn::FrozenLayer& base, const ShiraOptions& options, const LayerContext& context);

  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x);
  /// W + s S, summed in fp32 at least and rounded once to W's dtype.
  at::Tensor merged_weight(const nn::FrozenLinear& base) const;

  std::vector<FileTensor> file_tensors() const override;
  /// Throws unless a file's positions are whole numbers inside of the weight.
  void check_file_tensor(std::string_view suffix, const at::Tensor& values) const override;

  static void write_config(const ShiraOptions& options, nlohmann::json& config);
  static std::string describe(const ShiraOptions& options);

  at::Tensor shira_weight;   ///< v [K]
  at::Tensor shira_indices;  ///< int32 [2, K], rows then columns of W; a buffer
  double scale = 1.0;        ///< s; another value weighs a trained adapter, 0 gives the base

 private:
  // The positions for the operation; int32 again where a conversion of the module changed them.
  at::Tensor positions() const;

  int64_t out_, in_;
};
TORCH_MODULE(Shira);

/// The built-in list's entry.
MethodEntry shira_entry();

}  // namespace graft::adapters
