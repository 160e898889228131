#include "expert_terms.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/frozen_product.h>

#include <algorithm>
#include <vector>

#include "cuda_dispatch.h"
#include "expert_device.h"
#include "expert_kernels.h"

namespace graft::ops {
namespace {

constexpr const char* kArea = "experts";
// Columns of a tile: an expert's factor of that width stays in the first-level cache up to rank 8.
constexpr int64_t kTile = 128;

// The expert of each row; -1: none.
std::vector<int64_t> expert_of_rows(const ExpertRows& rows) {
  std::vector<int64_t> experts(rows.rows(), -1);
  for_experts(rows, [&](int64_t e, int64_t first, int64_t count) {
    std::fill_n(experts.begin() + first, count, e);
  });
  return experts;
}

// Calls f with a value of the type of the factors.
template <class F>
void for_master(const at::Tensor& factor, const F& f) {
  if (factor.scalar_type() == at::kDouble)
    f(double{});
  else
    f(float{});
}

// The rows of x, on a device.
at::Tensor device_rows(const at::Tensor& x, bool by_token, const ExpertRows& rows) {
  return by_token ? device::gather_rows(x, rows) : x;
}

// x in the factors' type, with adjacent columns and rows.
at::Tensor dense_as(const at::Tensor& x, const at::Tensor& factor) {
  return x.detach().to(factor.scalar_type()).contiguous();
}

}  // namespace

at::Tensor hidden_rows(const at::Tensor& x_in, bool by_token, const at::Tensor& A_in,
                       const ExpertRows& rows, const Dropout& dropout) {
  if (on_device(x_in))
    return device::expert_shrink(device_rows(x_in, by_token, rows), {A_in}, 1.0, dropout, rows);
  const at::Tensor A = dense_as(A_in, A_in), x = dense_as(x_in, A);
  const int64_t n = A.size(2), rank = A.size(1);
  const at::Tensor S = at::zeros({rows.rows(), rank}, A.options());
  const std::vector<int64_t> experts = expert_of_rows(rows);
  const int64_t* token = rows.token.const_data_ptr<int64_t>();
  for_master(A, [&](auto zero) {
    using T = decltype(zero);
    const T *from = x.const_data_ptr<T>(), *factor = A.const_data_ptr<T>();
    T* to = S.mutable_data_ptr<T>();
    at::parallel_for(0, rows.routed(), rows_grain(n * rank), [&](int64_t begin, int64_t end) {
      std::vector<T> dropped(dropout.active() ? n : 0);
      for (int64_t m = begin; m < end; ++m) {
        const T* row = from + (by_token ? token[m] : m) * n;
        if (dropout.active()) {
          mask_row(dropped.data(), row, n, mask_of(rows, m, dropout));
          row = dropped.data();
        }
        products(to + m * rank, row, factor + experts[m] * rank * n, n, rank, n);
      }
    });
  });
  return S;
}

at::Tensor input_factor_gradient(const at::Tensor& U_in, const at::Tensor& x_in, bool by_token,
                                 const at::Tensor& A, const ExpertRows& rows,
                                 const Dropout& dropout) {
  if (on_device(x_in))
    return device::expert_outer(U_in, device_rows(x_in, by_token, rows), /*tall=*/false, 1.0,
                                dropout, A.scalar_type(), rows);
  const at::Tensor U = U_in.contiguous(), x = dense_as(x_in, A);
  const int64_t n = A.size(2), rank = A.size(1);
  const at::Tensor dA = at::zeros(A.sizes(), U.options());
  const int64_t* token = rows.token.const_data_ptr<int64_t>();
  for_master(A, [&](auto zero) {
    using T = decltype(zero);
    const T *from = x.const_data_ptr<T>(), *u = U.const_data_ptr<T>();
    T* to = dA.mutable_data_ptr<T>();
    for_tiles(n, kTile, rows.rows(), [&](const Tile& tile) {
      const int64_t column = tile.first, columns = tile.columns;
      alignas(64) T some[kOuterRows][kTile];
      for_experts(rows, [&](int64_t e, int64_t first, int64_t count) {
        for (int64_t m = first; m < first + count; m += kOuterRows) {
          const int64_t of = std::min(kOuterRows, first + count - m);
          for (int64_t i = 0; i < of; ++i) {
            const T* row = from + (by_token ? token[m + i] : m + i) * n + column;
            if (dropout.active())
              mask_row(some[i], row, columns, mask_of(rows, m + i, dropout, column));
            else
              std::copy_n(row, columns, some[i]);
          }
          add_outer(to + e * rank * n + column, n, u + m * rank, some[0], kTile, of, rank, columns);
        }
      });
    });
  });
  return dA;
}

void add_through_terms(const at::Tensor& target, bool by_token, const at::Tensor& U_in,
                       const at::Tensor& A_in, at::ScalarType type, const ExpertRows& rows,
                       const Dropout& dropout) {
  if (on_device(U_in)) {
    const at::Tensor through =
        device::expert_expand(U_in, {A_in}, 1.0, dropout, /*base=*/{}, type, rows);
    target.add_(by_token ? device::combine_rows(through, {}, rows) : through);
    return;
  }
  const at::Tensor U = U_in.contiguous(), A = dense_as(A_in, A_in);
  const int64_t n = A.size(2), rank = A.size(1);
  const std::vector<int64_t> experts = expert_of_rows(rows);
  const int64_t *offsets = rows.token_offsets.const_data_ptr<int64_t>(),
                *token_rows = rows.token_rows.const_data_ptr<int64_t>();
  for_master(A, [&](auto zero) {
    using T = decltype(zero);
    const T *u = U.const_data_ptr<T>(), *factor = A.const_data_ptr<T>();
    T* to = target.mutable_data_ptr<T>();
    at::parallel_for(0, rows.tokens(), rows_grain(n * rank), [&](int64_t begin, int64_t end) {
      std::vector<T> through(dropout.active() ? n : 0);
      for (int64_t i = offsets[begin]; i < offsets[end]; ++i) {
        const int64_t m = token_rows[i];
        if (experts[m] < 0) continue;
        T* row = to + (by_token ? rows.token.const_data_ptr<int64_t>()[m] : m) * n;
        const T* A_e = factor + experts[m] * rank * n;
        if (!dropout.active()) {
          add_products(row, u + m * rank, A_e, n, rank, n);
          continue;
        }
        std::fill(through.begin(), through.end(), T{0});
        add_products(through.data(), u + m * rank, A_e, n, rank, n);
        add_masked_row(row, through.data(), n, mask_of(rows, m, dropout));
      }
    });
  });
}

at::Tensor add_output_terms(const at::Tensor& y_in, const at::Tensor& S, const at::Tensor& B,
                            double scale, const ExpertRows& rows) {
  if (on_device(y_in))
    return device::expert_expand(S, {B, /*tall=*/true}, scale, {}, y_in, y_in.scalar_type(), rows);
  const at::Tensor y = y_in.to(B.scalar_type());
  for_experts(rows, [&](int64_t e, int64_t first, int64_t count) {
    y.narrow(0, first, count).addmm_(S.narrow(0, first, count), B[e].t(), 1, scale);
  });
  return y;
}

OutputGradients output_gradients(const at::Tensor& dy_in, const at::Tensor& S, const at::Tensor& B,
                                 double scale, const ExpertRows& rows, bool wants_B) {
  const ExpertFactor factor{B, /*tall=*/true};
  if (on_device(dy_in))
    return {device::expert_shrink(dy_in, factor, scale, {}, rows),
            wants_B ? device::expert_outer(S, dy_in, factor.tall, scale, {}, B.scalar_type(), rows)
                    : at::Tensor()};
  const at::Tensor dy = dy_in.to(B.scalar_type());
  OutputGradients result{at::zeros_like(S), {}};
  if (wants_B) result.B = at::zeros(B.sizes(), dy.options());
  for_experts(rows, [&](int64_t e, int64_t first, int64_t count) {
    const at::Tensor part = dy.narrow(0, first, count);
    if (wants_B)
      result.B[e].copy_(thin_product(S.narrow(0, first, count).t(), part.t()).t()).mul_(scale);
    result.hidden.narrow(0, first, count).copy_(thin_product(part, B[e].t())).mul_(scale);
  });
  return result;
}

void check_term(const at::Tensor& weight, const at::Tensor& bias, const ExpertTerm& term,
                const ExpertRows& rows) {
  check_dropout(term.dropout.p, kArea);
  check_one_device(kArea, {weight, bias, term.A, term.B, rows.token});
  const int64_t E = rows.experts();
  GRAFT_CHECK(term.A.dim() == 3 && term.B.dim() == 3 && term.A.size(0) == E &&
                  term.B.size(0) == E && term.A.size(2) == weight.size(1) &&
                  term.B.size(1) == weight.size(0) && term.A.size(1) == term.B.size(2),
              kArea, "A must be [", E, ", r, in] and B [", E, ", out, r] for a weight of ",
              weight.sizes(), "; got ", term.A.sizes(), " and ", term.B.sizes());
  GRAFT_CHECK(term.A.scalar_type() == term.B.scalar_type() &&
                  (term.A.scalar_type() == at::kFloat || term.A.scalar_type() == at::kDouble),
              kArea, "A and B must be float32 or float64 both; got ", term.A.toString(), " and ",
              term.B.toString());
  GRAFT_CHECK(!weight.requires_grad() && !(bias.defined() && bias.requires_grad()), kArea,
              "the base must be frozen, no gradient reaches it; got one that requires a gradient");
}

}  // namespace graft::ops
