#include "init_recorders.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/frozen_product.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <utility>

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
    const auto type = wide(weight);
    if (recorder->sum.defined())
      recorder->sum.addmm_(dy.to(type).t(), rows.to(type));
    else
      recorder->sum = dy.to(type).t().mm(rows.to(type));
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

GradientRecorder::GradientRecorder()
    : anchor_(register_parameter("anchor", at::zeros({}, at::kFloat))) {}

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

at::Tensor InputGroups::counting_rows(const at::Tensor& x) const {
  const at::Tensor rows = x.detach().reshape({-1, x.size(-1)});
  if (!mask.defined()) return rows;
  GRAFT_CHECK(mask.numel() == rows.size(0), "init",
              "a mask must hold one value a row of the layers' inputs; got ", mask.numel(), " for ",
              rows.size(0));
  return rows.index_select(0, mask.reshape(-1).nonzero().squeeze(1));
}

void InputGroups::report(int64_t layer, const at::Tensor& x) {
  if (finding_) return find_group(layer, x);
  const int64_t group = group_[layer];
  if (group >= 0 && owner_[group] == layer) sinks_[group]->take(counting_rows(x));
}

void InputGroups::find_group(int64_t layer, const at::Tensor& x) {
  const bool same = open_.defined() && open_.data_ptr() == x.data_ptr() &&
                    open_.sizes() == x.sizes() && open_.strides() == x.strides();
  const bool is_new = group_[layer] < 0;
  if (is_new && same) {
    group_[layer] = groups() - 1;
    return;
  }
  if (is_new) {
    close_group();
    open_ = x;
    owner_.push_back(layer);
    group_[layer] = groups() - 1;
  }
  // A layer that runs several times in a batch hands over the rows of each.
  const int64_t group = group_[layer];
  if (owner_[group] != layer) return;
  const at::Tensor rows = counting_rows(x);
  if (group < static_cast<int64_t>(sinks_.size()))
    sinks_[group]->take(rows);
  else
    open_rows_.push_back(mask.defined() ? rows : rows.clone());
}

void InputGroups::close_group() {
  if (!open_.defined()) return;
  sinks_.push_back(make_sink_(groups() - 1));
  for (const auto& rows : open_rows_) sinks_.back()->take(rows);
  open_rows_.clear();
  open_ = at::Tensor();
}

void InputGroups::end_batch() {
  close_group();
  finding_ = false;
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
