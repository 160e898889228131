/// Dropout whose mask is a function of a key and of each element's position: never stored,
/// regenerated in backward.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/core/random.h>

#include <cstdint>

namespace graft::ops {

/// y = x * mask / (1 - p). Element (row, column) of the [rows, columns] view of x, columns being
/// the last dimension, is kept when its 16 random bits are at least `threshold()`. The bits are
/// half-word column % 8 (low half first) of philox4x32 at the counter (column / 8, row, site, step)
/// under the key `seed`.
struct Dropout {
  double p = 0.0;  ///< chance of dropping an element, in [0, 1)
  random::MaskKey key;

  /// round(65536 p): p is honoured to 1/65536.
  uint32_t threshold() const;
  /// 65536 / (65536 - threshold()): exactly unbiased for the chance really used.
  double scale() const;
  bool active() const { return p > 0.0; }
};

/// Throws unless p is in [0, 1); `area` and `place` go into the message.
void check_dropout(double p, const char* area, const std::string& place = {});

/// x with the mask applied, a new tensor; records nothing for autograd. x: fp32, fp64 (others
/// through fp32).
at::Tensor apply_dropout(const at::Tensor& x, const Dropout& dropout);

/// target += mask / (1 - p) * x, in place. Same shapes, both contiguous, fp32 or fp64.
void add_dropped_(at::Tensor& target, const at::Tensor& x, const Dropout& dropout);

/// `apply_dropout`, differentiable: backward applies the same mask.
at::Tensor dropout(const at::Tensor& x, const Dropout& dropout);

}  // namespace graft::ops
