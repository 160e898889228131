/// LoRA-Pro: steps on A and B that move W + s B A as nearly as possible the way full fine-tuning
/// would.
///
/// With G = dL/d(W + s B A) [out, in], gA = s B^T G and gB = s G A^T, a step against hA and hB
/// moves the weight, to first order, against Gt = s (B hA + hB A). The pair nearest to G in the
/// Frobenius norm is
///   hA = 1/s^2 (B^T B)^-1 gA + X A
///   hB = 1/s^2 (I - B (B^T B)^-1 B^T) gB (A A^T)^-1 - B X
/// for any X [r, r]; all of them have Gt = G - (I - P_B) G (I - P_A), with the projections on B's
/// columns and A's rows. X is the one with the least |hA - gA|^2 + |hB - gB|^2:
///   (B^T B) X + X (A A^T) = -1/s^2 (B^T B)^-1 gA A^T
/// G itself is never needed. Both Gram matrices are damped: d * trace / r is added to their
/// diagonals; the inverse of a zero matrix (B at the start) counts as zero, so that the first step
/// of a new LoRA has hA = 0 and Gt = G P_A.
///
/// Source: Wang et al. 2024, arXiv 2407.18242. Where the released code differs from the formulas:
/// docs/methods/lora_pro.md.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/attach/attach.h>
#include <graft/train/adamw.h>

#include <cstdint>
#include <string>
#include <vector>

namespace graft::train {

/// The factors of one layer, whose weight acts as W + scale * B A.
struct LoraPair {
  std::string name;    ///< "layers.3.q_proj"
  at::Tensor A;        ///< [r, in] or [r, in, kernel...]
  at::Tensor B;        ///< [out, r] or [out, r, 1...]
  double scale = 1.0;  ///< s, finite and not 0
};

/// The LoRA layers of an adapter. Throws when it trains anything but A and B of plain LoRA layers
/// (another method, a lora bias, biases, modules_to_save), for LoRA+ (lr_ratio: LoRA-Pro chooses
/// both lengths itself) and for convolutions with groups.
std::vector<LoraPair> lora_pairs(const AttachedAdapter& adapter);

/// What one pair is moved against, in float64: A [r, in], B [out, r]; and the X they hold.
struct LoraProDirection {
  at::Tensor A;  ///< hA
  at::Tensor B;  ///< hB
  at::Tensor X;  ///< [r, r]
};

/// hA and hB for the gradients of A and B, all of them matrices. `damping` is d.
LoraProDirection lora_pro_direction(const at::Tensor& A, const at::Tensor& B,
                                    const at::Tensor& grad_A, const at::Tensor& grad_B,
                                    double scale, double damping);

/// What the optimiser does with the equivalent gradient Gt.
enum class LoraProForm {
  sgd,    ///< A <- A - lr hA, B <- B - lr hB
  adamw,  ///< Gt goes through Adam's means, and the pair nearest to the result is the step
};

/// Options of `LoraPro`.
struct LoraProOptions {
  LoraProForm form = LoraProForm::adamw;
  double beta1 = 0.9;         ///< decay of the mean of Gt, in [0, 1)
  double beta2 = 0.999;       ///< decay of the mean of squares, in [0, 1)
  double eps = 1e-8;          ///< > 0
  double weight_decay = 0.0;  ///< lambda >= 0: each step multiplies B A by 1 - lr lambda
  double damping = 1e-8;      ///< d, in (0, 1)

  /// Throws unless every option is in its range.
  void validate() const;
};

/// The optimiser. With t counting steps from 1, the AdamW form is, for each pair,
///   M <- beta1 M + (1 - beta1) Gt             V <- beta2 V + (1 - beta2) Gt^2     both [out, in]
///   D = M / (1 - beta1^t) / (sqrt(V / (1 - beta2^t)) + eps)
///   A, B <- sqrt(1 - lr lambda) A, B, minus lr times hA, hB of D: gA = s B^T D, gB = s D A^T
/// M and V have A's type and the size of the layer's weight; what is between them is float64. State
/// goes by name; a run that is saved and resumed gives the same bits as one that was not.
class LoraPro {
 public:
  /// Throws graft::Error on an empty list, on a name or a tensor that comes twice, on factors that
  /// are not trainable CPU leaves of one type (float32 or float64) or do not fit each other, and on
  /// bad options.
  explicit LoraPro(std::vector<LoraPair> pairs, LoraProOptions options = {});

  /// Updates every pair from its `.grad()`. grad_scale is the factor of gradient clipping
  /// (`clip_scale` of `grad_norm`); the stored gradients stay as they are. Throws, with nothing
  /// changed, when gradients are missing, factors or gradients are not finite, lr or grad_scale are
  /// not finite, or lr * weight_decay >= 1.
  void step(double lr, double grad_scale = 1.0);

  /// The Euclidean norm of all pairs' Gt together, which clipping is to go by: the norm of gA and
  /// gB says little of it, being near 0 where B is. Throws as `step` does.
  double grad_norm() const;

  /// Drops all gradients (`.grad()` becomes undefined).
  void zero_grad();

  /// How many steps were taken.
  int64_t step_count() const { return step_count_; }

  /// All factors: A, B, A, B...
  std::vector<at::Tensor> parameters() const;

  /// Copies of the state: "step" (int64 scalar) and, in the AdamW form, "<name>.exp_avg" and
  /// "<name>.exp_avg_sq" [out, in (* kernel)].
  NamedTensors state_dict() const;

  /// Takes over what `state_dict` gave. Throws, with nothing changed, listing the missing,
  /// unexpected and mis-shaped entries.
  void load_state_dict(const NamedTensors& state);

 private:
  struct Slot {
    LoraPair pair;
    at::Tensor exp_avg, exp_avg_sq;  // undefined in the SGD form
  };

  void add_pair(LoraPair pair);
  void check_gradients() const;
  NamedTensors means() const;

  std::vector<Slot> slots_;
  LoraProOptions options_;
  int64_t step_count_ = 0;
};

}  // namespace graft::train
