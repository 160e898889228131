#include <graft/ops/expert_rows.h>

#include "cuda_dispatch.h"
#include "expert_device.h"
#include "expert_kernels.h"
#include "expert_sums.h"
#include "tensor_rows.h"

namespace graft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Calls f with a value of float or double.
template <class F>
void for_type(at::ScalarType type, F&& f) {
  GRAFT_CHECK(type == at::kFloat || type == at::kDouble, "experts",
              "rows must be float32 or float64; got ", at::toString(type));
  if (type == at::kDouble)
    f(double{});
  else
    f(float{});
}

// <values[m], of_tokens[token of m]> for each row, [M].
at::Tensor row_dots(const at::Tensor& values_in, const at::Tensor& of_tokens_in,
                    const ExpertRows& rows) {
  const at::Tensor values = values_in.contiguous(), of_tokens = of_tokens_in.contiguous();
  const int64_t n = values.size(1);
  const at::Tensor dots = at::empty({rows.rows()}, values.options());
  const int64_t* token = rows.token.const_data_ptr<int64_t>();
  for_type(values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *a = values.const_data_ptr<T>(), *b = of_tokens.const_data_ptr<T>();
    T* out = dots.mutable_data_ptr<T>();
    at::parallel_for(0, rows.rows(), rows_grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) out[m] = dot(a + m * n, b + token[m] * n, n);
    });
  });
  return dots;
}

// of_tokens[token of m] * weights[m], [M, n].
at::Tensor spread_rows(const at::Tensor& of_tokens_in, const at::Tensor& weights_in,
                       const ExpertRows& rows) {
  const at::Tensor of_tokens = of_tokens_in.contiguous(), weights = weights_in.contiguous();
  const int64_t n = of_tokens.size(1);
  const at::Tensor spread = at::zeros({rows.rows(), n}, of_tokens.options());
  const int64_t* token = rows.token.const_data_ptr<int64_t>();
  for_type(of_tokens.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *from = of_tokens.const_data_ptr<T>(), *weight = weights.const_data_ptr<T>();
    T* out = spread.mutable_data_ptr<T>();
    at::parallel_for(0, rows.rows(), rows_grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        add_scaled(out + m * n, from + token[m] * n, weight[m], n);
    });
  });
  return spread;
}

class GatherTokens : public torch::autograd::Function<GatherTokens> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const ExpertRows& rows) {
    save_expert_rows(ctx, rows);
    return token_rows(x, rows);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("experts");
    const auto type = grads[0].scalar_type();
    const at::Tensor summed = sum_rows(grads[0].to(compute_type(type)), {}, saved_expert_rows(ctx));
    return {summed.to(type), at::Tensor()};
  }
};

class CombineRows : public torch::autograd::Function<CombineRows> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& values,
                            const at::Tensor& weights, const ExpertRows& rows) {
    save_expert_rows(ctx, rows);
    ctx->save_for_backward({values, weights});
    return sum_rows(values, weights, rows);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("experts");
    const auto saved = ctx->get_saved_variables();
    const ExpertRows rows = saved_expert_rows(ctx);
    const auto [values, weights] =
        on_device(grads[0])
            ? device::combine_rows_backward(saved[0], saved[1], grads[0], rows)
            : std::pair(spread_rows(grads[0], saved[1], rows), row_dots(saved[0], grads[0], rows));
    return {values, weights, at::Tensor()};
  }
};

}  // namespace

int64_t ExpertRows::routed() const {
  if (routed_rows >= 0) return routed_rows;
  return offsets.narrow(0, experts(), 1).cpu().const_data_ptr<int64_t>()[0];
}

int64_t ExpertRows::only_expert() const {
  if (rows() == 0 || rows() != tokens()) return -1;
  if (on_device(token)) return experts() == 1 && routed_rows == rows() ? 0 : -1;
  if (routed() != rows()) return -1;
  const int64_t *starts = offsets.const_data_ptr<int64_t>(),
                *pairs = pair.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows(); ++row)
    if (pairs[row] != row) return -1;
  for (int64_t e = 0; e < experts(); ++e)
    if (starts[e + 1] - starts[e] == rows()) return e;
  return -1;
}

at::Tensor sum_rows(const at::Tensor& values_in, const at::Tensor& weights_in,
                    const ExpertRows& rows) {
  if (on_device(values_in)) return device::combine_rows(values_in, weights_in, rows);
  const at::Tensor values = values_in.contiguous(),
                   weights = weights_in.defined() ? weights_in.contiguous() : weights_in;
  const int64_t n = values.size(1);
  const at::Tensor sums = at::zeros({rows.tokens(), n}, values.options());
  const int64_t *offsets = rows.token_offsets.const_data_ptr<int64_t>(),
                *token_rows = rows.token_rows.const_data_ptr<int64_t>();
  for_type(values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *from = values.const_data_ptr<T>(),
            *weight = weights.defined() ? weights.const_data_ptr<T>() : nullptr;
    T* out = sums.mutable_data_ptr<T>();
    at::parallel_for(0, rows.tokens(), rows_grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t i = offsets[t]; i < offsets[t + 1]; ++i)
          add_scaled(out + t * n, from + token_rows[i] * n,
                     weight == nullptr ? T{1} : weight[token_rows[i]], n);
    });
  });
  return sums;
}

at::Tensor token_rows(const at::Tensor& x, const ExpertRows& rows) {
  return on_device(x) ? device::gather_rows(x, rows) : x.index_select(0, rows.token);
}

void save_expert_rows(AutogradContext* ctx, const ExpertRows& rows) {
  ctx->saved_data["offsets"] = rows.offsets;
  ctx->saved_data["token"] = rows.token;
  ctx->saved_data["pair"] = rows.pair;
  ctx->saved_data["token_offsets"] = rows.token_offsets;
  ctx->saved_data["token_rows"] = rows.token_rows;
  ctx->saved_data["slots"] = rows.slots;
  ctx->saved_data["routed_rows"] = rows.routed_rows;
}

ExpertRows saved_expert_rows(AutogradContext* ctx) {
  const auto tensor = [&](const char* name) { return ctx->saved_data[name].toTensor(); };
  return {tensor("offsets"),
          tensor("token"),
          tensor("pair"),
          tensor("token_offsets"),
          tensor("token_rows"),
          ctx->saved_data["slots"].toInt(),
          ctx->saved_data["routed_rows"].toInt()};
}

at::Tensor gather_tokens(const at::Tensor& x, const ExpertRows& rows) {
  check_float(x, "experts", "the tokens");
  check_one_device("experts", {x, rows.token});
  GRAFT_CHECK(x.dim() == 2 && x.size(0) == rows.tokens(), "experts", "tokens must be [",
              rows.tokens(), ", n]; got ", x.sizes());
  return GatherTokens::apply(x, rows);
}

at::Tensor combine_rows(const at::Tensor& values, const at::Tensor& weights,
                        const ExpertRows& rows) {
  check_float(values, "experts", "the values");
  check_float(weights, "experts", "the weights");
  check_one_device("experts", {values, weights, rows.token});
  GRAFT_CHECK(values.dim() == 2 && values.size(0) == rows.rows() && weights.dim() == 1 &&
                  weights.size(0) == rows.rows() && values.scalar_type() == weights.scalar_type(),
              "experts", "values and weights must be [", rows.rows(), ", n] and [", rows.rows(),
              "] of one type; got ", values.toString(), " of ", values.sizes(), " and ",
              weights.toString(), " of ", weights.sizes());
  return CombineRows::apply(values, weights, rows);
}

}  // namespace graft::ops
