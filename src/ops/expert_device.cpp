#include "expert_device.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>

#include "aten_experts.h"
#include "cuda_dispatch.h"
#include "tensor_rows.h"

namespace graft::ops::device {
namespace {

constexpr int64_t kMostExperts = 256;  // cuda/kernels.h

// The kernels for rows of this type, or null. `master`: the type of factors and weights.
const DeviceKernels* kernels(const at::Tensor& place, at::ScalarType type, int64_t columns,
                             at::ScalarType master, const ExpertRows& rows, int64_t rank = 1) {
  GRAFT_CHECK(rows.slots > 0, "experts", "a plan on a device must tell the slots of a token; got ",
              rows.slots);
  return kernels_for({.op = DeviceOp::experts,
                      .type = type,
                      .rows = rows.tokens() * rows.slots,
                      .columns = columns,
                      .rank = rank,
                      .one_type = master != at::kDouble,
                      .plain = rows.experts() <= kMostExperts},
                     place.device());
}

ExpertFactor as(const ExpertFactor& factor, at::ScalarType type) {
  return {factor.values.detach().to(type), factor.tall};
}

}  // namespace

at::Tensor expert_shrink(const at::Tensor& x, const ExpertFactor& factor, double scale,
                         const Dropout& dropout, const ExpertRows& rows) {
  const auto type = x.scalar_type(), master = factor.values.scalar_type();
  if (const auto* by = kernels(x, type, x.size(1), master, rows, factor.rank()))
    return by->expert_shrink(x, as(factor, type), scale, dropout, rows);
  return aten::expert_shrink(x.detach().to(master), as(factor, master), scale, dropout, rows);
}

at::Tensor expert_expand(const at::Tensor& hidden, const ExpertFactor& factor, double scale,
                         const Dropout& dropout, const at::Tensor& base, at::ScalarType type,
                         const ExpertRows& rows) {
  const auto master = factor.values.scalar_type();
  if (const auto* by = kernels(hidden, type, factor.columns(), master, rows, factor.rank()))
    return by->expert_expand(hidden, as(factor, type), scale, dropout, base, rows);
  return aten::expert_expand(hidden.to(master), as(factor, master), scale, dropout,
                             base.defined() ? base.to(master) : base, rows);
}

at::Tensor expert_outer(const at::Tensor& hidden, const at::Tensor& x, bool tall, double scale,
                        const Dropout& dropout, at::ScalarType master, const ExpertRows& rows) {
  if (const auto* by = kernels(x, x.scalar_type(), x.size(1), master, rows, hidden.size(1)))
    return by->expert_outer(hidden, x, tall, scale, dropout, rows);
  return aten::expert_outer(hidden.to(master), x.detach().to(master), tall, scale, dropout, rows);
}

at::Tensor gather_rows(const at::Tensor& tokens, const ExpertRows& rows) {
  const auto type = tokens.scalar_type();
  if (const auto* by = kernels(tokens, type, tokens.size(1), type, rows))
    return by->gather_rows(tokens, rows);
  return tokens.detach().index_select(0, rows.token);
}

at::Tensor combine_rows(const at::Tensor& values, const at::Tensor& weights,
                        const ExpertRows& rows) {
  const auto type = values.scalar_type(), wide = compute_type(type);
  if (const auto* by = kernels(values, type, values.size(1),
                               weights.defined() ? weights.scalar_type() : type, rows))
    return by->combine_rows(values, weights, rows);
  return aten::combine_rows(values.to(wide), weights.defined() ? weights.to(wide) : weights, rows)
      .to(type);
}

std::pair<at::Tensor, at::Tensor> combine_rows_backward(const at::Tensor& values,
                                                        const at::Tensor& weights,
                                                        const at::Tensor& gradient,
                                                        const ExpertRows& rows) {
  const auto type = values.scalar_type();
  if (const auto* by = kernels(values, type, values.size(1), weights.scalar_type(), rows))
    return by->combine_rows_backward(values, weights, gradient, rows);
  const auto master = weights.scalar_type();
  return aten::combine_rows_backward(values.to(master), weights, gradient.to(master), rows);
}

SlotOrder slot_order(const at::Tensor& groups, int64_t count) {
  const DeviceKernels* by = kernels_for({.op = DeviceOp::experts,
                                         .type = at::kFloat,
                                         .rows = groups.size(0),
                                         .rank = 1,
                                         .plain = count <= kMostExperts},
                                        groups.device());
  return by != nullptr ? by->slot_order(groups, count) : aten::slot_order(groups, count);
}

}  // namespace graft::ops::device
