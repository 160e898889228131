#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/nn/adapter_slot.h>
#include <graft/nn/conv.h>
#include <graft/nn/embedding.h>
#include <graft/nn/gated_mlp.h>
#include <graft/nn/linear.h>

#include <algorithm>

namespace graft::nn {
namespace {

// The slot pointer of graft's own layers; null for torch's.
std::shared_ptr<AdapterSlot>* own_slot(torch::nn::Module& layer) {
  if (auto* linear = layer.as<LinearImpl>()) return &linear->slot;
  if (auto* embedding = layer.as<EmbeddingImpl>()) return &embedding->slot;
  if (auto* block = layer.as<GatedMlpImpl>()) return &block->slot;
  if (auto* conv = layer.as<Conv1dImpl>()) return &conv->slot;
  if (auto* conv = layer.as<Conv2dImpl>()) return &conv->slot;
  if (auto* conv = layer.as<Conv3dImpl>()) return &conv->slot;
  return nullptr;
}

}  // namespace

std::shared_ptr<AdapterSlot> AdapterSlot::find(torch::nn::Module& layer) {
  const auto children = layer.named_children();
  const auto* child = children.find(kChildName);
  return child == nullptr ? nullptr : std::dynamic_pointer_cast<AdapterSlot>(*child);
}

std::shared_ptr<AdapterSlot> AdapterSlot::ensure(torch::nn::Module& layer) {
  auto slot = find(layer);
  if (slot == nullptr) {
    slot = layer.register_module(kChildName, std::make_shared<AdapterSlot>());
    slot->train(layer.is_training());
    if (auto* own = own_slot(layer)) *own = slot;
  }
  return slot;
}

void AdapterSlot::remove(torch::nn::Module& layer) {
  if (find(layer) == nullptr) return;
  layer.unregister_module(kChildName);
  if (auto* own = own_slot(layer)) own->reset();
}

void AdapterSlot::add(const std::string& name, std::shared_ptr<Adapter> adapter) {
  GRAFT_CHECK(!get(name), "attach", "an adapter's name must be new; got '", name,
              "' a second time");
  adapter->train(is_training());
  register_module(name, std::move(adapter));
}

void AdapterSlot::erase(const std::string& name) {
  GRAFT_CHECK(get(name), "attach", "no adapter of that name; got '", name, "'");
  std::vector<std::string> rest = active_;
  std::erase(rest, name);
  unregister_module(name);
  set_active(rest);
}

std::shared_ptr<Adapter> AdapterSlot::get(const std::string& name) const {
  const auto children = named_children();
  const auto* child = children.find(name);
  return child == nullptr ? nullptr : std::dynamic_pointer_cast<Adapter>(*child);
}

std::vector<std::string> AdapterSlot::names() const {
  return named_children().keys();
}

void AdapterSlot::set_active(const std::vector<std::string>& names) {
  GRAFT_CHECK(!merged, "attach",
              "adapters cannot be switched while they are merged; unmerge first");
  active_.clear();
  active_modules_.clear();
  for (const auto& name : names) {
    if (auto adapter = get(name)) {
      active_.push_back(name);
      active_modules_.push_back(std::move(adapter));
    }
  }
}

Adapter* AdapterSlot::find_active(const std::string& name) const {
  const auto it = std::find(active_.begin(), active_.end(), name);
  return it == active_.end() ? nullptr
                             : active_modules_[static_cast<size_t>(it - active_.begin())].get();
}

bool AdapterSlot::engaged() const {
  if (!enabled || merged || active_modules_.empty()) return false;
  const auto& parts = BatchRows::current();
  return !parts || std::any_of(parts->begin(), parts->end(),
                               [&](const auto& part) { return find_active(part.adapter); });
}

at::Tensor AdapterSlot::apply(const FrozenLayer& base, const at::Tensor& x) {
  ++runs;
  if (const auto& parts = BatchRows::current())
    return run_parts(*parts, x, [&](const BatchPart& part, const at::Tensor& rows) {
      Adapter* adapter = find_active(part.adapter);
      return adapter != nullptr ? adapter->apply(base, rows) : nn::apply(base, rows);
    });
  if (active_modules_.size() == 1) return active_modules_.front()->apply(base, x);
  const at::Tensor plain = nn::apply(base, x);
  at::Tensor sum = plain;
  for (const auto& adapter : active_modules_) sum = sum + (adapter->apply(base, x) - plain);
  return sum;
}

}  // namespace graft::nn
