#include "aten_experts.h"

#include <ATen/ATen.h>

#include "aten_rows.h"

namespace graft::ops::aten {
namespace {

// The experts' factors one below the other, [E r, n].
at::Tensor stacked(const ExpertFactor& factor) {
  const at::Tensor& V = factor.values;
  return (factor.tall ? V.transpose(1, 2) : V).reshape({-1, factor.columns()});
}

// hidden [M, r] in each row's own block of [M, E r], zeros elsewhere.
at::Tensor widened(const at::Tensor& hidden, const ExpertRows& rows) {
  const int64_t M = hidden.size(0), rank = hidden.size(1), E = rows.experts();
  const at::Tensor blocks = at::zeros({M, E + 1, rank}, hidden.options());
  blocks.scatter_(1, expert_of_rows(rows).view({M, 1, 1}).expand({M, 1, rank}),
                  hidden.unsqueeze(1));
  return blocks.narrow(1, 0, E).reshape({M, E * rank});
}

// Each row's own block of [M, E r]; 0 for rows without expert.
at::Tensor own_blocks(const at::Tensor& wide, const ExpertRows& rows) {
  const int64_t M = wide.size(0), E = rows.experts(), rank = wide.size(1) / E;
  const at::Tensor expert = expert_of_rows(rows);
  return wide.view({M, E, rank})
      .gather(1, expert.clamp_max(E - 1).view({M, 1, 1}).expand({M, 1, rank}))
      .squeeze(1)
      .masked_fill_((expert == E).unsqueeze(1), 0);
}

// The row of each (token, slot) pair; M: it has none.  int64 [tokens * slots].
at::Tensor row_of_pairs(const ExpertRows& rows) {
  const at::Tensor row = at::full({rows.tokens() * rows.slots}, rows.rows(), rows.pair.options());
  return row.index_copy_(0, rows.pair, at::arange(rows.rows(), rows.pair.options()));
}

}  // namespace

at::Tensor expert_of_rows(const ExpertRows& rows) {
  return at::searchsorted(rows.offsets.slice(0, 1).contiguous(),
                          at::arange(rows.rows(), rows.offsets.options()), /*out_int32=*/false,
                          /*right=*/true);
}

at::Tensor expert_shrink(const at::Tensor& x, const ExpertFactor& factor, double scale,
                         const Dropout& dropout, const ExpertRows& rows) {
  const at::Tensor dropped = dropout_rows(x, rows.pair, dropout);
  return own_blocks(dropped.mm(stacked(factor).t()), rows).mul_(scale);
}

at::Tensor expert_expand(const at::Tensor& hidden, const ExpertFactor& factor, double scale,
                         const Dropout& dropout, const at::Tensor& base, const ExpertRows& rows) {
  const at::Tensor product = widened(hidden, rows).mm(stacked(factor)).mul_(scale);
  const at::Tensor term = dropout_rows(product, rows.pair, dropout);
  return base.defined() ? base + term : term;
}

at::Tensor expert_outer(const at::Tensor& hidden, const at::Tensor& x, bool tall, double scale,
                        const Dropout& dropout, const ExpertRows& rows) {
  const at::Tensor sums =
      widened(hidden, rows).t().mm(dropout_rows(x, rows.pair, dropout)).mul_(scale);
  const at::Tensor factors = sums.view({rows.experts(), hidden.size(1), x.size(1)});
  return tall ? factors.transpose(1, 2).contiguous() : factors;
}

// Pairs without a row read a row of zeros behind the last: LibTorch's sums by index would add in an
// order of chance.
at::Tensor combine_rows(const at::Tensor& values, const at::Tensor& weights,
                        const ExpertRows& rows) {
  const int64_t n = values.size(1);
  const at::Tensor weighted = weights.defined() ? values * weights.unsqueeze(1) : values,
                   with_zeros = at::cat({weighted, at::zeros({1, n}, values.options())});
  return with_zeros.index_select(0, row_of_pairs(rows)).view({rows.tokens(), rows.slots, n}).sum(1);
}

std::pair<at::Tensor, at::Tensor> combine_rows_backward(const at::Tensor& values,
                                                        const at::Tensor& weights,
                                                        const at::Tensor& gradient,
                                                        const ExpertRows& rows) {
  const at::Tensor spread = gradient.index_select(0, rows.token);
  return {spread * weights.unsqueeze(1), (values * spread).sum(1)};
}

SlotOrder slot_order(const at::Tensor& groups, int64_t count) {
  const auto numbers = groups.options();
  const at::Tensor order =
      std::get<1>(at::sort(groups, /*stable=*/true, /*dim=*/0, /*descending=*/false));
  const at::Tensor places =
      at::empty_like(order).index_copy_(0, order, at::arange(order.size(0), numbers));
  const at::Tensor sizes = at::zeros({count + 1}, numbers)
                               .scatter_add_(0, groups.clamp_max(count), at::ones_like(groups));
  const at::Tensor offsets = at::zeros({count + 1}, numbers);
  offsets.slice(0, 1).copy_(sizes.narrow(0, 0, count).cumsum(0));
  return {order, places, offsets};
}

}  // namespace graft::ops::aten
