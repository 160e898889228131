#include "top_k_softmax.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <torch/csrc/autograd/custom_function.h>

#include "cuda_dispatch.h"
#include "tensor_rows.h"

namespace graft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kMostExperts = 256, kMostChoices = 8;  // cuda/kernels.h

class TopKSoftmax : public torch::autograd::Function<TopKSoftmax> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, int64_t top_k) {
    const auto [experts, weights] = device_kernels()->router(logits, top_k);
    ctx->save_for_backward({experts, weights});
    ctx->saved_data["count"] = logits.size(1);
    ctx->mark_non_differentiable({experts});
    return {experts, weights};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("router");
    const auto saved = ctx->get_saved_variables();
    return {device_kernels()->router_backward(saved[0], saved[1], grads[1],
                                              ctx->saved_data["count"].toInt()),
            at::Tensor()};
  }
};

}  // namespace

bool has_router_kernel(const at::Tensor& logits, int64_t top_k, bool softmax) {
  if (!on_device(logits)) return false;
  return kernels_for({.op = DeviceOp::router,
                      .type = logits.scalar_type(),
                      .rows = logits.size(0),
                      .columns = logits.size(1),
                      .plain = softmax && top_k <= kMostChoices && logits.size(1) <= kMostExperts},
                     logits.device()) != nullptr;
}

std::pair<at::Tensor, at::Tensor> top_k_softmax(const at::Tensor& logits, int64_t top_k) {
  const variable_list result = TopKSoftmax::apply(logits, top_k);
  return {result[0], result[1]};
}

}  // namespace graft::ops
