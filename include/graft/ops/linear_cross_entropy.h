/// Vocabulary head and cross entropy in one, without the [tokens, vocabulary] matrix of logits.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace graft::ops {

/// What the sum of the rows' losses is divided by: the number of counted rows, or nothing.
enum class LossReduction { mean, sum };

/// Options of `linear_cross_entropy`.
struct LinearCrossEntropyOptions {
  int64_t ignore_index = -100;  ///< rows with this target cost nothing and count for nothing
  LossReduction reduction = LossReduction::mean;
  /// Divides the sum by this number instead, whatever `reduction` says: the count of targets over
  /// all micro-batches of a step makes their gradients add up to the ones of the whole batch. > 0
  std::optional<double> normalizer = std::nullopt;
  /// On a device, read nothing on the host: ignored rows go through the products as well, and a
  /// target out of range gives NaN instead of an error. Needs targets on the device, and a
  /// normalizer or a sum. For passes that a graph repeats (train/pass_graph.h).
  bool without_waiting = false;
  int64_t chunk_rows = 0;  ///< rows whose logits exist at once; 0: as many as `logits_bytes` allows
  int64_t logits_bytes = int64_t{64} << 20;  ///< memory for logits when chunk_rows is 0
};

/// A trained low-rank part of the head: logits += hidden weight^T. Undefined tensors: none.
struct LowRankLogits {
  at::Tensor hidden;  ///< [n, r]
  at::Tensor weight;  ///< [V, r]
};

/// sum_i (logsumexp(z_i) - z_i[target_i]) / normalizer,   z = hidden weight^T (+ the low-rank
/// part).
///
/// hidden: [n, k] float32, float64, bfloat16 or float16; weight: [V, k], frozen (one that requires
/// a gradient is refused); targets: [n] int64, in [0, V) or ignore_index. Returns a scalar, float32
/// (float64 for float64); products run in hidden's dtype, everything else in the scalar's.
///
/// Differentiable once, in hidden and in the low-rank part's two tensors. Works on chunks of rows;
/// the gradients are formed in the forward pass, and only when one is required:
///   d hidden = (softmax(z) - onehot) weight / normalizer.
/// They are rounded to hidden's dtype there, so a loss scale for float16 (train/grad_scaler.h)
/// belongs into the normalizer, which it divides: a factor on the loss would come too late.
/// Ignored rows are left out of every product. Sums have a fixed order, so that the number of
/// threads does not show in the result as long as it does not in the matrix products'.
///
/// Throws graft::Error on a target out of range and, for a mean without normalizer, when no target
/// is counted (PyTorch answers NaN there).
at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& targets,
                                const LinearCrossEntropyOptions& options = {},
                                const LowRankLogits& low_rank = {});

}  // namespace graft::ops
