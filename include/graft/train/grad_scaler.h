/// Loss scaling for fp16: gradients that would underflow are kept in range by a factor on the loss.
///
/// The scale S multiplies the loss, 1/S the gradients before the update. A step whose gradients are
/// not all finite is skipped and S is multiplied by `backoff`; after `interval` finite steps in a
/// row S is multiplied by `growth` (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).
///
///   const double scale = scaler.scale();
///   (scale * loss).backward();
///   if (scaler.update(std::isfinite(grad_norm(parameters)))) optimizer.step(lr, 1 / scale);
///
/// A loss whose gradients are formed in its forward pass takes the scale there:
/// ops/linear_cross_entropy.h.
#pragma once

#include <cstdint>

namespace graft::train {

struct GradScalerOptions {
  double initial = 65536.0;  ///< S at the start, > 0
  double growth = 2.0;       ///< > 1
  double backoff = 0.5;      ///< in (0, 1)
  int64_t interval = 2000;   ///< finite steps before S grows, >= 1
  double least = 1.0;        ///< S never falls below, in (0, initial]
};

class GradScaler {
 public:
  /// Throws unless every option is in its range.
  explicit GradScaler(const GradScalerOptions& options = {});

  /// S of the next step.
  double scale() const { return scale_; }
  /// Whether a step that is not finite leaves a smaller scale to try.
  bool can_fall() const { return scale_ > options_.least; }
  /// Finite steps since the scale last changed.
  int64_t finite_steps() const { return finite_steps_; }
  int64_t skipped() const { return skipped_; }

  /// Takes note of a step's gradients, finite or not; returns whether the step is to be made.
  bool update(bool finite);

  /// As a checkpoint keeps it; throws for a scale that is not positive and finite, and for negative
  /// counts.
  void restore(double scale, int64_t finite_steps, int64_t skipped);

 private:
  GradScalerOptions options_;
  double scale_;
  int64_t finite_steps_ = 0, skipped_ = 0;
};

}  // namespace graft::train
