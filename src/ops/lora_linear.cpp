#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/frozen_product.h>
#include <graft/ops/lora_linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include "cuda_dispatch.h"
#include "function_arguments.h"
#include "kept_rows.h"
#include "lora_device.h"
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

// g * H, one number of g for each unit or for each group of units.  H: [tokens, r].
at::Tensor gated(const at::Tensor& H, const at::Tensor& gate, const std::vector<int64_t>& ranks) {
  if (!gate.defined()) return H;
  if (ranks.empty()) return H * gate;
  at::Tensor result = at::empty_like(H);
  int64_t first = 0;
  for (size_t e = 0; e < ranks.size(); first += ranks[e++]) {
    at::Tensor group = result.narrow(1, first, ranks[e]);
    at::mul_out(group, H.narrow(1, first, ranks[e]), gate.narrow(-1, static_cast<int64_t>(e), 1));
  }
  return result;
}

// dg from d(g * H) * H, [tokens, r]: summed over units of a group, and over tokens that share g.
at::Tensor gate_gradient(const at::Tensor& products, const at::Tensor& gate,
                         const std::vector<int64_t>& ranks) {
  const at::Tensor units = gate.dim() == 1 ? products.sum(0, /*keepdim=*/true) : products;
  if (ranks.empty()) return units.view_as(gate);
  std::vector<at::Tensor> groups;
  int64_t first = 0;
  for (const int64_t rank : ranks) {
    groups.push_back(units.narrow(1, first, rank).sum(1, /*keepdim=*/true));
    first += rank;
  }
  return at::cat(groups, 1).view_as(gate);
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
                            const Optional& factor_in, double scale, const Dropout& dropout,
                            const std::vector<int64_t>& ranks) {
    const at::Tensor bias = base_bias.value_or(at::Tensor()),
                     lora_bias = branch_bias.value_or(at::Tensor()),
                     gate = gate_in.value_or(at::Tensor()),
                     factor = factor_in.value_or(at::Tensor());
    const at::Tensor rows = x.reshape({-1, weight.size(1)});
    const auto master = A.scalar_type();
    const LowRankLayer layer{weight, bias, A,  B,     lora_bias, gate,
                             factor, {},   {}, scale, dropout,   ranks};
    at::Tensor y, H;
    const DeviceKernels* kernels = lora_kernels(rows, layer);
    ctx->saved_data["kernels"] = kernels != nullptr;
    if (kernels != nullptr) {
      const LayerOutput out = lora_forward(*kernels, rows, layer);
      y = out.y;
      H = out.hidden;
    } else {
      H = thin_product(apply_dropout(rows.to(master), dropout), A);
      y = frozen_product(rows, weight, bias,
                         {gated(H, gate, ranks), (output_factors(B, factor) * scale).t()});
      if (lora_bias.defined()) y.add_(lora_bias, scale);
    }

    std::vector<bool> wanted;
    for (const at::Tensor* input : {&x, &weight, &bias, &A, &B, &lora_bias, &gate, &factor})
      wanted.push_back(input->defined() && input->requires_grad());
    const bool needs_rows = wanted[kA] || wanted[kWeight];
    ctx->save_for_backward({keep_rows(ctx, x, rows, needs_rows), H, weight, A, B, gate, factor});
    int64_t mask = 0;
    for (int i = 0; i < kInputs; ++i) mask |= int64_t{wanted[i]} << i;
    ctx->saved_data["wanted"] = mask;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["ranks"] = ranks;
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
    const std::vector<int64_t> ranks = ctx->saved_data["ranks"].toIntVector();
    const Dropout dropout = saved_dropout(ctx);
    const auto master = A.scalar_type();
    const at::Tensor dy = grads[0].reshape({-1, weight.size(0)});

    variable_list result(kInputs + 3);
    if (wanted(kWeight)) result[kWeight] = at::mm(dy.t(), rows).to(weight.scalar_type());
    if (wanted(kBias)) result[kBias] = dy.sum(0);
    if (wanted(kLoraBias)) result[kLoraBias] = dy.to(master).sum(0).mul_(scale);
    std::vector<int64_t> shape = grads[0].sizes().vec();
    shape.back() = weight.size(1);
    if (ctx->saved_data["kernels"].toBool()) {
      const LowRankLayer layer{weight, {}, A, B, {}, gate, factor, {}, {}, scale, dropout, ranks};
      const LayerGradients g =
          lora_backward(*device_kernels(), dy, rows, H, layer,
                        {wanted(kX), wanted(kA), wanted(kB), wanted(kGate), wanted(kFactor)});
      if (wanted(kX)) result[kX] = g.x.view(shape);
      result[kA] = g.A;
      result[kB] = g.B;
      if (wanted(kGate)) result[kGate] = gate_gradient(g.gate, gate, ranks);
      result[kFactor] = g.factor;
      return result;
    }
    const at::Tensor dy_master = dy.to(master);
    if (wanted(kB) || wanted(kFactor)) {
      const at::Tensor dB = tall_product(gated(H, gate, ranks), dy_master, scale).t();
      if (wanted(kFactor)) result[kFactor] = (dB * B).sum(1);
      if (wanted(kB)) result[kB] = output_factors(dB, factor);
    }
    at::Tensor dS;
    if (wanted(kA) || wanted(kGate) || wanted(kX)) {
      const at::Tensor U = thin_product(dy_master, output_factors(B, factor).t()).mul_(scale);
      if (wanted(kGate)) result[kGate] = gate_gradient(U * H, gate, ranks);
      dS = gated(U, gate, ranks);
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
      result[kX] = dx.to(dy.scalar_type()).view(shape);
    }
    return result;
  }
};

void check_vector(const at::Tensor& vector, int64_t size, const char* name, const char* what) {
  GRAFT_CHECK(!vector.defined() || (vector.dim() == 1 && vector.size(0) == size), "lora", name,
              " must hold one number ", what, ": [", size, "]; got ", vector.sizes());
}

// The gate as [E] or [tokens, E], E = r without groups.
at::Tensor checked_gate(const at::Tensor& x, const LoraTerm& term) {
  const int64_t rank = term.A.size(0);
  int64_t sum = 0;
  for (const int64_t r : term.ranks) {
    GRAFT_CHECK(r >= 1, "lora", "the rank of every group must be at least 1; got ", r);
    sum += r;
  }
  GRAFT_CHECK(term.ranks.empty() || (sum == rank && term.gate.defined()), "lora",
              "the ranks of the groups must sum to A's rows, and a gate be given; got ", sum,
              " of ", rank, term.gate.defined() ? "" : " without a gate");
  if (!term.gate.defined()) return {};
  const at::Tensor& gate = term.gate;
  const int64_t numbers = term.ranks.empty() ? rank : static_cast<int64_t>(term.ranks.size());
  const int64_t tokens = x.size(-1) == 0 ? 0 : x.numel() / x.size(-1);
  GRAFT_CHECK(gate.dim() >= 1 && gate.size(-1) == numbers &&
                  (gate.dim() == 1 || gate.numel() == tokens * numbers),
              "lora", "gate must hold one number a ", term.ranks.empty() ? "hidden unit" : "group",
              ": [", numbers, "], or that for each of ", tokens, " tokens; got ", gate.sizes());
  GRAFT_CHECK(gate.scalar_type() == term.A.scalar_type(), "lora", "gate must have A's dtype, ",
              term.A.toString(), "; got ", gate.toString());
  return gate.dim() == 1 ? gate : gate.reshape({-1, numbers});
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
  check_one_device("lora", {x, weight, bias, term.A, term.B, term.bias, term.gate, term.factor});
  check_vector(term.factor, weight.size(0), "factor", "an output");
  return LoraLinear::apply(x, weight, optional(bias), term.A, term.B, optional(term.bias),
                           optional(checked_gate(x, term)), optional(term.factor), term.scale,
                           term.dropout, term.ranks);
}

}  // namespace graft::ops
