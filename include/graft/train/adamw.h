/// AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) over named parameters, in one pass.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/nn/live_rows.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace graft::train {

/// Tensors with their names, in order.
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// Parameters that share a learning rate and a weight decay.
struct ParameterGroup {
  NamedTensors parameters;    ///< leaves that require a gradient, float32 or float64
  double lr_scale = 1.0;      ///< multiplies the learning rate given to `step`, >= 0
  double weight_decay = 0.0;  ///< lambda, >= 0
  /// Parameters of which a step trains only some rows (or columns: any dimension), by name. Asked
  /// once in every step; the dimension never changes. Such a parameter must be contiguous.
  std::map<std::string, std::function<nn::LiveRows()>> live_rows = {};
};

/// Options of `AdamW`.
struct AdamWOptions {
  double beta1 = 0.9;    ///< decay of the mean of gradients, in [0, 1)
  double beta2 = 0.999;  ///< decay of the mean of squares, in [0, 1)
  double eps = 1e-8;     ///< > 0
  /// Whether a parameter without a gradient is passed over (neither it nor its means change). By
  /// default it is an error: an adapter that gets no gradient trains nothing.
  bool allow_missing_gradients = false;
};

/// With g = grad_scale * gradient, learning rate a = lr * lr_scale, and t counting steps from 1:
///   p <- p (1 - a lambda)
///   m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
///   p <- p - a / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
/// which is PyTorch's order of operations. A parameter with live rows counts t for each row by
/// itself, and a row outside the step's window keeps its value, its means and its t, bit for bit:
/// no weight decay, no momentum. (A gradient of zeros would freeze nothing: AdamW moves such a row
/// by its momentum and shrinks it by the decay.) State goes by name, so that a resumed run may
/// build its modules anew; a run that is saved and resumed gives the same bits as one that was not.
class AdamW {
 public:
  /// Throws graft::Error on an empty list, on a name or a tensor that comes twice, on a tensor that
  /// is not a trainable dense CPU leaf of float32 or float64, and on bad options.
  explicit AdamW(std::vector<ParameterGroup> groups, AdamWOptions options = {});

  /// Updates every parameter from its `.grad()`. grad_scale is the factor of gradient clipping
  /// (`clip_scale`): applied on the way, the stored gradients stay as they are.
  /// Throws, with nothing changed, when gradients are missing, lr or grad_scale are not finite, or
  /// live rows are outside their parameter.
  void step(double lr, double grad_scale = 1.0);

  /// Drops all gradients (`.grad()` becomes undefined).
  void zero_grad();

  /// How many steps were taken.
  int64_t step_count() const { return step_count_; }

  /// All parameters in order, for `grad_norm`.
  std::vector<at::Tensor> parameters() const;

  /// Copies of the state: "step" (int64 scalar), then "<name>.exp_avg" and "<name>.exp_avg_sq", and
  /// for a parameter with live rows "<name>.row_steps" (int64, one a row).
  NamedTensors state_dict() const;

  /// Takes over what `state_dict` gave. Throws, with nothing changed, listing the missing,
  /// unexpected and mis-shaped entries.
  void load_state_dict(const NamedTensors& state);

 private:
  struct Slot {
    std::string name;
    at::Tensor parameter, exp_avg, exp_avg_sq;
    size_t group;
    std::function<nn::LiveRows()> live_rows;  // empty: a step updates the whole parameter
    int64_t dim = 0;                          // of the live rows
    at::Tensor row_steps;                     // t of each row; undefined without live rows
  };

  void add_parameter(const std::string& name, const at::Tensor& parameter, size_t group);
  void add_live_rows(Slot& slot) const;
  nn::LiveRows checked_live_rows(const Slot& slot) const;

  std::vector<ParameterGroup> groups_;
  AdamWOptions options_;
  std::vector<Slot> slots_;
  int64_t step_count_ = 0;
};

}  // namespace graft::train
