/// Drop-ins for torch::nn::Conv1d, Conv2d and Conv3d with a place for adapters.
#pragma once

#include <graft/nn/batch_rows.h>
#include <torch/nn/modules/conv.h>

#include <memory>

namespace graft::nn {

class AdapterSlot;

namespace detail {
torch::Tensor conv_forward(const std::shared_ptr<AdapterSlot>& slot, const torch::nn::Module& layer,
                           const torch::Tensor& x);
void check_no_adapters(const std::shared_ptr<AdapterSlot>& slot);

// The constructor's options from those that torch keeps: they are of two unrelated types.
template <size_t D>
torch::nn::ConvOptions<D> conv_options(const torch::nn::detail::ConvNdOptions<D>& kept) {
  return torch::nn::ConvOptions<D>(kept.in_channels(), kept.out_channels(), kept.kernel_size())
      .stride(kept.stride())
      .padding(kept.padding())
      .dilation(kept.dilation())
      .groups(kept.groups())
      .bias(kept.bias())
      .padding_mode(kept.padding_mode());
}
}  // namespace detail

/// One of torch's convolutions (same constructor, same state-dict keys) whose forward asks its
/// adapters, if it has any. x: [batch, in, size...]; returns [batch, out, size'...].
template <class Base>
class AdaptableConv : public Base {
 public:
  using Base::Base;

  torch::Tensor forward(const torch::Tensor& x) {
    return slot || BatchRows::current() ? detail::conv_forward(slot, *this, x) : Base::forward(x);
  }

  /// The same kind of layer with its own copy of the weights; throws when adapters are attached.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override {
    detail::check_no_adapters(slot);
    torch::NoGradGuard no_grad;
    auto copy = std::make_shared<AdaptableConv>(detail::conv_options(this->options));
    copy->weight.set_data(this->weight.detach().clone());
    copy->weight.set_requires_grad(this->weight.requires_grad());
    if (this->bias.defined()) {
      copy->bias.set_data(this->bias.detach().clone());
      copy->bias.set_requires_grad(this->bias.requires_grad());
    }
    copy->train(this->is_training());
    if (device) copy->to(*device);
    return copy;
  }

  /// The adapters' place, null when there is none; `attach` sets it.
  std::shared_ptr<AdapterSlot> slot;
};

using Conv1dImpl = AdaptableConv<torch::nn::Conv1dImpl>;
using Conv2dImpl = AdaptableConv<torch::nn::Conv2dImpl>;
using Conv3dImpl = AdaptableConv<torch::nn::Conv3dImpl>;
TORCH_MODULE(Conv1d);
TORCH_MODULE(Conv2d);
TORCH_MODULE(Conv3d);

}  // namespace graft::nn
