/// The place on a layer where its adapters sit.
#pragma once

#include <graft/nn/adapter.h>
#include <graft/nn/batch_rows.h>

#include <memory>
#include <string>
#include <vector>

namespace graft::nn {

/// All adapters of one layer, by name, and which of them are active. It is registered on the layer
/// as the child `adapters`, so that train(), eval(), to() and parameters() of the model reach them:
/// `q_proj.adapters.default.lora_A`.
class AdapterSlot : public torch::nn::Module {
 public:
  /// The child's name on the layer.
  static constexpr const char* kChildName = "adapters";

  /// The slot of a layer, or null when it has none.
  static std::shared_ptr<AdapterSlot> find(torch::nn::Module& layer);
  /// The slot of a layer, put there when it has none.
  static std::shared_ptr<AdapterSlot> ensure(torch::nn::Module& layer);
  /// Takes the slot off the layer; nothing happens when there is none.
  static void remove(torch::nn::Module& layer);

  /// Adds an adapter, inactive; throws when the name is taken.
  void add(const std::string& name, std::shared_ptr<Adapter> adapter);
  /// Takes an adapter out; throws when there is none of that name.
  void erase(const std::string& name);
  /// The adapter of that name, or null.
  std::shared_ptr<Adapter> get(const std::string& name) const;
  /// All names, in the order of adding.
  std::vector<std::string> names() const;

  /// Makes exactly these active, those the slot does not hold left out; their updates add up.
  void set_active(const std::vector<std::string>& names);
  const std::vector<std::string>& active() const { return active_; }

  /// Off: the layer is the plain base again.
  bool enabled = true;
  /// On while the active adapters are part of the layer's own weight.
  bool merged = false;
  /// What the adapters of one model share; belongs to attach.
  std::shared_ptr<void> owner;
  /// How often `apply` ran an adapter: zero after training means that the layer is never used.
  int64_t runs = 0;

  /// Whether the layer's output is to be computed by `apply`: an active adapter is here and, where
  /// a BatchRows is in force, has a part of the batch.
  bool engaged() const;
  /// The adapted output. One adapter: its own; several: base + sum of (adapter - base), or within a
  /// BatchRows each on its part.
  at::Tensor apply(const FrozenLayer& base, const at::Tensor& x);
  /// The active adapters, in the order of activation.
  const std::vector<std::shared_ptr<Adapter>>& active_adapters() const { return active_modules_; }

 private:
  // The active adapter of that name, or null.
  Adapter* find_active(const std::string& name) const;

  std::vector<std::string> active_;
  std::vector<std::shared_ptr<Adapter>> active_modules_;
};

}  // namespace graft::nn
