/// Mixtures of low-rank experts on one linear layer: what MoLA, LoRAMoE, AdaMoLE and the others
/// have in common.
///
///   y = W x + b + sum_e g_e(x) s_e B_e A_e drop(x)
///
/// The methods differ in who makes the gates g, and in which of A, B and the gates' own parameters
/// are trained. All experts are computed for every token, as one product with the factors side by
/// side (ops/lora_linear.h): E r (in + out) multiplications a token, no gather, no loop. The mask
/// of dropout is one for all experts.
///
/// Such a layer cannot be merged: no single weight does what the gates do from token to token. Each
/// expert alone is plain LoRA (`extract_expert`).
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/moe/balance_loss.h>
#include <graft/moe/router.h>
#include <graft/ops/dropout.h>

#include <string>
#include <utility>
#include <vector>

namespace graft::moe {

/// The experts of one layer, side by side.
struct Experts {
  at::Tensor A;                ///< [sum r_e, in]
  at::Tensor B;                ///< [out, sum r_e]
  std::vector<int64_t> ranks;  ///< r_e
  std::vector<double> scales;  ///< s_e

  int64_t count() const { return static_cast<int64_t>(ranks.size()); }
  /// Expert e's A [r_e, in] and B [out, r_e], views. Throws unless e is in [0, count).
  std::pair<at::Tensor, at::Tensor> expert(int64_t e) const;
  /// W x + b + sum_e g_e s_e B_e A_e drop(x).  gates: g [tokens, E]; x: [..., in]; returns [...,
  /// out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x, const at::Tensor& gates,
                     const ops::Dropout& dropout) const;
  /// "experts.0.lora_A.weight", "experts.0.lora_B.weight", "experts.1..."; views.
  std::vector<nn::Adapter::FileTensor> file_tensors() const;
};

/// Factors for experts of these ranks, on the base's device, fp32 (fp64 for an fp64 base); each
/// expert starts by itself with the initialiser of that name. Throws for a rank that the layer
/// cannot carry and for an initialiser that needs more than random numbers.
Experts make_experts(const char* method, const nn::FrozenLayer& base, std::vector<int64_t> ranks,
                     double scale, const std::string& init, const adapters::LayerContext& context);

/// Throws unless what all experts share is sound whatever the layer.
void check_expert_options(const char* method, int64_t rank, double alpha, double dropout,
                          const std::string& init);

/// Why a mixture cannot be merged, as an error.
[[noreturn]] void refuse_merge(const char* method, const std::string& layer);

/// A router as a layer's child `router`, in the masters' type.
Router make_router(const nn::FrozenLayer& base, const RouterOptions& options,
                   const adapters::LayerContext& context);

/// The router's tensors as files name them: "moe_gate.weight", "moe_gate.bias",
/// "moe_gate.threshold.weight", "moe_gate.threshold.bias".
std::vector<nn::Adapter::FileTensor> router_tensors(const RouterImpl& router);

/// Which of x's tokens [..., in] are no padding (TokenScope), in the shape of x's leading
/// dimensions; undefined: all.
at::Tensor valid_tokens(const at::Tensor& x);

/// Where the router sends the tokens of x [..., in], padding (TokenScope) left out.
Routing route_tokens(RouterImpl& router, const at::Tensor& x);

/// The same routing without the graph that made it.
Routing detached(const Routing& routing);

/// Throws unless the routing is that of a training pass, with its graph: what a balance loss needs.
void check_has_graph(const char* method, const Routing& routing, const std::string& layer);

/// "balance_loss", before its coefficient, and "smallest_expert_share" and "largest_expert_share":
/// an expert's part of all gates of its layer, the extremes over layers. Nothing before the first
/// forward pass.
adapters::Figures mixture_figures(const std::vector<Routing>& layers, const at::Tensor& loss);

/// Derive a mixture from this. It needs, besides what every method has,
///   at::Tensor gates(const at::Tensor& x)      g [tokens, E] in the experts' type
/// and fills `experts` in its constructor. An option `dropout` is that of the experts' input.
template <class Method, class OptionsType>
class LinearMixture : public adapters::AdapterModule<Method, OptionsType> {
 public:
  using adapters::AdapterModule<Method, OptionsType>::AdapterModule;

  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x) {
    const at::Tensor gates = static_cast<Method*>(this)->gates(x);
    ops::Dropout dropout;
    if constexpr (requires { this->options.dropout; })
      dropout = this->next_dropout(this->options.dropout);
    return experts.forward(base, x, gates, dropout);
  }

  /// Throws: the gates depend on the input.
  at::Tensor merged_weight(const nn::FrozenLinear&) const {
    refuse_merge(Method::kName, this->context.name);
  }

  /// Expert e alone, what the layer computes where its gate is 1 and all others are 0; copies.
  adapters::PlainLora extract_expert(int64_t e) const {
    const auto [A, B] = experts.expert(e);
    return {A.detach().clone(), B.detach().clone(), experts.scales[static_cast<size_t>(e)]};
  }

  Experts experts;
};

/// A mixture whose experts are trained together with a router of the layer's own. Options need
/// `rank`, `scale()`, `init` and `balance_loss` (the coefficient) besides; the method needs
///   static at::Tensor balance(const std::vector<Routing>&, const Options&)
/// The loss is a function of the last forward pass: call `penalty` before that pass's backward.
template <class Method, class OptionsType>
class RoutedMixture : public LinearMixture<Method, OptionsType> {
 public:
  RoutedMixture(const nn::FrozenLayer& base, const OptionsType& options,
                const adapters::LayerContext& context, const RouterOptions& routing)
      : LinearMixture<Method, OptionsType>(options, context) {
    Method::check_supports(base, context.name);
    this->options.validate();
    this->experts =
        make_experts(Method::kName, base,
                     std::vector<int64_t>(static_cast<size_t>(routing.experts), options.rank),
                     options.scale(), options.init, context);
    this->register_parameter("lora_A", this->experts.A);
    this->register_parameter("lora_B", this->experts.B);
    router = this->register_module("router", make_router(base, routing, context));
  }

  at::Tensor gates(const at::Tensor& x) {
    const Routing routing = route_tokens(*router, x);
    keep(routing);
    return gates_of(routing);
  }

  std::vector<nn::Adapter::FileTensor> file_tensors() const override {
    auto tensors = router_tensors(*router);
    for (auto& tensor : this->experts.file_tensors()) tensors.push_back(std::move(tensor));
    return tensors;
  }

  /// Where the last forward pass sent its tokens; undefined before the first.
  const Routing& routing() const { return routing_; }

  /// The balance loss over all layers times its coefficient; undefined where that is 0. Throws
  /// where the last forward pass left no graph.
  static at::Tensor penalty(const std::vector<Method*>& layers) {
    if (layers.empty() || layers.front()->options.balance_loss == 0.0) return {};
    for (const Method* layer : layers)
      check_has_graph(Method::kName, layer->routing_, layer->context.name);
    return Method::balance(routings(layers), layers.front()->options) *
           layers.front()->options.balance_loss;
  }

  /// Lets the graph of the last forward pass go.
  static void end_step(const std::vector<Method*>& layers, const adapters::StepInfo&) {
    for (Method* layer : layers) layer->routing_ = detached(layer->routing_);
  }

  static adapters::Figures figures(const std::vector<Method*>& layers) {
    const at::NoGradGuard no_grad;
    const std::vector<Routing> all = routings(layers);
    if (all.empty()) return {};
    return mixture_figures(all, Method::balance(all, layers.front()->options));
  }

  Router router{nullptr};

 protected:
  /// Remembers a pass for the loss and the figures, with its graph where a loss will ask for it.
  void keep(const Routing& routing) {
    const bool graph = this->is_training() && this->options.balance_loss != 0.0;
    routing_ = graph ? routing : detached(routing);
  }

 private:
  // Of the layers that have run.
  static std::vector<Routing> routings(const std::vector<Method*>& layers) {
    std::vector<Routing> all;
    for (const Method* layer : layers)
      if (layer->routing_.logits.defined()) all.push_back(layer->routing_);
    return all;
  }

  Routing routing_;
};

}  // namespace graft::moe
