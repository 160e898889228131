#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/expert_linear.h>
#include <graft/ops/frozen_product.h>
#include <graft/ops/lora_linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include "cuda_dispatch.h"
#include "expert_sums.h"
#include "expert_terms.h"
#include "function_arguments.h"
#include "kept_rows.h"
#include "tensor_rows.h"

namespace graft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kArea = "experts";

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
    const at::Tensor S = hidden_rows(x, by_token, A, rows, dropout);
    at::Tensor y = frozen_product(x, weight, bias.value_or(at::Tensor()));
    if (by_token) y = token_rows(y, rows);
    y = add_output_terms(y, S, B, scale, rows);
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
    // A device's kernels read wide matrices in their own type.
    const at::Tensor dy =
        (on_device(grads[0]) ? grads[0] : grads[0].to(A.scalar_type())).contiguous();

    variable_list result(9);
    const auto [U, dB] = output_gradients(dy, S, B, scale, rows, wanted(kB));
    result[kB] = dB;
    if (wanted(kA)) result[kA] = input_factor_gradient(U, x, by_token, A, rows, dropout);
    if (wanted(kX)) result[kX] = input_gradient(dy, type, U, A, weight, rows, dropout, by_token);
    return result;
  }

 private:
  static at::Tensor input_gradient(const at::Tensor& dy, at::ScalarType type, const at::Tensor& U,
                                   const at::Tensor& A, const at::Tensor& weight,
                                   const ExpertRows& rows, const Dropout& dropout, bool by_token) {
    const at::Tensor dx =
        frozen_product_backward((by_token ? sum_rows(dy, {}, rows) : dy).to(type), weight)
            .to(dy.scalar_type());
    add_through_terms(dx, by_token, U, A, type, rows, dropout);
    return dx.to(type);
  }
};

void check(const at::Tensor& x, int64_t rows_of_x, const at::Tensor& weight, const at::Tensor& bias,
           const ExpertTerm& term, const ExpertRows& rows) {
  GRAFT_CHECK(
      weight.dim() == 2 && x.dim() == 2 && x.size(1) == weight.size(1) && x.size(0) == rows_of_x,
      kArea, "the input must be [", rows_of_x, ", in] for a weight [out, in]; got ", x.sizes(),
      " and ", weight.sizes());
  check_float(x, kArea, "the input");
  check_one_device(kArea, {x, weight});
  check_term(weight, bias, term, rows);
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

}  // namespace graft::ops
