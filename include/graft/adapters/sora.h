/// SoRA: LoRA with a gate on its hidden units that a proximal step drives to exact zeros.
///
///   Linear:     y = W x + b + s B (g * (A drop(x)))
///   Embedding:  y = W[i] + s B (g * A[:, i])
///   ConvNd:     y = W * x + b + s B * (g * (A * drop(x)))     A with the base's geometry, B with a
///   kernel of one
///
/// s = alpha / r of the rank at the start, whatever is pruned later; g ~ N(0, 1) at the start and
/// trained without weight decay. After each optimiser step the gate goes through a threshold xi:
///   proximal  g <- sign(g) max(|g| - xi, 0)   xi = lr * sparse_lambda   the l1 norm's proximal
///   step constant  g <- sign(g) max(|g| - xi, 0)   xi = sparse_lambda released  |g| > xi: |g| -
///   xi; then every |g| < xi becomes 0          xi = sparse_lambda
/// "released" is what the authors' code does, for reproduction: it also clears xi < |g| < 2 xi.
/// Units whose gate is 0 can be cut without changing the output (`adapter prune`).
/// Source: Ding et al. 2023, arXiv 2311.11696. PEFT does not have the method.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/ops/dropout.h>

#include <string>
#include <vector>

namespace graft::adapters {

class SoraImpl;

/// Options of SoRA.
struct SoraOptions {
  using Method = SoraImpl;

  int64_t rank = 8;      ///< r, in [1, min(in, out)]
  double alpha = 16.0;   ///< numerator of the scale; not 0
  double dropout = 0.0;  ///< on the low-rank branch's input, in [0, 1); not for Embedding
  /// How A and B start (init/initialiser.h): "kaiming", "gaussian", "orthogonal".
  std::string init = "kaiming";
  std::string threshold = "proximal";  ///< "proximal", "constant" or "released", see above
  /// The strength: lambda of "proximal", xi of the others; >= 0. The default is the authors' xi
  /// over their learning rate, 3e-4 / 8e-4.
  double sparse_lambda = 0.375;
  /// How the strength goes from sparse_lambda to sparse_lambda_end over the run, in sparse_stages
  /// equal parts: "constant", "linear", "log_linear" (equal steps of exp) or "exp_linear" (equal
  /// factors).
  std::string sparse_schedule = "constant";
  double sparse_lambda_end = 0.0;  ///< strength of the last stage; at least sparse_lambda
  int64_t sparse_stages = 7;       ///< in [2, 1000000]
  double l1_penalty = 0.0;  ///< weight of mean |g|, over all gates, in the loss (authors' code)

  /// s for the rank in force.
  double scale() const { return alpha / static_cast<double>(rank); }
  /// The strength in that step of a run; throws for a schedule in a run of unknown length.
  double strength(int64_t step, int64_t total_steps) const;
  /// The threshold xi of that step.
  double xi(const StepInfo& info) const;
  /// Throws unless every option is in its range.
  void validate() const;
};

/// sign(v) max(|v| - xi, 0): the z that minimises (z - v)^2 / 2 + xi |z|. xi >= 0.
at::Tensor soft_threshold(const at::Tensor& v, double xi);

/// The authors' threshold: |v| > xi shrinks by xi, then what lies below xi becomes 0. Unlike the
/// soft threshold it clears xi < |v| < 2 xi and leaves |v| = xi as it is.
at::Tensor released_threshold(const at::Tensor& v, double xi);

/// A, B and the gate of one layer.
class SoraImpl : public AdapterModule<SoraImpl, SoraOptions> {
 public:
  static constexpr const char* kName = "sora";

  /// Makes A, B and g on the base weight's device, fp32 (fp64 for an fp64 base). Throws for a rank
  /// that the layer cannot carry, an unknown initialiser, and dropout on an Embedding.
  SoraImpl(const nn::FrozenLayer& base, const SoraOptions& options, const LayerContext& context);

  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x);
  /// indices: [...]; returns [..., columns].
  at::Tensor forward(const nn::FrozenEmbedding& base, const at::Tensor& indices);
  /// x: [batch, in, size...]; returns [batch, out, size'...].
  at::Tensor forward(const nn::FrozenConv& base, const at::Tensor& x);

  /// W + s B diag(g) A, rounded once to W's dtype. Throws for a convolution with groups > 1.
  at::Tensor merged_weight(const nn::FrozenLayer& base) const;

  std::vector<FileTensor> file_tensors() const override;

  /// How many gates are not 0.
  int64_t active_rank() const;

  /// l1_penalty * mean |g|; undefined when the weight is 0.
  static at::Tensor penalty(const std::vector<SoraImpl*>& layers);
  /// The threshold on every gate.
  static void end_step(const std::vector<SoraImpl*>& layers, const StepInfo& info);
  /// "active_rank": mean over the layers; "sparsity": share of the gates that are 0.
  static Figures figures(const std::vector<SoraImpl*>& layers);
  /// The gate takes no weight decay.
  static ParameterRule rule(const SoraOptions& options, std::string_view parameter);
  static void write_config(const SoraOptions& options, nlohmann::json& config);
  static std::string describe(const SoraOptions& options);

  at::Tensor lora_A;     ///< [r, in]; Embedding: [r, rows]; Conv: [r, in, kernel...]
  at::Tensor lora_B;     ///< [out, r]; Embedding: [columns, r]; Conv: [out, r / groups, 1...]
  at::Tensor lora_gate;  ///< g [r]
  const double scale;    ///< s

 private:
  // A with its rows multiplied by the gate.
  at::Tensor gated_A() const;

  bool embedding_ = false;
};
TORCH_MODULE(Sora);

/// The built-in list's entry.
MethodEntry sora_entry();

}  // namespace graft::adapters
