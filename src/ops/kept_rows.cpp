#include "kept_rows.h"

#include <ATen/ATen.h>
#include <torch/custom_class.h>

#include <unordered_map>
#include <utility>

#include "split_part.h"

namespace graft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Node;

constexpr const char* kNode = "input_node";
constexpr const char* kPart = "input_part";  // begin, count, of

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
  const auto part = split_part(x);
  const NodePointer node = part ? part->source : x.grad_fn();
  if (!node || recomputes().count(typeid(*node)) == 0) return rows;
  ctx->saved_data[kNode] = c10::IValue::make_capsule(c10::make_intrusive<NodeHolder>(node));
  if (part) ctx->saved_data[kPart] = std::vector<int64_t>{part->begin, part->count, part->of};
  return {};
}

at::Tensor kept_rows(AutogradContext* ctx, const at::Tensor& saved) {
  const auto it = ctx->saved_data.find(kNode);
  if (it == ctx->saved_data.end()) return saved;
  const auto node = c10::static_intrusive_pointer_cast<NodeHolder>(it->second.toCapsule())->node;
  if (last_made.node != node.get() || last_made.number != node->sequence_nr()) {
    const at::AutoGradMode no_grad(false);
    last_made = {node.get(), node->sequence_nr(), recomputes().at(typeid(*node))(*node)};
  }
  const auto part = ctx->saved_data.find(kPart);
  if (part == ctx->saved_data.end()) return last_made.rows;
  const auto range = part->second.toIntVector();
  const int64_t each = last_made.rows.size(0) / range[2];  // rows of the matrix for a row of x
  return last_made.rows.narrow(0, range[0] * each, range[1] * each);
}

}  // namespace graft::ops
