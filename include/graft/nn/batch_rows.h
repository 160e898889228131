/// Which rows of a batch belong to which adapter.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace graft::nn {

/// A run of a batch's sequences that one adapter works on.
struct BatchPart {
  std::string adapter;    ///< its name; empty: the plain base
  int64_t sequences = 0;  ///< how many; >= 1
};

/// A batch in parts, in order.
using BatchParts = std::vector<BatchPart>;

/// While it lives, graft's layers on the thread that made it take their input in these parts, along
/// the leading dimension: on each part its adapter runs alone, as it would on a batch of its own.
/// Parts are sliced and put side by side, never masked: what is in one part (NaN, say) reaches no
/// other, neither forward nor backward, and each part's rows, dropout masks and gradients are those
/// of a run of its own. That holds for a frozen layer without adapters too, whose product may be
/// rounded differently for another number of rows. A layer that lacks a part's adapter is the plain
/// base there. Scopes nest; the innermost counts.
///
/// An input whose leading dimension is not the parts' sum is an error, so every adaptable layer
/// must see the batch first: [sequences, ...]. train::checkpoint opens the scope again in backward.
/// Source: Ye et al. 2023 (BatchLoRA), arXiv 2312.02515. `AttachedAdapter::batch_rows` makes one
/// with its names checked.
class BatchRows {
 public:
  /// Throws for no part, a part without sequences, and an adapter that has two parts. Null: none.
  explicit BatchRows(std::shared_ptr<const BatchParts> parts);
  explicit BatchRows(BatchParts parts);
  ~BatchRows();
  BatchRows(const BatchRows&) = delete;
  BatchRows& operator=(const BatchRows&) = delete;

  /// The parts in force on this thread, or null.
  static const std::shared_ptr<const BatchParts>& current();

 private:
  std::shared_ptr<const BatchParts> previous_;
};

/// What `run` returns for each part's rows of x, side by side. Throws when the parts do not make up
/// x's leading dimension.
at::Tensor run_parts(
    const BatchParts& parts, const at::Tensor& x,
    const std::function<at::Tensor(const BatchPart& part, const at::Tensor& rows)>& run);

}  // namespace graft::nn
