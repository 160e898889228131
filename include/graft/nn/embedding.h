/// Drop-in for torch::nn::Embedding with a place for adapters.
#pragma once

#include <torch/nn/modules/embedding.h>

#include <memory>

namespace graft::nn {

class AdapterSlot;

/// torch::nn::Embedding (same constructor, same state-dict keys) whose forward asks its adapters,
/// if it has any.
class EmbeddingImpl : public torch::nn::EmbeddingImpl {
 public:
  using torch::nn::EmbeddingImpl::EmbeddingImpl;

  /// indices: [...] of int64; returns [..., columns].
  torch::Tensor forward(const torch::Tensor& indices);

  /// A graft::nn::Embedding with its own copy of the weight; throws when adapters are attached.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;

  /// The adapters' place, null when there is none; `attach` sets it.
  std::shared_ptr<AdapterSlot> slot;
};
TORCH_MODULE(Embedding);

}  // namespace graft::nn
