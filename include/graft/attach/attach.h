/// Puts adapters into a model, and takes them out again.
///
///   auto adapter = graft::attach(*model, graft::adapters::LoraOptions{.rank = 8}, {.targets =
///   {"q_proj", "v_proj"}}); torch::optim::AdamW optimizer(adapter.parameters());
///   ...
///   adapter.save("out");                      // opens in Hugging Face PEFT
///
/// Layers of graft::nn run their adapters by themselves. A model built of plain torch::nn layers
/// runs them inside a scope:
///   auto active = adapter.activate();  loss(model->forward(x)).backward();
#pragma once

#include <graft/adapters/attach_options.h>
#include <graft/adapters/recipe.h>
#include <graft/attach/activation.h>
#include <graft/nn/batch_rows.h>
#include <torch/nn/module.h>

#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace graft {

/// One adapted layer.
struct AdaptedLayer {
  std::string name;                           ///< dotted path in the model
  std::shared_ptr<torch::nn::Module> module;  ///< the layer itself
  std::shared_ptr<nn::Adapter> adapter;       ///< what sits on it
};

/// An adapter that is attached to a model: the handle through which it is trained, switched, saved
/// and removed. Handles are cheap to copy and all speak of the same adapter; they keep the model's
/// modules alive.
class AttachedAdapter {
 public:
  struct State;
  explicit AttachedAdapter(std::shared_ptr<State> state) : state_(std::move(state)) {}

  const std::string& name() const;
  const adapters::Recipe& recipe() const;
  const std::vector<AdaptedLayer>& layers() const;

  /// How the layers' factors were found, for initialisers that decompose something; else empty.
  const std::vector<init::LayerReport>& start_reports() const;

  /// What is trained: the adapter's parameters, the parameters of modules_to_save and the trained
  /// biases; each tensor once, named by its path in the model.
  std::vector<std::pair<std::string, at::Tensor>> named_parameters() const;
  std::vector<at::Tensor> parameters() const;
  /// How many numbers are trained.
  int64_t parameter_count() const;

  /// For a training loop, around each optimiser step (methods that do nothing there ignore it):
  ///   adapter.begin_step(info);     loss = ...;
  ///   if (auto term = adapter.penalty(); term.defined()) loss = loss + term;   loss.backward();
  ///   adapter.before_update(info);  optimizer.step();
  ///   adapter.end_step(info);       optimizer.zero_grad();
  void begin_step(const adapters::StepInfo& info) const;
  /// What the method adds to the loss; undefined where it adds nothing.
  at::Tensor penalty() const;
  /// Lets the method change the gradients; where they are clipped, take their norm before.
  void before_update(const adapters::StepInfo& info) const;
  /// Call it while the gradients are still there.
  void end_step(const adapters::StepInfo& info) const;
  /// The method's own figures of the step.
  adapters::Figures figures() const;
  /// How many tokens each expert has worked on since attaching, by layer: in training passes, or in
  /// those in eval mode. Empty for methods without experts.
  adapters::ExpertUse expert_use(bool training = true) const;

  /// Writes adapter_config.json and adapter_model.safetensors into the folder, each atomically.
  /// Throws when the adapter was trained although some of its layers never ran: they would have no
  /// effect.
  void save(const std::filesystem::path& folder, const std::string& base_model = "") const;
  /// Reads a folder's values into this adapter. The folder's method and options must agree with
  /// this adapter's (but for dropout and initialisation), unless `same_options` is off: then only
  /// the tensors must fit. Missing, unexpected and mis-shaped tensors are listed all at once, and
  /// then nothing is changed.
  void load(const std::filesystem::path& folder, bool same_options = true);

  /// Folds the active adapters into the layers' weights: same output, plain speed. Throws when a
  /// layer cannot be merged, when a weight is shared with another layer, or when a merged weight
  /// would not be finite; then nothing is changed.
  void merge();
  /// Puts the untouched weights back, bit for bit.
  void unmerge();
  bool is_merged() const;

  /// Switches the model's adapters (and modules_to_save) on or off: off, the model computes what it
  /// did before.
  void enable();
  void disable();
  bool is_enabled() const;

  /// Makes this the model's only active adapter.
  void set_active();
  /// Makes exactly these of the model's adapters active; their updates add up. Throws for an
  /// unknown name.
  void set_active(const std::vector<std::string>& names);
  bool is_active() const;

  /// Many adapters in one batch: while the returned scope lives, the model's forward passes (on
  /// this thread) run each adapter on its own sequences, in order, as if they were a batch of their
  /// own:
  ///   a.set_active({"a", "b"});
  ///   auto rows = a.batch_rows({{"a", 4}, {"b", 2}, {"", 1}});  // the last one: the plain base
  /// The adapters must be active. Throws for a name that is not, and, of several, for an adapter
  /// that trains the model's own parameters (modules_to_save, bias): those are one for all rows.
  /// See nn::BatchRows.
  [[nodiscard]] nn::BatchRows batch_rows(const nn::BatchParts& parts) const;

  /// Takes this adapter out of the model; what modules_to_save changed is put back. The handle is
  /// dead afterwards.
  void detach();

  /// For models built of torch::nn layers: while the returned scope lives, their forward runs the
  /// adapters (on this thread).
  [[nodiscard]] ActivationScope activate() const;
  /// Whether some adapted layer is a plain torch::nn one, which runs its adapters inside
  /// `activate()` only.
  bool needs_activation() const;

  /// Throws when an adapted layer has not run since it was attached, naming the layers.
  void check_used() const;

 private:
  std::shared_ptr<State> state_;
};

/// Puts a method on the chosen layers. Freezes the whole model but the adapter and what the options
/// say is trained, and makes the new adapter the active one. Throws when the targets match nothing,
/// when the method does not fit a layer, or when the name is taken; then the model is as it was.
AttachedAdapter attach(torch::nn::Module& model, std::shared_ptr<const adapters::Recipe> recipe,
                       const AttachOptions& options = {});

/// The same with typed options: attach(*model, adapters::LoraOptions{.rank = 8}).
template <class Options>
requires requires {
  typename Options::Method;
}
AttachedAdapter attach(torch::nn::Module& model, const Options& method,
                       const AttachOptions& options = {}) {
  return attach(model, adapters::make_recipe(method), options);
}

/// Attaches what a PEFT folder holds, with its values. `name` and `seed` as in AttachOptions.
AttachedAdapter attach_from(torch::nn::Module& model, const std::filesystem::path& folder,
                            const std::string& name = "default", uint64_t seed = 0);

}  // namespace graft
