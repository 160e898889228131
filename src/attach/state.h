// What stands behind AttachedAdapter; private to the attach folder.
#pragma once

#include <graft/attach/attach.h>
#include <graft/nn/adapter_slot.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace graft {

// Whether the layer runs its adapters by itself; torch's own do it inside an ActivationScope.
bool is_graft_layer(const torch::nn::Module& module);

// A tensor of the model itself that an adapter trains: a bias, or a parameter of modules_to_save.
struct ModelParameter {
  std::string name;      // dotted path in the model
  std::string file_key;  // path in a file, without the prefix
  at::Tensor parameter;  // the model's own handle
  at::Tensor trained;    // this adapter's values while they are not in the model
  bool in_model = false;

  // This adapter's values, wherever they are.
  at::Tensor values() const { return in_model ? parameter : trained; }
};

// What the adapters of one model share.
struct ModelAdapters {
  std::vector<std::weak_ptr<AttachedAdapter::State>> members;
  std::vector<std::string> active;
  bool enabled = true;
  // The untouched values of model parameters that some adapter trains, by name.
  std::map<std::string, std::pair<at::Tensor, at::Tensor>> originals;  // parameter, untouched data
  // While merged: the layers' untouched weights and biases.
  std::vector<std::pair<at::Tensor, at::Tensor>> unmerged;  // parameter, untouched data
  bool merged = false;
  // Which parameters of the model are one and the same tensor.
  std::map<const void*, std::vector<std::string>> owners;

  std::vector<std::shared_ptr<AttachedAdapter::State>> alive() const;
  // Puts every slot, every requires_grad flag and every model parameter in line with `active` and
  // `enabled`.
  void refresh();
};

struct AttachedAdapter::State {
  std::shared_ptr<ModelAdapters> shared;
  std::shared_ptr<const adapters::Recipe> recipe;
  AttachOptions options;
  std::vector<AdaptedLayer> layers;
  std::vector<std::shared_ptr<nn::AdapterSlot>> slots;  // one a layer
  std::vector<ModelParameter> model_parameters;
  std::vector<std::string>
      all_layer_names;  // of the model's adaptable layers, to shorten the saved target list
  std::vector<uint32_t>
      versions;  // of the trained tensors when they were last initialised or loaded
  std::vector<init::LayerReport> start_reports;  // of layers whose start was decomposed
  bool detached = false;

  bool is_active() const;
  std::vector<std::pair<std::string, at::Tensor>> trained_tensors() const;
  void remember_versions();
  bool changed_since_remembered() const;
};

}  // namespace graft
