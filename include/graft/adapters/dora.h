/// DoRA, weight-decomposed low-rank adaptation: a trained length for each output, and LoRA for the
/// direction.
///
///   Linear:     y = b + c * (x W^T + s drop(x) A^T B^T)
///   Embedding:  y = c * (W[i] + s B A[:, i])
///   ConvNd:     y = b + c * (W * x + s B * (A * drop(x)))
///
/// c = m / n with n = ||W + s B A||, one norm for each output (column of an Embedding, kernel of a
/// convolution), taken as a constant by the gradients; c = 1 where n is 0, so that a row of zeros
/// can begin to learn. At the start m = n, hence c = 1 exactly.
/// Sources: Liu et al. 2024, arXiv 2402.09353; file keys and the Embedding and Conv forms are those
/// of Hugging Face PEFT.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/ops/dropout.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace graft::adapters {

class DoraImpl;

/// Options of DoRA: those of LoRA without its bias.
struct DoraOptions {
  using Method = DoraImpl;

  int64_t rank = 8;      ///< r, in [1, min(in, out)]
  double alpha = 16.0;   ///< numerator of the scale; not 0
  double dropout = 0.0;  ///< in [0, 1); not for Embedding
  /// Off: dropout acts on the low-rank branch, as in LoRA. On: PEFT's form,
  /// y = b + x W^T + (c - 1) * (drop(x) W^T) + c * s drop(x) A^T B^T, which multiplies by W twice
  /// while training with dropout and is the same otherwise. [dora_dropout_on_base, graft's own key]
  bool dropout_on_base = false;
  bool rslora = false;           ///< s = alpha / sqrt(r)
  std::string init = "kaiming";  ///< how A and B start (init/initialiser.h)
  /// LoRA+: the learning rate of B and m over that of A; not saved. [loraplus_lr_ratio]
  double lr_ratio = 1.0;

  /// s for the rank in force.
  double scale() const;
  /// Throws unless every option is in its range.
  void validate() const;
};

/// A value computed from tensors and kept until one of them is replaced or changed in place.
class TensorMemo {
 public:
  /// The kept value where every tensor is the one that it was computed from, with the same version;
  /// else `compute()`, kept from now on. Safe to call from several threads.
  at::Tensor get(const std::vector<at::Tensor>& tensors,
                 const std::function<at::Tensor()>& compute) const;

 private:
  struct State;
  std::shared_ptr<State> state_ = make_state();
  static std::shared_ptr<State> make_state();
};

/// A, B and m of one layer.
class DoraImpl : public AdapterModule<DoraImpl, DoraOptions> {
 public:
  static constexpr const char* kName = "dora";

  /// Makes A, B and m on the base weight's device, fp32 (fp64 for an fp64 base). Throws for a rank
  /// that the layer cannot carry, an unknown initialiser, and dropout on an Embedding.
  DoraImpl(const nn::FrozenLayer& base, const DoraOptions& options, const LayerContext& context);

  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x);
  /// indices: [...]; returns [..., columns].
  at::Tensor forward(const nn::FrozenEmbedding& base, const at::Tensor& indices);
  /// x: [batch, in, size...]; returns [batch, out, size'...].
  at::Tensor forward(const nn::FrozenConv& base, const at::Tensor& x);

  /// c * (W + s B A), in fp32 at least and rounded once to W's dtype. Throws for a convolution with
  /// groups > 1: B A then mixes channels that the base's kernel keeps apart.
  at::Tensor merged_weight(const nn::FrozenLayer& base) const;

  /// n [out]: computed once for each state of W, A and B. A convolution with groups has the norm of
  /// the dense kernel that B A and the base's blocks add up to.
  at::Tensor norm(const nn::FrozenLayer& base) const;

  std::vector<FileTensor> file_tensors() const override;

  static void write_config(const DoraOptions& options, nlohmann::json& config);
  static ParameterRule rule(const DoraOptions& options, std::string_view parameter);
  static std::string describe(const DoraOptions& options);

  at::Tensor lora_A;  ///< [r, in]; Embedding: [r, rows]; Conv: [r, in, kernel...]
  at::Tensor lora_B;  ///< [out, r]; Embedding: [columns, r]; Conv: [out, r / groups, 1...]
  at::Tensor lora_magnitude_vector;  ///< m [out]; Conv: [1, out, 1...]
  const double scale;                ///< s

 private:
  /// c, one number an output, differentiable in m.
  at::Tensor output_scale(const nn::FrozenLayer& base) const;

  bool embedding_ = false;
  TensorMemo squares_;  // of W's rows
  TensorMemo norm_;
};
TORCH_MODULE(Dora);

/// The built-in list's entry.
MethodEntry dora_entry();

}  // namespace graft::adapters
