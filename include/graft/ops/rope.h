/// Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split convention of Hugging
/// Face.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace graft::ops {

/// Frequencies of the rotation, as `rope_theta` and `rope_scaling` of a Llama config.json state
/// them.
struct RopeOptions {
  double theta = 10000.0;        ///< base of the frequencies, > 0
  int64_t head_dim = 0;          ///< d, even
  std::string type = "default";  ///< "default", "linear" or "llama3"
  double factor = 1.0;  ///< linear, llama3: how many times longer the context becomes, >= 1
  double low_freq_factor = 1.0;   ///< llama3: waves longer than original / low are slowed by factor
  double high_freq_factor = 4.0;  ///< llama3: waves shorter than original / high are left alone
  int64_t original_max_position_embeddings = 8192;  ///< llama3: context of the unscaled model

  /// Throws graft::Error naming the first bad field.
  void validate() const;
};

/// Cosines and sines of the angles position * inv_freq.
struct RopeTable {
  at::Tensor cos;  ///< float32, [..., d/2]
  at::Tensor sin;  ///< float32, [..., d/2]
};

/// The d/2 inverse frequencies, float32: theta^(-2i/d), scaled as `type` says.
at::Tensor rope_inverse_frequencies(const RopeOptions& options);

/// The table for positions [tokens] or [batch, tokens] (int64).
RopeTable rope_table(const RopeOptions& options, const at::Tensor& positions);

/// The table for the positions 0 .. tokens-1.
RopeTable rope_table(const RopeOptions& options, int64_t tokens);

/// Rotates the pairs (x_i, x_{i+d/2}) by the token's angles and transposes to attention's layout.
///
///   y_i = x_i cos_i - x_{i+d/2} sin_i        y_{i+d/2} = x_{i+d/2} cos_i + x_i sin_i
///
/// x: [batch, tokens, heads, d], possibly a view of a projection's output; float32, float64,
/// bfloat16 or float16 (float32 inside). cos, sin: [tokens, d/2] or [batch, tokens, d/2], without
/// gradient. Returns [batch, heads, tokens, d], contiguous, in x's dtype.
///
/// Differentiable once, in x: the gradient is turned back by the same angles and returned as a
/// contiguous [batch, tokens, heads, d]. Saves cos and sin alone.
/// Throws graft::Error on other dtypes, devices and shapes.
at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace graft::ops
