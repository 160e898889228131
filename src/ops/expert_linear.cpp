#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/expert_linear.h>
#include <graft/ops/frozen_product.h>
#include <graft/ops/lora_linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include "dropout_rows.h"
#include "expert_sums.h"
#include "function_arguments.h"
#include "kept_rows.h"
#include "tensor_rows.h"

namespace graft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kArea = "experts";

// Calls f(expert, first row, rows) for each expert that has rows.
template <class F>
void for_experts(const ExpertRows& rows, const F& f) {
  const int64_t* offsets = rows.offsets.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < rows.experts(); ++e)
    if (offsets[e + 1] > offsets[e]) f(e, offsets[e], offsets[e + 1] - offsets[e]);
}

// Rows [first, first + x.size(0)) under the dropout mask, each with its pair's row of it; in place.
template <class T>
void mask_rows(const at::Tensor& x, int64_t first, const ExpertRows& rows, const Dropout& dropout) {
  const int64_t columns = x.size(1);
  const int64_t* pair = rows.pair.const_data_ptr<int64_t>() + first;
  T* data = x.mutable_data_ptr<T>();
  at::parallel_for(0, x.size(0), rows_grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      mask_row(data + m * columns, data + m * columns, columns,
               {dropout.key, static_cast<uint32_t>(pair[m]), dropout.threshold(), dropout.scale()});
  });
}

void mask_rows_(const at::Tensor& x, int64_t first, const ExpertRows& rows,
                const Dropout& dropout) {
  if (!dropout.active()) return;
  if (x.scalar_type() == at::kDouble)
    mask_rows<double>(x, first, rows, dropout);
  else
    mask_rows<float>(x, first, rows, dropout);
}

// drop(x) of some rows, [count, in] of type `master`. x is by token or by row.
at::Tensor dropped_rows(const at::Tensor& x, bool by_token, int64_t first, int64_t count,
                        const ExpertRows& rows, const Dropout& dropout, at::ScalarType master) {
  at::Tensor part =
      by_token ? x.index_select(0, rows.token.narrow(0, first, count)) : x.narrow(0, first, count);
  part = part.to(master);
  if (!dropout.active()) return part;
  if (!by_token && part.is_alias_of(x)) part = part.clone();
  part = part.contiguous();
  mask_rows_(part, first, rows, dropout);
  return part;
}

// S = drop(x) A_e^T row by row, [M, r]; 0 for rows without expert.
at::Tensor hidden_rows(const at::Tensor& x, bool by_token, const at::Tensor& A,
                       const ExpertRows& rows, const Dropout& dropout) {
  at::Tensor S = at::zeros({rows.rows(), A.size(1)}, A.options().requires_grad(false));
  for_experts(rows, [&](int64_t e, int64_t first, int64_t count) {
    S.narrow(0, first, count)
        .copy_(thin_product(dropped_rows(x, by_token, first, count, rows, dropout, A.scalar_type()),
                            A[e]));
  });
  return S;
}

// dA_e = U_e^T drop(x_e), [E, r, in].
at::Tensor input_factor_gradient(const at::Tensor& U, const at::Tensor& x, bool by_token,
                                 const at::Tensor& A, const ExpertRows& rows,
                                 const Dropout& dropout) {
  at::Tensor dA = at::zeros(A.sizes(), U.options());
  for_experts(rows, [&](int64_t e, int64_t first, int64_t count) {
    const at::Tensor in = dropped_rows(x, by_token, first, count, rows, dropout, U.scalar_type());
    dA[e].copy_(thin_product(U.narrow(0, first, count).t(), in.t()));
  });
  return dA;
}

// mask(U A_e) row by row, added to the rows of `target` [M, in].
void add_through_terms(const at::Tensor& target, const at::Tensor& U, const at::Tensor& A,
                       const ExpertRows& rows, const Dropout& dropout) {
  for_experts(rows, [&](int64_t e, int64_t first, int64_t count) {
    at::Tensor part = target.narrow(0, first, count);
    const at::Tensor u = U.narrow(0, first, count);
    if (!dropout.active()) {
      part.addmm_(u, A[e]);
      return;
    }
    const at::Tensor through = at::mm(u, A[e]);
    mask_rows_(through, first, rows, dropout);
    part.add_(through);
  });
}

// Which inputs want a gradient, as bits.
int64_t wanted_bits(std::initializer_list<const at::Tensor*> inputs) {
  int64_t bits = 0, place = 0;
  for (const at::Tensor* input : inputs) bits |= int64_t{input->requires_grad()} << place++;
  return bits;
}

class ExpertLinear : public torch::autograd::Function<ExpertLinear> {
 public:
  enum Input { kX, kA, kB };

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& A,
                            const at::Tensor& B, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, double scale,
                            const Dropout& dropout, const ExpertRows& rows, bool by_token) {
    const auto master = A.scalar_type();
    const at::Tensor S = hidden_rows(x, by_token, A, rows, dropout);
    at::Tensor y = frozen_product(x, weight, bias.value_or(at::Tensor())).to(master);
    if (by_token) y = y.index_select(0, rows.token);
    for_experts(rows, [&](int64_t e, int64_t first, int64_t count) {
      y.narrow(0, first, count).addmm_(S.narrow(0, first, count), B[e].t(), 1, scale);
    });
    const int64_t wanted = wanted_bits({&x, &A, &B});
    ctx->saved_data["wanted"] = wanted;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["by_token"] = by_token;
    save_dropout(ctx, dropout);
    save_expert_rows(ctx, rows);
    ctx->save_for_backward({keep_rows(ctx, x, x, (wanted >> kA & 1) != 0), S, A, B, weight});
    return y.to(x.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward(kArea);
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor x = kept_rows(ctx, saved[0]);
    const at::Tensor &S = saved[1], &A = saved[2], &B = saved[3], &weight = saved[4];
    const ExpertRows rows = saved_expert_rows(ctx);
    const Dropout dropout = saved_dropout(ctx);
    const int64_t bits = ctx->saved_data["wanted"].toInt();
    const auto wanted = [bits](Input input) { return (bits >> input & 1) != 0; };
    const double scale = ctx->saved_data["scale"].toDouble();
    const bool by_token = ctx->saved_data["by_token"].toBool();
    const auto type = grads[0].scalar_type();
    const at::Tensor dy = grads[0].to(A.scalar_type()).contiguous();

    variable_list result(9);
    at::Tensor U = at::zeros_like(S);
    if (wanted(kB)) result[kB] = at::zeros(B.sizes(), dy.options());
    for_experts(rows, [&](int64_t e, int64_t first, int64_t count) {
      const at::Tensor part = dy.narrow(0, first, count);
      if (wanted(kB))
        result[kB][e].copy_(thin_product(S.narrow(0, first, count).t(), part.t()).t()).mul_(scale);
      U.narrow(0, first, count).copy_(thin_product(part, B[e].t())).mul_(scale);
    });
    if (wanted(kA)) result[kA] = input_factor_gradient(U, x, by_token, A, rows, dropout);
    if (wanted(kX)) result[kX] = input_gradient(dy, type, U, A, weight, rows, dropout, by_token);
    return result;
  }

 private:
  static at::Tensor input_gradient(const at::Tensor& dy, at::ScalarType type, const at::Tensor& U,
                                   const at::Tensor& A, const at::Tensor& weight,
                                   const ExpertRows& rows, const Dropout& dropout, bool by_token) {
    const at::Tensor through_base =
        frozen_product_backward((by_token ? sum_rows(dy, {}, rows) : dy).to(type), weight)
            .to(dy.scalar_type());
    if (!by_token) {
      add_through_terms(through_base, U, A, rows, dropout);
      return through_base.to(type);
    }
    const at::Tensor through_terms = at::zeros({rows.rows(), A.size(2)}, dy.options());
    add_through_terms(through_terms, U, A, rows, dropout);
    return (through_base + sum_rows(through_terms, {}, rows)).to(type);
  }
};

class ExpertSumLinear : public torch::autograd::Function<ExpertSumLinear> {
 public:
  enum Input { kX, kRowWeights, kA, kB };

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& row_weights, const at::Tensor& A, const at::Tensor& B,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias_in,
                            double scale, const Dropout& dropout, const ExpertRows& rows,
                            bool sum_to_one) {
    const auto master = A.scalar_type();
    const at::Tensor bias = bias_in.value_or(at::Tensor());
    const at::Tensor S = hidden_rows(x, /*by_token=*/false, A, rows, dropout);
    const at::Tensor summed = sum_rows(x.to(master), row_weights, rows).to(x.scalar_type());
    const at::Tensor left = by_expert(S, row_weights, rows), right = stacked(B, scale);
    at::Tensor y = frozen_product(summed, weight, sum_to_one ? bias : at::Tensor(), {left, right});
    if (bias.defined() && !sum_to_one)
      y.addr_(sum_rows(row_weights.unsqueeze(1), {}, rows).squeeze(1), bias.to(master));

    const int64_t wanted = wanted_bits({&x, &row_weights, &A, &B});
    ctx->saved_data["wanted"] = wanted;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["sum_to_one"] = sum_to_one;
    save_dropout(ctx, dropout);
    save_expert_rows(ctx, rows);
    const bool needs_rows = (wanted & (1 << kA | 1 << kRowWeights)) != 0;
    ctx->save_for_backward({keep_rows(ctx, x, x, needs_rows), S, row_weights, A, B, weight, bias});
    return y.to(x.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward(kArea);
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor x = kept_rows(ctx, saved[0]);
    const at::Tensor &S = saved[1], &w = saved[2], &A = saved[3], &B = saved[4], &weight = saved[5],
                     &bias = saved[6];
    const ExpertRows rows = saved_expert_rows(ctx);
    const Dropout dropout = saved_dropout(ctx);
    const int64_t bits = ctx->saved_data["wanted"].toInt();
    const auto wanted = [bits](Input input) { return (bits >> input & 1) != 0; };
    const double scale = ctx->saved_data["scale"].toDouble();
    const auto master = A.scalar_type();
    const at::Tensor dy = grads[0].to(master).contiguous();
    const int64_t E = A.size(0), rank = A.size(1);

    variable_list result(10);
    const at::Tensor q = own_block(thin_product(dy, stacked(B, scale)), E, rows);
    const at::Tensor dS = q * w.unsqueeze(1);
    if (wanted(kB)) {
      const at::Tensor dB = thin_product(by_expert(S, w, rows).t(), dy.t()).mul_(scale);
      result[kB] = dB.view({E, rank, -1}).transpose(1, 2);
    }
    if (wanted(kA)) result[kA] = input_factor_gradient(dS, x, false, A, rows, dropout);
    at::Tensor v;
    if (wanted(kX) || wanted(kRowWeights)) v = frozen_product_backward(grads[0], weight).to(master);
    if (wanted(kRowWeights)) {
      at::Tensor dw = row_dots(x.to(master), v, rows) + (S * q).sum(1);
      if (bias.defined() && !ctx->saved_data["sum_to_one"].toBool())
        dw = dw + dy.mv(bias.to(master)).index_select(0, rows.token);
      result[kRowWeights] = dw;
    }
    if (wanted(kX)) {
      const at::Tensor dx = spread_rows(v, w, rows);
      add_through_terms(dx, dS, A, rows, dropout);
      result[kX] = dx.to(grads[0].scalar_type());
    }
    return result;
  }

 private:
  // s B of all experts one below the other, [E r, out].
  static at::Tensor stacked(const at::Tensor& B, double scale) {
    return (B.detach() * scale).transpose(1, 2).reshape({-1, B.size(1)});
  }

  // The position of each row's block among [tokens * E] blocks of r numbers; rows without expert
  // are left out.
  static at::Tensor blocks(const ExpertRows& rows) {
    const int64_t routed = rows.routed();
    const at::Tensor counts = rows.offsets.slice(0, 1) - rows.offsets.slice(0, 0, -1);
    const at::Tensor expert = at::repeat_interleave(counts, std::optional<int64_t>(routed));
    return rows.token.narrow(0, 0, routed) * rows.experts() + expert;
  }

  // w_m S_m at the block of the row's token and expert, zeros elsewhere: [tokens, E r]. A token has
  // an expert once at most.
  static at::Tensor by_expert(const at::Tensor& S, const at::Tensor& w, const ExpertRows& rows) {
    const int64_t E = rows.experts(), rank = S.size(1), routed = rows.routed();
    at::Tensor wide = at::zeros({rows.tokens() * E, rank}, S.options());
    wide.index_copy_(0, blocks(rows), (S * w.detach().unsqueeze(1)).narrow(0, 0, routed));
    return wide.view({rows.tokens(), E * rank});
  }

  // The block of [tokens, E r] that belongs to each row, [M, r]; 0 for rows without expert.
  static at::Tensor own_block(const at::Tensor& wide, int64_t experts, const ExpertRows& rows) {
    const int64_t rank = wide.size(1) / experts;
    at::Tensor own = at::zeros({rows.rows(), rank}, wide.options());
    own.narrow(0, 0, rows.routed())
        .copy_(wide.contiguous().view({-1, rank}).index_select(0, blocks(rows)));
    return own;
  }
};

void check(const at::Tensor& x, int64_t rows_of_x, const at::Tensor& weight, const at::Tensor& bias,
           const ExpertTerm& term, const ExpertRows& rows) {
  check_dropout(term.dropout.p, kArea);
  GRAFT_CHECK(
      weight.dim() == 2 && x.dim() == 2 && x.size(1) == weight.size(1) && x.size(0) == rows_of_x,
      kArea, "the input must be [", rows_of_x, ", in] for a weight [out, in]; got ", x.sizes(),
      " and ", weight.sizes());
  const int64_t E = rows.experts();
  GRAFT_CHECK(term.A.dim() == 3 && term.B.dim() == 3 && term.A.size(0) == E &&
                  term.B.size(0) == E && term.A.size(2) == weight.size(1) &&
                  term.B.size(1) == weight.size(0) && term.A.size(1) == term.B.size(2),
              kArea, "A must be [", E, ", r, in] and B [", E, ", out, r] for a weight of ",
              weight.sizes(), "; got ", term.A.sizes(), " and ", term.B.sizes());
  check_cpu_float(x, kArea, "the input");
  GRAFT_CHECK(term.A.scalar_type() == term.B.scalar_type() &&
                  (term.A.scalar_type() == at::kFloat || term.A.scalar_type() == at::kDouble),
              kArea, "A and B must be float32 or float64 both; got ", term.A.toString(), " and ",
              term.B.toString());
  GRAFT_CHECK(!weight.requires_grad() && !(bias.defined() && bias.requires_grad()), kArea,
              "the base must be frozen, no gradient reaches it; got one that requires a gradient");
}

at::Tensor one_expert(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                      const ExpertTerm& term, int64_t expert) {
  return lora_linear(x, weight, bias,
                     {term.A[expert], term.B[expert], {}, term.scale, term.dropout});
}

}  // namespace

at::Tensor expert_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                         const ExpertTerm& term, const ExpertRows& rows) {
  check(x, rows.tokens(), weight, bias, term, rows);
  if (const int64_t e = rows.only_expert(); e >= 0) return one_expert(x, weight, bias, term, e);
  return ExpertLinear::apply(x, term.A, term.B, weight, optional(bias), term.scale, term.dropout,
                             rows, /*by_token=*/true);
}

at::Tensor expert_row_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                             const ExpertTerm& term, const ExpertRows& rows) {
  check(x, rows.rows(), weight, bias, term, rows);
  if (const int64_t e = rows.only_expert(); e >= 0) return one_expert(x, weight, bias, term, e);
  return ExpertLinear::apply(x, term.A, term.B, weight, optional(bias), term.scale, term.dropout,
                             rows, /*by_token=*/false);
}

at::Tensor expert_sum_linear(const at::Tensor& x, const at::Tensor& row_weights,
                             const at::Tensor& weight, const at::Tensor& bias,
                             const ExpertTerm& term, const ExpertRows& rows, bool sum_to_one) {
  check(x, rows.rows(), weight, bias, term, rows);
  GRAFT_CHECK(row_weights.dim() == 1 && row_weights.size(0) == rows.rows() &&
                  row_weights.scalar_type() == term.A.scalar_type(),
              kArea, "weights must be [", rows.rows(), "] of A's dtype; got ",
              row_weights.toString(), " of ", row_weights.sizes());
  // One row a token and weights that sum to 1: the weights are 1 and have no gradient.
  if (const int64_t e = rows.only_expert(); e >= 0 && sum_to_one)
    return one_expert(x, weight, bias, term, e);
  return ExpertSumLinear::apply(x, row_weights, term.A, term.B, weight, optional(bias), term.scale,
                                term.dropout, rows, sum_to_one);
}

}  // namespace graft::ops
