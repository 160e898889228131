/// Drop-in for torch::nn::Linear with a place for adapters.
#pragma once

#include <torch/nn/modules/linear.h>

#include <memory>
#include <vector>

namespace graft::nn {

class AdapterSlot;

/// torch::nn::Linear (same constructor, same state-dict keys) whose forward asks its adapters, if
/// it has any. A frozen layer without one multiplies by ops::frozen_linear, which picks the faster
/// matrix library; an empty slot costs one branch.
class LinearImpl : public torch::nn::LinearImpl {
 public:
  using torch::nn::LinearImpl::LinearImpl;

  /// x: [..., in]; returns [..., out].
  torch::Tensor forward(const torch::Tensor& x);

  /// A graft::nn::Linear with its own copy of the weights; throws when adapters are attached.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;

  /// The adapters' place, null when there is none; `attach` sets it.
  std::shared_ptr<AdapterSlot> slot;
};
TORCH_MODULE(Linear);

/// The outputs of layers that read one input: what each one's forward returns. On a device, layers
/// with a single LoRA share the reads of x and sum its gradient in place (ops/lora_group.h).
std::vector<torch::Tensor> forward_together(const std::vector<Linear>& layers,
                                            const torch::Tensor& x);

}  // namespace graft::nn
