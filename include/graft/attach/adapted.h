/// A layer and its adapter as one type, for code that is templated on its layer and for Sequential.
///
///   using LoraLinear = graft::Adapted<torch::nn::LinearImpl, graft::adapters::LoraImpl>;
///   torch::nn::Sequential net(
///       std::make_shared<LoraLinear>(torch::nn::LinearOptions(64, 32),
///                                    graft::adapters::LoraOptions{.rank = 4}, "0"));
///
/// Such a layer always runs its adapter; `attach` is for layers that can be switched.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/nn/frozen_layer.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <concepts>
#include <memory>
#include <string>
#include <type_traits>
#include <variant>

namespace graft {

namespace detail {

struct NoLayer {};

// The kinds of layers: how an adapter sees them and what their constructor takes.
template <class Base>
constexpr auto kind_of() {
  if constexpr (std::derived_from<Base, torch::nn::LinearImpl>)
    return std::type_identity<std::pair<nn::FrozenLinear, torch::nn::LinearOptions>>{};
  else if constexpr (std::derived_from<Base, torch::nn::EmbeddingImpl>)
    return std::type_identity<std::pair<nn::FrozenEmbedding, torch::nn::EmbeddingOptions>>{};
  else if constexpr (std::derived_from<Base, torch::nn::Conv1dImpl>)
    return std::type_identity<std::pair<nn::FrozenConv, torch::nn::Conv1dOptions>>{};
  else if constexpr (std::derived_from<Base, torch::nn::Conv2dImpl>)
    return std::type_identity<std::pair<nn::FrozenConv, torch::nn::Conv2dOptions>>{};
  else if constexpr (std::derived_from<Base, torch::nn::Conv3dImpl>)
    return std::type_identity<std::pair<nn::FrozenConv, torch::nn::Conv3dOptions>>{};
  else
    return std::type_identity<std::pair<NoLayer, NoLayer>>{};
}

template <class Base>
using Kind = typename decltype(kind_of<Base>())::type;

}  // namespace detail

/// What an adapter sees of this type of layer: nn::FrozenLinear for torch::nn::LinearImpl.
template <class Base>
using FrozenView = typename detail::Kind<Base>::first_type;

/// Whether this type of layer can carry adapters: Linear, Embedding, Conv1d, Conv2d, Conv3d, of
/// torch::nn or graft::nn.
template <class Base>
concept AdaptableLayer = !std::same_as<FrozenView<Base>, detail::NoLayer>;

/// Whether the method has a forward for this type of layer.
template <class Base, class Method>
concept AdaptableBy = AdaptableLayer<Base> && adapters::Adapts<Method, FrozenView<Base>>;

/// A layer with a frozen base and a trained adapter: Base's parameters under Base's keys
/// ("weight"), the method's below its name ("lora.lora_A").
template <class Base, class Method>
class Adapted : public Base {
  static_assert(AdaptableLayer<Base>,
                "graft::Adapted: the layer must be a Linear, Embedding, Conv1d, Conv2d or Conv3d");
  static_assert(std::derived_from<Method, nn::Adapter>,
                "graft::Adapted: the method must be an adapter (adapters::AdapterModule), for "
                "example LoraImpl; the holder Lora is none");
  static_assert(!AdaptableLayer<Base> || !std::derived_from<Method, nn::Adapter> ||
                    AdaptableBy<Base, Method>,
                "graft::Adapted: this method has no forward for this kind of layer");

 public:
  using BaseOptions = typename detail::Kind<Base>::second_type;
  using MethodOptions = typename Method::Options;

  /// `name` and `seed` decide the adapter's values at the start and its dropout masks: give each
  /// layer of a model a name of its own.
  Adapted(const BaseOptions& base, const MethodOptions& method, std::string name, uint64_t seed = 0)
      : Adapted(base, method, adapters::LayerContext{std::move(name), seed}) {}

  /// x as for Base; returns the adapted output.
  torch::Tensor forward(const torch::Tensor& x) { return method_->forward(frozen(), x); }

  /// The adapter.
  Method& method() { return *method_; }
  const Method& method() const { return *method_; }

  /// The base as the adapter sees it.
  FrozenView<Base> frozen() const { return std::get<FrozenView<Base>>(nn::frozen_layer(*this)); }

  /// What a plain layer must hold to give the same output.
  nn::Adapter::Merged merged() const { return method_->merge(nn::frozen_layer(*this)); }

  /// A layer of its own with the same values, frozen flags, mode and random counters.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override {
    const torch::NoGradGuard no_grad;
    adapters::LayerContext context = method_->context;
    context.initialise = false;
    const std::shared_ptr<Adapted> copy(new Adapted(base_options_, method_->options, context));
    copy_values(this->named_parameters(), copy->named_parameters());
    copy_values(this->named_buffers(), copy->named_buffers());
    copy->method_->set_counters(method_->counters());
    copy->train(this->is_training());
    if (device) copy->to(*device);
    return copy;
  }

 private:
  Adapted(const BaseOptions& base, const MethodOptions& method,
          const adapters::LayerContext& context)
      : Base(base), base_options_(base) {
    for (auto& parameter : this->parameters(/*recurse=*/false)) parameter.set_requires_grad(false);
    method_ = this->register_module(
        Method::kName, std::make_shared<Method>(nn::frozen_layer(*this), method, context));
  }

  using Named = torch::OrderedDict<std::string, torch::Tensor>;
  static void copy_values(const Named& from, Named to) {
    for (const auto& item : from) {
      torch::Tensor& target = to[item.key()];
      target.set_data(item.value().detach().clone());
      target.set_requires_grad(item.value().requires_grad());
    }
  }

  BaseOptions base_options_;
  std::shared_ptr<Method> method_;
};

}  // namespace graft
