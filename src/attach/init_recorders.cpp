#include "init_recorders.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/frozen_product.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

namespace graft {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::ScalarType wide(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// y = x W^T + b; backward adds dy^T x to the sum.
class GradientTap : public torch::autograd::Function<GradientTap> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor&,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            GradientRecorder* recorder) {
    const at::Tensor rows = x.reshape({-1, weight.size(1)});
    ctx->save_for_backward({rows, weight});
    ctx->saved_data["recorder"] = reinterpret_cast<int64_t>(recorder);
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = weight.size(0);
    return at::_unsafe_view(  // not a view: torch's layers add to it in place
        ops::frozen_product(rows, weight, bias.value_or(at::Tensor())), shape);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &rows = saved[0], &weight = saved[1];
    auto* recorder = reinterpret_cast<GradientRecorder*>(ctx->saved_data["recorder"].toInt());
    const at::Tensor dy = grads[0].reshape({-1, weight.size(0)});
    const auto type = recorder->sum.scalar_type();
    recorder->sum.addmm_(dy.to(type).t(), rows.to(type));
    ++recorder->backward_runs;
    at::Tensor dx;
    if (ctx->needs_input_grad(0)) {
      std::vector<int64_t> shape = grads[0].sizes().vec();
      shape.back() = weight.size(1);
      dx = ops::frozen_product_backward(dy, weight).view(shape);
    }
    return {dx, {}, {}, {}, {}};
  }
};

}  // namespace

nn::Adapter::Merged InitRecorder::merge(const nn::FrozenLayer&) const {
  fail("init", "a layer that is being listened to cannot be merged");
}

GradientRecorder::GradientRecorder(const nn::FrozenLinear& layer)
    : sum(at::zeros(layer.weight.sizes(), layer.weight.options().dtype(wide(layer.weight)))),
      anchor_(at::zeros({}, at::kFloat).set_requires_grad(true)) {}

at::Tensor GradientRecorder::record(const nn::FrozenLinear& layer, const at::Tensor& x) {
  const auto bias = layer.bias.defined() ? std::optional(layer.bias) : std::nullopt;
  return GradientTap::apply(x, anchor_, layer.weight, bias, this);
}

void CovarianceSink::take(const at::Tensor& x) {
  const at::Tensor wide_rows = x.to(wide(x));
  if (!sum.defined()) sum = at::zeros({x.size(1), x.size(1)}, wide_rows.options());
  sum.addmm_(wide_rows.t(), wide_rows);
  rows += x.size(0);
}

int64_t InputGroups::add_layer() {
  group_.push_back(-1);
  return static_cast<int64_t>(group_.size()) - 1;
}

void InputGroups::report(int64_t layer, const at::Tensor& x) {
  const bool same = last_.defined() && last_.data_ptr() == x.data_ptr() &&
                    last_.sizes() == x.sizes() && last_.strides() == x.strides();
  if (finding) {
    if (group_[layer] < 0) {
      if (!same) owner_.push_back(layer);
      group_[layer] = same ? last_group_ : groups() - 1;
    }
    last_ = x;
    last_group_ = group_[layer];
    return;
  }
  const int64_t group = group_[layer];
  if (group < 0 || owner_[group] != layer) return;
  at::Tensor rows = x.detach().reshape({-1, x.size(-1)});
  if (mask.defined()) {
    GRAFT_CHECK(mask.numel() == rows.size(0), "init",
                "a mask must hold one value a row of the layers' inputs; got ", mask.numel(),
                " for ", rows.size(0));
    rows = rows.index_select(0, mask.reshape(-1).nonzero().squeeze(1));
  }
  sinks[group]->take(rows);
}

std::vector<int64_t> InputGroups::members(int64_t group) const {
  std::vector<int64_t> found;
  for (size_t i = 0; i < group_.size(); ++i)
    if (group_[i] == group) found.push_back(static_cast<int64_t>(i));
  return found;
}

at::Tensor InputRecorder::record(const nn::FrozenLinear& layer, const at::Tensor& x) {
  groups_.report(layer_, x);
  return layer.apply(x);
}

}  // namespace graft
