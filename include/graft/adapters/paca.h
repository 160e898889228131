/// PaCA, partial connection adaptation: some input columns of the weight itself are trained.
///
///   y = x W^T + b + s x[:, c] D^T,   s = alpha / r
///
/// c holds r distinct random input features, D [out, r] is the change of those columns of W. The
/// backward pass needs x[:, c] alone, so the layer keeps r numbers a token where LoRA keeps in + r.
/// Same as LoRA with A's rows frozen at unit vectors.
///
/// Source: Woo et al. 2025, arXiv 2503.01905. PEFT has no such method: peft_type PACA is graft's
/// own.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/nn/checks_file_tensors.h>

#include <string>
#include <string_view>
#include <vector>

namespace graft::adapters {

class PacaImpl;

/// Options of PaCA.
struct PacaOptions {
  using Method = PacaImpl;

  int64_t rank = 8;    ///< r, how many columns, in [1, in]
  double alpha = 8.0;  ///< numerator of the scale; not 0 [paca_alpha]

  /// s for the rank in force.
  double scale() const;
  /// Throws unless every option is in its range.
  void validate() const;
};

/// The trained columns of one layer.
class PacaImpl : public AdapterModule<PacaImpl, PacaOptions>, public nn::ChecksFileTensors {
 public:
  static constexpr const char* kName = "paca";

  /// Draws the columns (not where values are about to be loaded): the same on every platform. D
  /// starts at 0, on the base weight's device, fp32 (fp64 for an fp64 base). Throws for more
  /// columns than the layer has inputs.
  PacaImpl(const nn::FrozenLayer& base, const PacaOptions& options, const LayerContext& context);

  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x);
  /// W + s D in the columns c, summed in fp32 at least and rounded once to W's dtype.
  at::Tensor merged_weight(const nn::FrozenLinear& base) const;

  std::vector<FileTensor> file_tensors() const override;
  /// Throws unless a file's columns are inputs of this layer, and its number of inputs is the
  /// layer's.
  void check_file_tensor(std::string_view suffix, const at::Tensor& values) const override;

  static void write_config(const PacaOptions& options, nlohmann::json& config);
  static std::string describe(const PacaOptions& options);

  at::Tensor paca_weight;       ///< D [out, r]
  at::Tensor paca_indices;      ///< c, int32 [r], ascending; a buffer
  at::Tensor paca_in_features;  ///< in, int32 [1]; a buffer: D and c do not tell it
  const double scale;           ///< s

 private:
  // The columns for the operation; int32 again where a conversion of the module changed them.
  at::Tensor columns() const;

  int64_t in_;
};
TORCH_MODULE(Paca);

/// The built-in list's entry.
MethodEntry paca_entry();

}  // namespace graft::adapters
