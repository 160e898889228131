#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/split_rows.h>
#include <torch/csrc/autograd/custom_function.h>

#include <numeric>

#include "split_part.h"
#include "tensor_rows.h"

namespace graft::ops {
namespace {

constexpr const char* kArea = "split_rows";

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct SplitRows : torch::autograd::Function<SplitRows> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x,
                               const std::vector<int64_t>& counts) {
    ctx->saved_data["counts"] = counts;
    // Of the bare data: the parts are no views of x to autograd, so that whoever gets one may treat
    // it like any other tensor.
    return x.variable_data().split_with_sizes(counts, 0);
  }

  static variable_list backward(AutogradContext*, variable_list gradients) {
    refuse_double_backward(kArea);
    return {at::cat(gradients, 0), at::Tensor()};  // zeros come for a part that nobody asked for
  }
};

using SplitNode = torch::autograd::CppNode<SplitRows>;

}  // namespace

std::vector<at::Tensor> split_rows(const at::Tensor& x, const std::vector<int64_t>& counts) {
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  GRAFT_CHECK(x.defined() && x.dim() >= 1 && x.size(0) == rows, kArea,
              "the counts must add up to the rows of x; got ", rows, " for x ", shape_of(x));
  return SplitRows::apply(x, counts);
}

std::optional<SplitPart> split_part(const at::Tensor& x) {
  const NodePointer node = x.grad_fn();
  if (!node || typeid(*node) != typeid(SplitNode)) return std::nullopt;
  const auto counts = static_cast<SplitNode&>(*node).ctx_.saved_data["counts"].toIntVector();
  const NodePointer source = node->next_edge(0).function;
  if (!source) return std::nullopt;
  const auto first = counts.begin() + x.output_nr();
  return SplitPart{source, std::accumulate(counts.begin(), first, int64_t{0}), *first,
                   std::accumulate(counts.begin(), counts.end(), int64_t{0})};
}

}  // namespace graft::ops
