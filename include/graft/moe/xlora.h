/// X-LoRA: adapters that were trained before, mixed by a classifier that reads the model's last
/// hidden states in a pass of their own.
///
///   pass 1:  every gate is scaling_pass_value; its last hidden states h go into
///   c = classifier(h),  c <- softmax(c / temperature) over the adapters
///   pass 2:  y = W x + b + w sum_e c_e s_e B_e A_e x
///
/// The classifier is one linear layer, or `depth` of them with ReLU and dropout between; it gives
/// one c for all layers, or one for each (`layerwise`). With top_k a layer keeps the largest c_e
/// and the others are 0, their sum is not 1 then; `softmax_topk` takes another softmax over what is
/// left. The classifier is trained, the adapters are frozen.
///
///   auto adapter = attach(*model, moe::XloraOptions{...}, {.targets = library->layers()});
///   auto& xlora = moe::xlora_of(*adapter.layers()[0].adapter);
///   at::Tensor h;  { at::NoGradGuard g;  h = last hidden states of model(x) }
///   const moe::XloraScope scope(xlora, h);
///   loss = ... model(x) ...
/// Source: Buehler & Buehler 2024, arXiv 2402.07148; names, order and files are PEFT's.
#pragma once

#include <graft/moe/expert_library.h>

#include <optional>

namespace graft::moe {

/// Options of X-LoRA; the names in brackets are PEFT's.
struct XloraOptions {
  using Method = class XloraImpl;

  std::shared_ptr<const ExpertLibrary> experts = nullptr;
  int64_t hidden_size = 4096;                   ///< of the last hidden states
  int64_t depth = 1;                            ///< linear layers, at least 1 [xlora_depth]
  int64_t size = 2048;                          ///< between them [xlora_size]
  double dropout_p = 0.2;                       ///< between them, in [0, 1) [xlora_dropout_p]
  bool layerwise = false;                       ///< [layerwise_scalings]
  bool softmax = true;                          ///< [enable_softmax]
  double temperature = 1.0;                     ///< positive [softmax_temperature]
  std::optional<int64_t> top_k = std::nullopt;  ///< in [1, number of adapters] [top_k_lora]
  bool softmax_topk = false;                    ///< [enable_softmax_topk]
  double scaling_pass_value = 0.0;              ///< the gates of pass 1
  double global_scaling_weight = 1.0;           ///< w

  /// Throws unless every option is in its range.
  void validate() const;
};

/// The experts of one layer, all of them frozen, and a share in the classifier.
class XloraImpl : public LinearMixture<XloraImpl, XloraOptions> {
 public:
  static constexpr const char* kName = "xlora";

  /// The classifier, and the scalings of the current scope.
  class Classifier;

  /// Reads the adapters' values whatever the context says: X-LoRA's files do not hold them.
  XloraImpl(const nn::FrozenLayer& base, const XloraOptions& options,
            const adapters::LayerContext& context);

  /// Throws for scalings of other tokens than x's, and for scalings with a graph in a training pass
  /// that keeps none (a checkpointed block's first one): the scope would be gone when the block is
  /// computed again.
  at::Tensor gates(const at::Tensor& x);

  std::vector<FileTensor> file_tensors() const override { return {}; }
  /// "base_model.internal_xlora_classifier.layers.0.weight" and so on.
  std::vector<FileTensor> shared_file_tensors() const override;

  /// How many masks the classifier drew.
  std::vector<int64_t> counters() const override;
  void set_counters(const std::vector<int64_t>& values) override;

  /// The scalings of these hidden states [..., tokens, hidden_size], [..., tokens, E] or with
  /// `layerwise` [..., tokens, L, E]; differentiable in the classifier.
  at::Tensor classify(const at::Tensor& hidden);

  static std::shared_ptr<Classifier> make_shared_part(
      const XloraOptions& options,
      const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers,
      const adapters::LayerContext& context);
  static void write_config(const XloraOptions& options, nlohmann::json& config);
  static std::string describe(const XloraOptions& options);

 private:
  friend class XloraScope;
  friend XloraImpl* active_xlora(const torch::nn::Module& model);

  std::shared_ptr<Classifier> classifier_;
  int64_t index_ = 0;  // among the layers
};
TORCH_MODULE(Xlora);

/// The X-LoRA layer that this adapter is; throws for another method's.
XloraImpl& xlora_of(nn::Adapter& adapter);

/// Some layer of the X-LoRA at work in the model, or null: for models that make the first pass
/// themselves. Throws for two of them, and for one within a batch in parts (nn/batch_rows.h), where
/// the first pass would have to be one of its part alone.
XloraImpl* active_xlora(const torch::nn::Module& model);

/// While it lives, all layers of an attached X-LoRA are mixed by the scalings of these hidden
/// states; without a scope every gate is scaling_pass_value. Scopes nest.
class XloraScope {
 public:
  /// layer: any of the attached adapter's layers. hidden: [..., tokens, hidden_size].
  XloraScope(XloraImpl& layer, const at::Tensor& hidden);
  ~XloraScope();
  XloraScope(const XloraScope&) = delete;
  XloraScope& operator=(const XloraScope&) = delete;

 private:
  std::shared_ptr<XloraImpl::Classifier> classifier_;
  at::Tensor outer_;
};

/// The built-in list's entry.
adapters::MethodEntry xlora_entry();

}  // namespace graft::moe
