/// The base class of adapter methods, and which methods fit which layers.
#pragma once

#include <graft/core/error.h>
#include <graft/core/random.h>
#include <graft/init/named_start.h>
#include <graft/nn/adapter.h>
#include <graft/ops/dropout.h>

#include <concepts>
#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

namespace graft::adapters {

/// What a method is told of the layer it is made for.
struct LayerContext {
  std::string name;   ///< dotted name in the model: "layers.3.q_proj"
  uint64_t seed = 0;  ///< the run's seed; draw from `layer_seed()`, so that the order of attaching
                      ///< does not matter
  /// Off when values are about to be loaded: parameters start as zeros, no initialiser runs, none
  /// needs to be known.
  bool initialise = true;
  /// What the method's layers have in common (Recipe::make_shared_part); null for most methods.
  std::shared_ptr<void> shared = nullptr;
  /// What a pass over some batches found out, for initialisers that need it; null: no pass ran.
  std::shared_ptr<const init::LayerFacts> facts = nullptr;
  /// Where an initialiser that decomposes something says how; null: nobody asks.
  std::shared_ptr<init::LayerReport> report = nullptr;

  /// The seed of this layer.
  uint64_t layer_seed() const;
};

/// Whether a method can sit on a layer of that kind: it has forward(base, x) for it.
template <class Method, class Base>
concept Adapts = std::derived_from<Method, nn::Adapter> &&
    requires(Method m, const Base& base, const at::Tensor& x) {
  { m.forward(base, x) } -> std::convertible_to<at::Tensor>;
};

/// Whether a method's update can be folded into a weight of that kind of layer.
template <class Method, class Base>
concept Merges = requires(const Method m, const Base& base) {
  { m.merged_weight(base) } -> std::convertible_to<at::Tensor>;
};

/// Derive a method from this. It needs `static constexpr const char* kName`, an aggregate `Options`
/// with `validate()`, a constructor (const nn::FrozenLayer&, const Options&, const LayerContext&),
/// `file_tensors()`, and for each kind of layer that it supports
///   at::Tensor forward(const nn::FrozenLinear&, const at::Tensor& x)
///   at::Tensor merged_weight(const nn::FrozenLinear&) const      (where it can be merged)
///   at::Tensor merged_bias(const nn::FrozenLinear&) const        (where the method adds to the
///   bias)
/// and likewise for FrozenEmbedding and FrozenConv. Layers without such a function are refused in
/// words.
template <class Method, class OptionsType>
class AdapterModule : public nn::Adapter {
 public:
  using Options = OptionsType;

  AdapterModule(Options options, LayerContext context)
      : nn::Adapter(Method::kName), options(std::move(options)), context(std::move(context)) {}

  std::string_view method() const override { return Method::kName; }

  at::Tensor apply(const nn::FrozenLayer& layer, const at::Tensor& x) override {
    return std::visit(
        [&](const auto& base) -> at::Tensor {
          if constexpr (Adapts<Method, std::decay_t<decltype(base)>>)
            return static_cast<Method*>(this)->forward(base, x);
          else
            refuse(layer, context.name);
        },
        layer);
  }

  Merged merge(const nn::FrozenLayer& layer) const override {
    return std::visit(
        [&](const auto& base) -> Merged {
          using Base = std::decay_t<decltype(base)>;
          if constexpr (Merges<Method, Base>) {
            const auto& method = static_cast<const Method&>(*this);
            if constexpr (requires { method.merged_bias(base); })
              return {method.merged_weight(base), method.merged_bias(base)};
            else
              return {method.merged_weight(base), nn::bias_of(layer)};
          } else {
            fail(Method::kName, concat("this method cannot be merged into a ", nn::kind_name(layer),
                                       " (layer '", context.name, "')"));
          }
        },
        layer);
  }

  /// Throws unless the method supports this kind of layer.
  static void check_supports(const nn::FrozenLayer& layer, const std::string& name) {
    std::visit(
        [&](const auto& base) {
          if constexpr (!Adapts<Method, std::decay_t<decltype(base)>>) refuse(layer, name);
        },
        layer);
  }

  /// How many masks were drawn.
  std::vector<int64_t> counters() const override { return {mask_counter_}; }
  void set_counters(const std::vector<int64_t>& values) override {
    GRAFT_CHECK(values.size() == 1, Method::kName, "a state has one counter a layer; got ",
                values.size(), " (layer '", context.name, "')");
    mask_counter_ = static_cast<uint32_t>(values[0]);
  }

  const Options options;
  const LayerContext context;

 protected:
  /// The dropout mask of the next training call, a new one each time; inactive in eval mode and for
  /// p = 0.
  ops::Dropout next_dropout(double p) {
    if (p == 0.0 || !is_training()) return {};
    const auto site = static_cast<uint32_t>(random::hash_name(context.name));
    return {p, random::draw_key(context.seed, site, mask_counter_)};
  }

 private:
  [[noreturn]] static void refuse(const nn::FrozenLayer& layer, const std::string& name) {
    fail(Method::kName,
         concat("this method does not support ", nn::kind_name(layer), " (layer '", name, "')"));
  }

  uint32_t mask_counter_ = 0;
};

}  // namespace graft::adapters
