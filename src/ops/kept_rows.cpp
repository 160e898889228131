#include "kept_rows.h"

#include <torch/custom_class.h>

#include <type_traits>
#include <unordered_map>
#include <utility>

namespace graft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Node;

constexpr const char* kNode = "input_node";

// std::shared_ptr or c10::intrusive_ptr, by LibTorch's version.
using NodePointer = std::decay_t<decltype(std::declval<const at::Tensor&>().grad_fn())>;

struct NodeHolder : torch::CustomClassHolder {
  explicit NodeHolder(NodePointer n) : node(std::move(n)) {}
  NodePointer node;
};

std::unordered_map<std::type_index, Recompute>& recomputes() {
  static std::unordered_map<std::type_index, Recompute> table;
  return table;
}

// Layers that read the same output run their backward one after the other: the last output made
// again is kept for the next of them.
struct LastMade {
  const Node* node = nullptr;
  uint64_t number = 0;  // tells the node from a later one at the same place
  at::Tensor rows;
};
thread_local LastMade last_made;

}  // namespace

bool register_recompute(std::type_index node, Recompute recompute) {
  return recomputes().emplace(node, recompute).second;
}

at::Tensor keep_rows(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& rows,
                     bool needed) {
  if (!needed) return {};
  const NodePointer node = x.grad_fn();
  if (!node || recomputes().count(typeid(*node)) == 0) return rows;
  ctx->saved_data[kNode] = c10::IValue::make_capsule(c10::make_intrusive<NodeHolder>(node));
  return {};
}

at::Tensor kept_rows(AutogradContext* ctx, const at::Tensor& saved) {
  const auto it = ctx->saved_data.find(kNode);
  if (it == ctx->saved_data.end()) return saved;
  const auto node = c10::static_intrusive_pointer_cast<NodeHolder>(it->second.toCapsule())->node;
  if (last_made.node == node.get() && last_made.number == node->sequence_nr())
    return last_made.rows;
  const at::AutoGradMode no_grad(false);
  last_made = {node.get(), node->sequence_nr(), recomputes().at(typeid(*node))(*node)};
  return last_made.rows;
}

}  // namespace graft::ops
