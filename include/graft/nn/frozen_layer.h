/// A layer as an adapter sees it: its weights and its geometry, whatever module they belong to.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <variant>
#include <vector>

namespace torch::nn {
class Module;
}

namespace graft::nn {

/// y = x W^T + b.  weight: [out, in], bias: [out] or undefined.
struct FrozenLinear {
  at::Tensor weight;
  at::Tensor bias;

  /// x: [..., in]; returns [..., out]. Differentiable in x (and in weight and bias where they
  /// require it).
  at::Tensor apply(const at::Tensor& x) const;
};

/// y = W[indices].  weight: [rows, columns].
struct FrozenEmbedding {
  at::Tensor weight;
  int64_t padding_idx = -1;
  bool scale_grad_by_freq = false;

  /// indices: [...]; returns [..., columns].
  at::Tensor apply(const at::Tensor& indices) const;
};

/// A convolution over 1, 2 or 3 dimensions.  weight: [out, in / groups, kernel...], bias: [out] or
/// undefined.
struct FrozenConv {
  at::Tensor weight;
  at::Tensor bias;
  std::vector<int64_t> stride;    ///< one per dimension
  std::vector<int64_t> padding;   ///< zeros on both sides, one per dimension
  std::vector<int64_t> dilation;  ///< one per dimension
  int64_t groups = 1;
  /// What is put around x before the convolution: padding that is not symmetric or not of zeros, in
  /// the order of `torch::nn::functional::pad` (last dimension first, left then right); empty for
  /// none.
  std::vector<int64_t> before = {};
  std::string before_mode = "constant";

  /// 1, 2 or 3.
  int64_t dimensions() const { return weight.dim() - 2; }
  /// x [batch, in, size...] (or without batch) with `before` put around it.
  at::Tensor padded(const at::Tensor& x) const;
  /// The convolution of an already padded input with this geometry and any kernel.
  at::Tensor convolve(const at::Tensor& x, const at::Tensor& kernel, const at::Tensor& kernel_bias,
                      int64_t kernel_groups) const;
  /// x: [batch, in, size...]; returns [batch, out, size'...].
  at::Tensor apply(const at::Tensor& x) const;
};

/// A gated feed-forward block (gated_mlp.h) as one layer: y = down(silu(gate(x)) * up(x)).
struct FrozenGatedMlp {
  FrozenLinear gate, up, down;
  at::Tensor valid = {};  ///< of this call: bool [..., tokens], false for padding; undefined: all

  /// x: [..., hidden]; returns its shape.
  at::Tensor apply(const at::Tensor& x) const;
};

/// Any layer that graft can adapt.
using FrozenLayer = std::variant<FrozenLinear, FrozenEmbedding, FrozenConv, FrozenGatedMlp>;

/// "Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d" or "GatedMlp".
std::string kind_name(const FrozenLayer& layer);

/// The layer's weight; a block's gate_proj's.
const at::Tensor& weight_of(const FrozenLayer& layer);

/// The layer's bias; undefined where it has none, and for a block.
at::Tensor bias_of(const FrozenLayer& layer);

/// The layer's own output.
at::Tensor apply(const FrozenLayer& layer, const at::Tensor& x);

/// Whether targets can name this module: it is a Linear, Embedding or ConvNd of torch::nn or
/// graft::nn. A block is named by its three layers.
bool is_adaptable(const torch::nn::Module& module);

/// The view of a module that `is_adaptable`, or of a GatedMlp; throws for any other.
FrozenLayer frozen_layer(const torch::nn::Module& module);

}  // namespace graft::nn
