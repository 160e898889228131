#include "arguments.h"
#include "cuda_kernels.h"

namespace graft::ops {
namespace {

// A plan's tensors as kernels take them, 32 bits a number, and what is made of them where it is
// asked for. Kept alive by the caller until the launch is queued.
class Plan {
 public:
  Plan(const Call& call, const ExpertRows& rows)
      : call_(call),
        rows_(rows),
        offsets_(call.dense(rows.offsets, at::kInt)),
        pair_(call.dense(rows.pair, at::kInt)) {
    GRAFT_CHECK(rows.slots > 0 && rows.tokens() * rows.slots < int64_t{1} << 31, kCudaArea,
                "a plan must tell the slots of a token, and there must be fewer than 2^31; got ",
                rows.slots);
  }

  graft::cuda::ExpertRanges ranges() const {
    return {offsets_.const_data_ptr<int>(), static_cast<int>(rows_.experts())};
  }
  const int* pair() const { return pair_.const_data_ptr<int>(); }
  // A row's mask is that of its pair, wherever the row lies.
  graft::cuda::DropoutMask mask(const Dropout& dropout) const {
    graft::cuda::DropoutMask mask = dropout_mask(dropout);
    mask.rows = pair();
    return mask;
  }

  // The row of each pair, -1 without: [tokens * slots].
  at::Tensor positions() const {
    const at::Tensor row = at::full({pairs()}, -1, pair_.options());
    return row.index_copy_(0, rows_.pair, at::arange(rows_.rows(), pair_.options()));
  }
  // Numbers of the rows as numbers of the pairs, [tokens * slots].
  at::Tensor by_pair(const at::Tensor& of_rows) const {
    if (!of_rows.defined()) return of_rows;
    return call_.empty({pairs()}, at::kFloat)
        .zero_()
        .index_copy_(0, rows_.pair, call_.dense(of_rows, at::kFloat));
  }

  graft::cuda::ExpertRows rows_of(const at::Tensor& matrix, const at::Tensor& positions) const {
    return {.type = element_type(matrix.scalar_type()),
            .tokens = rows_.tokens(),
            .columns = matrix.size(1),
            .top_k = static_cast<int>(rows_.slots),
            .positions = positions.defined() ? positions.const_data_ptr<int>() : nullptr};
  }

 private:
  int64_t pairs() const { return rows_.tokens() * rows_.slots; }

  const Call& call_;
  const ExpertRows& rows_;
  const at::Tensor offsets_, pair_;
};

graft::cuda::FactorLayout layout_of(bool tall) {
  return tall ? graft::cuda::FactorLayout::columns_by_rank
              : graft::cuda::FactorLayout::rank_by_columns;
}

int padded(int64_t rank) {
  const int padded = graft::cuda::padded_rank(static_cast<int>(rank));
  GRAFT_CHECK(padded > 0, kCudaArea, "the rank must be in [1, 64]; got ", rank);
  return padded;
}

// [M, rank] as kernels read it: [M, padded rank] of the wide matrices' type.
at::Tensor padded_hidden(const Call& call, const at::Tensor& hidden, at::ScalarType type,
                         const ExpertRows& rows) {
  GRAFT_CHECK(hidden.dim() == 2 && hidden.size(0) == rows.rows(), kCudaArea,
              "a hidden matrix must have ", rows.rows(), " rows; got ", hidden.sizes());
  const int64_t rank = hidden.size(1);
  return at::constant_pad_nd(call.dense(hidden, type), {0, padded(rank) - rank}, 0);
}

void check_rows(const Call& call, const at::Tensor& matrix, const ExpertRows& rows) {
  call.check_sizes(matrix.dim() == 2 && matrix.size(0) == rows.rows(), matrix, rows.token);
}

}  // namespace

at::Tensor CudaKernels::expert_shrink(const at::Tensor& x_in, const ExpertFactor& factor,
                                      double scale, const Dropout& dropout,
                                      const ExpertRows& rows) const {
  const Call call("expert_shrink", x_in);
  const auto type = x_in.scalar_type();
  const at::Tensor x = call.dense(x_in, type), V = call.dense(factor.values, type);
  check_rows(call, x, rows);
  call.check_sizes(V.dim() == 3 && V.size(0) == rows.experts() && factor.columns() == x.size(1), x,
                   V);
  const Plan plan(call, rows);
  const int rank = static_cast<int>(factor.rank());
  const at::Tensor out = call.empty({x.size(0), padded(rank)}, at::kFloat),
                   space = call.workspace(
                       graft::cuda::lora_shrink_workspace(x.size(0), x.size(1), rank));
  call.check(graft::cuda::launch_lora_shrink({.type = element_type(type),
                                              .x = pointer(x),
                                              .factor = pointer(V),
                                              .layout = layout_of(factor.tall),
                                              .rows = x.size(0),
                                              .columns = x.size(1),
                                              .rank = rank,
                                              .scale = static_cast<float>(scale),
                                              .dropout = plan.mask(dropout),
                                              .experts = plan.ranges(),
                                              .out_fp32 = own_floats(out),
                                              .workspace = own_floats(space)},
                                             call.stream()));
  return out.narrow(1, 0, rank);
}

at::Tensor CudaKernels::expert_expand(const at::Tensor& hidden_in, const ExpertFactor& factor,
                                      double scale, const Dropout& dropout,
                                      const at::Tensor& base_in, const ExpertRows& rows) const {
  const Call call("expert_expand", hidden_in);
  const auto type = factor.values.scalar_type();
  const at::Tensor V = call.dense(factor.values, type),
                   hidden = padded_hidden(call, hidden_in, type, rows),
                   base = call.dense_or_none(base_in, type);
  const int64_t columns = factor.columns();
  call.check_sizes(
      V.dim() == 3 && V.size(0) == rows.experts() && factor.rank() == hidden_in.size(1), hidden_in,
      V);
  if (base.defined()) {
    check_rows(call, base, rows);
    call.check_sizes(base.size(1) == columns, base, V);
  }
  const Plan plan(call, rows);
  const at::Tensor out = call.empty({hidden.size(0), columns}, type);
  call.check(graft::cuda::launch_lora_expand({.type = element_type(type),
                                              .hidden = pointer(hidden),
                                              .factor = pointer(V),
                                              .layout = layout_of(factor.tall),
                                              .rows = hidden.size(0),
                                              .columns = columns,
                                              .rank = static_cast<int>(factor.rank()),
                                              .scale = static_cast<float>(scale),
                                              .dropout = plan.mask(dropout),
                                              .experts = plan.ranges(),
                                              .base = pointer(base),
                                              .out = out.mutable_data_ptr()},
                                             call.stream()));
  return out;
}

at::Tensor CudaKernels::expert_outer(const at::Tensor& hidden_in, const at::Tensor& x_in, bool tall,
                                     double scale, const Dropout& dropout,
                                     const ExpertRows& rows) const {
  const Call call("expert_outer", x_in);
  const auto type = x_in.scalar_type();
  const at::Tensor x = call.dense(x_in, type), hidden = padded_hidden(call, hidden_in, type, rows);
  check_rows(call, x, rows);
  const Plan plan(call, rows);
  const int64_t E = rows.experts(), columns = x.size(1), rank = hidden_in.size(1);
  const at::Tensor out = tall ? call.empty({E, columns, rank}, at::kFloat)
                              : call.empty({E, rank, columns}, at::kFloat),
                   space = call.workspace(graft::cuda::lora_outer_workspace(
                       x.size(0), columns, static_cast<int>(rank), static_cast<int>(E)));
  call.check(graft::cuda::launch_lora_outer({.type = element_type(type),
                                             .hidden = pointer(hidden),
                                             .x = pointer(x),
                                             .layout = layout_of(tall),
                                             .rows = x.size(0),
                                             .columns = columns,
                                             .rank = static_cast<int>(rank),
                                             .scale = static_cast<float>(scale),
                                             .dropout = plan.mask(dropout),
                                             .experts = plan.ranges(),
                                             .out = own_floats(out),
                                             .workspace = own_floats(space)},
                                            call.stream()));
  return out;
}

at::Tensor CudaKernels::gather_rows(const at::Tensor& tokens_in, const ExpertRows& rows) const {
  const Call call("gather_rows", tokens_in);
  const auto type = tokens_in.scalar_type();
  const at::Tensor tokens = call.dense(tokens_in, type);
  call.check_sizes(tokens.dim() == 2 && tokens.size(0) == rows.tokens(), tokens, rows.token);
  const Plan plan(call, rows);
  const at::Tensor out = call.empty({rows.rows(), tokens.size(1)}, type);
  call.check(graft::cuda::launch_dispatch_forward(plan.rows_of(tokens, {}), pointer(tokens),
                                                  plan.pair(), out.mutable_data_ptr(), rows.rows(),
                                                  call.stream()));
  return out;
}

at::Tensor CudaKernels::combine_rows(const at::Tensor& values_in, const at::Tensor& weights_in,
                                     const ExpertRows& rows) const {
  const Call call("combine_rows", values_in);
  const auto type = values_in.scalar_type();
  const at::Tensor values = call.dense(values_in, type);
  check_rows(call, values, rows);
  const Plan plan(call, rows);
  const at::Tensor positions = plan.positions(), weights = plan.by_pair(weights_in),
                   out = call.empty({rows.tokens(), values.size(1)}, type);
  call.check(graft::cuda::launch_combine_forward(plan.rows_of(values, positions), pointer(values),
                                                 floats(weights), out.mutable_data_ptr(),
                                                 call.stream()));
  return out;
}

std::pair<at::Tensor, at::Tensor> CudaKernels::combine_rows_backward(const at::Tensor& values_in,
                                                                     const at::Tensor& weights_in,
                                                                     const at::Tensor& gradient_in,
                                                                     const ExpertRows& rows) const {
  const Call call("combine_rows_backward", values_in);
  const auto type = values_in.scalar_type();
  const at::Tensor values = call.dense(values_in, type), gradient = call.dense(gradient_in, type);
  check_rows(call, values, rows);
  call.check_sizes(gradient.dim() == 2 && gradient.size(0) == rows.tokens() &&
                       gradient.size(1) == values.size(1),
                   gradient, values);
  const Plan plan(call, rows);
  const at::Tensor positions = plan.positions(), weights = plan.by_pair(weights_in),
                   d_values = call.empty(values.sizes(), type),
                   d_weights = call.empty({positions.size(0)}, at::kFloat);
  call.check(graft::cuda::launch_combine_backward(
      plan.rows_of(values, positions), pointer(values), floats(weights), pointer(gradient),
      d_values.mutable_data_ptr(), own_floats(d_weights), call.stream()));
  return {d_values, d_weights.index_select(0, rows.pair)};
}

SlotOrder CudaKernels::slot_order(const at::Tensor& groups_in, int64_t count) const {
  const Call call("slot_order", groups_in);
  const at::Tensor groups = call.dense(groups_in, at::kInt);
  const int64_t slots = groups.numel();
  const at::Tensor places = call.empty({slots}, at::kInt),
                   order = call.empty({slots}, at::kInt).zero_(),
                   offsets = call.empty({count + 1}, at::kInt);
  // One choice a token: the order knows slots alone.
  const graft::cuda::Routing routing = {.tokens = slots,
                                        .experts = static_cast<int>(count),
                                        .top_k = 1,
                                        .ids = groups.mutable_data_ptr<int>(),
                                        .weights = nullptr};
  const at::Tensor space =
      call.empty({static_cast<int64_t>(graft::cuda::router_order_workspace(routing))}, at::kInt);
  call.check(graft::cuda::launch_router_order(
      routing, places.mutable_data_ptr<int>(), order.mutable_data_ptr<int>(),
      offsets.mutable_data_ptr<int>(), space.mutable_data_ptr<int>(), call.stream()));
  return {order.to(at::kLong), places.to(at::kLong), offsets.to(at::kLong)};
}

std::pair<at::Tensor, at::Tensor> CudaKernels::router(const at::Tensor& logits_in,
                                                      int64_t top_k) const {
  const Call call("router", logits_in);
  const at::Tensor logits = call.dense(logits_in, at::kFloat);
  call.check_sizes(logits.dim() == 2, logits, logits);
  const at::Tensor ids = call.empty({logits.size(0), top_k}, at::kInt),
                   weights = call.empty({logits.size(0), top_k}, at::kFloat);
  call.check(graft::cuda::launch_router_forward({.tokens = logits.size(0),
                                                 .experts = static_cast<int>(logits.size(1)),
                                                 .top_k = static_cast<int>(top_k),
                                                 .ids = ids.mutable_data_ptr<int>(),
                                                 .weights = own_floats(weights)},
                                                floats(logits), call.stream()));
  return {ids.to(at::kLong), weights};
}

at::Tensor CudaKernels::router_backward(const at::Tensor& experts_in, const at::Tensor& weights_in,
                                        const at::Tensor& gradient_in, int64_t count) const {
  const Call call("router_backward", weights_in);
  const at::Tensor ids = call.dense(experts_in, at::kInt),
                   weights = call.dense(weights_in, at::kFloat),
                   gradient = call.dense(gradient_in, at::kFloat);
  call.check_sizes(ids.sizes() == weights.sizes() && gradient.sizes() == weights.sizes(), weights,
                   gradient);
  const at::Tensor d_logits = call.empty({ids.size(0), count}, at::kFloat);
  call.check(graft::cuda::launch_router_backward({.tokens = ids.size(0),
                                                  .experts = static_cast<int>(count),
                                                  .top_k = static_cast<int>(ids.size(1)),
                                                  .ids = ids.mutable_data_ptr<int>(),
                                                  .weights = own_floats(weights)},
                                                 floats(gradient), own_floats(d_logits),
                                                 call.stream()));
  return d_logits;
}

}  // namespace graft::ops
