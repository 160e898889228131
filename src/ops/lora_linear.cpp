#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/frozen_product.h>
#include <graft/ops/lora_linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include "function_arguments.h"
#include "kept_rows.h"
#include "tensor_rows.h"

namespace graft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// s a^T b for tall a [t, r] and b [t, n]: the long dimension last in the output, where matrix
// libraries are fast.
at::Tensor tall_product(const at::Tensor& a, const at::Tensor& b, double scale) {
  return thin_product(a.t(), b.t()).mul_(scale);
}

at::Tensor times(const at::Tensor& a, const at::Tensor& b) {
  return b.defined() ? a * b : a;
}

// p * B, one factor an output row.
at::Tensor output_factors(const at::Tensor& B, const at::Tensor& factor) {
  return factor.defined() ? B * factor.unsqueeze(1) : B;
}

// The arguments of the operation in their order, of which `backward` returns the gradients.
enum Input { kX, kWeight, kBias, kA, kB, kLoraBias, kGate, kFactor, kInputs };

class LoraLinear : public torch::autograd::Function<LoraLinear> {
 public:
  using Optional = std::optional<at::Tensor>;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const Optional& base_bias, const at::Tensor& A, const at::Tensor& B,
                            const Optional& branch_bias, const Optional& gate_in,
                            const Optional& factor_in, double scale, const Dropout& dropout) {
    const at::Tensor bias = base_bias.value_or(at::Tensor()),
                     lora_bias = branch_bias.value_or(at::Tensor()),
                     gate = gate_in.value_or(at::Tensor()),
                     factor = factor_in.value_or(at::Tensor());
    const at::Tensor rows = x.reshape({-1, weight.size(1)});
    const auto master = A.scalar_type();
    const at::Tensor H = thin_product(apply_dropout(rows.to(master), dropout), A);
    at::Tensor y = frozen_product(rows, weight, bias,
                                  {times(H, gate), (output_factors(B, factor) * scale).t()});
    if (lora_bias.defined()) y.add_(lora_bias, scale);

    std::vector<bool> wanted;
    for (const at::Tensor* input : {&x, &weight, &bias, &A, &B, &lora_bias, &gate, &factor})
      wanted.push_back(input->defined() && input->requires_grad());
    const bool needs_rows = wanted[kA] || wanted[kWeight];
    ctx->save_for_backward({keep_rows(ctx, x, rows, needs_rows), H, weight, A, B, gate, factor});
    int64_t mask = 0;
    for (int i = 0; i < kInputs; ++i) mask |= int64_t{wanted[i]} << i;
    ctx->saved_data["wanted"] = mask;
    ctx->saved_data["scale"] = scale;
    save_dropout(ctx, dropout);
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = weight.size(0);
    return at::_unsafe_view(y.to(x.scalar_type()),
                            shape);  // not a view: callers may add a bias in place
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("lora");
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor rows = kept_rows(ctx, saved[0]);
    const at::Tensor &H = saved[1], &weight = saved[2], &A = saved[3], &B = saved[4],
                     &gate = saved[5], &factor = saved[6];
    const int64_t mask = ctx->saved_data["wanted"].toInt();
    const auto wanted = [mask](Input input) { return (mask >> input & 1) != 0; };
    const double scale = ctx->saved_data["scale"].toDouble();
    const Dropout dropout = saved_dropout(ctx);
    const auto master = A.scalar_type();
    const at::Tensor dy = grads[0].reshape({-1, weight.size(0)});
    const at::Tensor dy_master = dy.to(master);

    variable_list result(kInputs + 2);
    if (wanted(kB) || wanted(kFactor)) {
      const at::Tensor dB = tall_product(times(H, gate), dy_master, scale).t();
      if (wanted(kFactor)) result[kFactor] = (dB * B).sum(1);
      if (wanted(kB)) result[kB] = output_factors(dB, factor);
    }
    at::Tensor dS;
    if (wanted(kA) || wanted(kGate) || wanted(kX)) {
      const at::Tensor U = thin_product(dy_master, output_factors(B, factor).t()).mul_(scale);
      if (wanted(kGate)) result[kGate] = (U * H).sum(0);
      dS = times(U, gate);
    }
    if (wanted(kA)) result[kA] = tall_product(dS, apply_dropout(rows.to(master), dropout), 1.0);
    if (wanted(kX)) {
      at::Tensor dx;
      if (dropout.active()) {
        dx = frozen_product_backward(dy, weight).to(master);
        add_dropped_(dx, at::mm(dS, A), dropout);
      } else {
        dx = frozen_product_backward(dy, weight, {dS, A});
      }
      std::vector<int64_t> shape = grads[0].sizes().vec();
      shape.back() = weight.size(1);
      result[kX] = dx.to(dy.scalar_type()).view(shape);
    }
    if (wanted(kWeight)) result[kWeight] = at::mm(dy.t(), rows).to(weight.scalar_type());
    if (wanted(kBias)) result[kBias] = dy.sum(0);
    if (wanted(kLoraBias)) result[kLoraBias] = dy_master.sum(0).mul_(scale);
    return result;
  }
};

void check_vector(const at::Tensor& vector, int64_t size, const char* name, const char* what) {
  GRAFT_CHECK(!vector.defined() || (vector.dim() == 1 && vector.size(0) == size), "lora", name,
              " must hold one number ", what, ": [", size, "]; got ", vector.sizes());
}

}  // namespace

at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       const LoraTerm& term) {
  check_dropout(term.dropout.p, "lora");
  GRAFT_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), "lora",
              "the input's last dimension must match the weight [out, in]; got ", x.sizes(),
              " and ", weight.sizes());
  GRAFT_CHECK(term.A.dim() == 2 && term.B.dim() == 2 && term.A.size(1) == weight.size(1) &&
                  term.B.size(0) == weight.size(0) && term.A.size(0) == term.B.size(1),
              "lora", "A must be [r, in] and B [out, r] for a weight of ", weight.sizes(), "; got ",
              term.A.sizes(), " and ", term.B.sizes());
  GRAFT_CHECK(x.device() == weight.device() && x.device() == term.A.device(), "lora",
              "input, weight and adapter must be on one device; got ", x.device().str(), ", ",
              weight.device().str(), " and ", term.A.device().str());
  check_vector(term.gate, term.A.size(0), "gate", "a hidden unit");
  check_vector(term.factor, weight.size(0), "factor", "an output");
  return LoraLinear::apply(x, weight, optional(bias), term.A, term.B, optional(term.bias),
                           optional(term.gate), optional(term.factor), term.scale, term.dropout);
}

}  // namespace graft::ops
