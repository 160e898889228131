// The drop-in layers' forward and clone.
#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/nn/adapter_slot.h>
#include <graft/nn/batch_rows.h>
#include <graft/nn/conv.h>
#include <graft/nn/embedding.h>
#include <graft/nn/linear.h>
#include <graft/ops/frozen_product.h>
#include <graft/ops/lora_group.h>

#include <optional>
#include <utility>

namespace graft::nn {
namespace {

void copy_parameter(at::Tensor& target, const at::Tensor& source) {
  if (!source.defined()) return;
  target.set_data(source.detach().clone());
  target.set_requires_grad(source.requires_grad());
}

// The layer's own output, within a BatchRows part by part: the number of rows may show in a
// product's last bits.
template <class Base>
at::Tensor plain(const Base& base, const at::Tensor& x) {
  const auto apply_to = [&](const at::Tensor& rows) {
    if constexpr (requires { base.apply(rows); })
      return base.apply(rows);
    else
      return apply(base, rows);
  };
  const auto& parts = BatchRows::current();
  if (!parts) return apply_to(x);
  return run_parts(*parts, x,
                   [&](const BatchPart&, const at::Tensor& rows) { return apply_to(rows); });
}

template <class Impl>
std::shared_ptr<torch::nn::Module> finish_clone(std::shared_ptr<Impl> copy, const Impl& source,
                                                const std::optional<torch::Device>& device) {
  copy->train(source.is_training());
  if (device) copy->to(*device);
  return copy;
}

}  // namespace

namespace detail {

void check_no_adapters(const std::shared_ptr<AdapterSlot>& slot) {
  GRAFT_CHECK(!slot, "nn", "a layer with adapters cannot be cloned; detach them first");
}

torch::Tensor conv_forward(const std::shared_ptr<AdapterSlot>& slot, const torch::nn::Module& layer,
                           const torch::Tensor& x) {
  const FrozenLayer base = frozen_layer(layer);
  return slot && slot->engaged() ? slot->apply(base, x) : plain(base, x);
}

}  // namespace detail

torch::Tensor LinearImpl::forward(const torch::Tensor& x) {
  const FrozenLinear base{weight, bias};
  return slot && slot->engaged() ? slot->apply(base, x) : plain(base, x);
}

std::vector<torch::Tensor> forward_together(const std::vector<Linear>& layers,
                                            const torch::Tensor& x) {
  std::vector<torch::Tensor> outputs(layers.size());
  std::vector<size_t> at;
  std::vector<ops::LoraLayer> group;
  for (size_t i = 0; i < layers.size(); ++i) {
    LinearImpl& layer = *layers[i].ptr();
    std::optional<ops::LoraTerm> term;
    if (layer.slot && layer.slot->engaged() && !BatchRows::current() &&
        layer.slot->active_adapters().size() == 1)
      term = layer.slot->active_adapters().front()->linear_term();
    if (!term) {
      outputs[i] = layer.forward(x);
      continue;
    }
    ++layer.slot->runs;
    at.push_back(i);
    group.push_back({layer.weight, layer.bias, std::move(*term)});
  }
  auto together = ops::lora_linear_group(x, group);
  for (size_t k = 0; k < at.size(); ++k) outputs[at[k]] = std::move(together[k]);
  return outputs;
}

std::shared_ptr<torch::nn::Module> LinearImpl::clone(
    const std::optional<torch::Device>& device) const {
  detail::check_no_adapters(slot);
  torch::NoGradGuard no_grad;
  auto copy = std::make_shared<LinearImpl>(options);
  copy_parameter(copy->weight, weight);
  copy_parameter(copy->bias, bias);
  return finish_clone(copy, *this, device);
}

torch::Tensor EmbeddingImpl::forward(const torch::Tensor& indices) {
  return slot && slot->engaged() ? slot->apply(frozen_layer(*this), indices)
                                 : torch::nn::EmbeddingImpl::forward(indices);
}

std::shared_ptr<torch::nn::Module> EmbeddingImpl::clone(
    const std::optional<torch::Device>& device) const {
  detail::check_no_adapters(slot);
  torch::NoGradGuard no_grad;
  auto copy = std::make_shared<EmbeddingImpl>(options);
  copy_parameter(copy->weight, weight);
  return finish_clone(copy, *this, device);
}

}  // namespace graft::nn
