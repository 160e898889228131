#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/expert_mlp.h>
#include <graft/ops/frozen_product.h>
#include <torch/csrc/autograd/custom_function.h>

#include "cuda_dispatch.h"
#include "expert_mlp_rows.h"
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

// s B of all experts one below the other, [E r, out].
at::Tensor stacked(const at::Tensor& B, double scale) {
  return (B.detach() * scale).transpose(1, 2).reshape({-1, B.size(1)});
}

// The position of each row's block among [tokens * E] blocks of r numbers; rows without expert are
// left out.
at::Tensor blocks(const ExpertRows& rows) {
  const int64_t routed = rows.routed();
  const at::Tensor counts = rows.offsets.slice(0, 1) - rows.offsets.slice(0, 0, -1);
  const at::Tensor expert = at::repeat_interleave(counts, std::optional<int64_t>(routed));
  return rows.token.narrow(0, 0, routed) * rows.experts() + expert;
}

// w_m S_m at the block of the row's token and expert, zeros elsewhere: [tokens, E r]. A token has
// an expert once at most.
at::Tensor by_expert(const at::Tensor& S, const at::Tensor& w, const ExpertRows& rows) {
  const int64_t E = rows.experts(), rank = S.size(1), routed = rows.routed();
  at::Tensor wide = at::zeros({rows.tokens() * E, rank}, S.options());
  wide.index_copy_(0, blocks(rows), (S * w.detach().unsqueeze(1)).narrow(0, 0, routed));
  return wide.view({rows.tokens(), E * rank});
}

// The block of [tokens, E r] that belongs to each row, [M, r]; 0 for rows without expert.
at::Tensor own_block(const at::Tensor& wide, int64_t experts, const ExpertRows& rows) {
  const int64_t rank = wide.size(1) / experts;
  at::Tensor own = at::zeros({rows.rows(), rank}, wide.options());
  own.narrow(0, 0, rows.routed())
      .copy_(wide.contiguous().view({-1, rank}).index_select(0, blocks(rows)));
  return own;
}

class ExpertMlpFunction : public torch::autograd::Function<ExpertMlpFunction> {
 public:
  enum Input { kX, kRowWeights, kGateA, kGateB, kUpA, kUpB, kDownA, kDownB, kInputs };

  // The factors come besides the block that holds them: they are what gradients reach.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& row_weights, const at::Tensor& gate_A,
                            const at::Tensor& gate_B, const at::Tensor& up_A,
                            const at::Tensor& up_B, const at::Tensor& down_A,
                            const at::Tensor& down_B, const ExpertMlp& block,
                            const ExpertRows& rows, bool sum_to_one) {
    const ExpertLayer &gate = block.gate, &up = block.up, &down = block.down;
    const GatedRows in{frozen_product(x, gate.weight, gate.bias),
                       frozen_product(x, up.weight, up.bias),
                       hidden_rows(x, /*by_token=*/true, gate_A, rows, gate.term.dropout),
                       hidden_rows(x, /*by_token=*/true, up_A, rows, up.term.dropout),
                       gate.term,
                       up.term,
                       down.term,
                       row_weights};
    const auto [summed, P] = gated_rows(in, rows);
    at::Tensor y = frozen_product(
        summed.to(x.scalar_type()), down.weight, sum_to_one ? down.bias : at::Tensor(),
        {by_expert(P, row_weights, rows), stacked(down_B, down.term.scale)});
    const bool weighs_bias = down.bias.defined() && !sum_to_one;
    if (weighs_bias)
      y.addr_(sum_rows(row_weights.unsqueeze(1), {}, rows).squeeze(1),
              down.bias.to(row_weights.scalar_type()));

    save_term(ctx, "gate", gate.term);
    save_term(ctx, "up", up.term);
    save_term(ctx, "down", down.term);
    save_expert_rows(ctx, rows);
    ctx->save_for_backward({keep_rows(ctx, x, x), row_weights, gate_A, gate_B, up_A, up_B, down_A,
                            down_B, in.gate, in.up, in.gate_hidden, in.up_hidden, P, gate.weight,
                            up.weight, down.weight, weighs_bias ? down.bias : at::Tensor()});
    return y.to(x.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward(kArea);
    const Saved saved(ctx);
    const GatedRows& in = saved.in;
    const ExpertRows& rows = saved.rows;
    const at::Tensor &w = in.weights, dy = grads[0].to(w.scalar_type()).contiguous();
    const ExpertTerm& down = in.down_term;
    const int64_t E = rows.experts();

    variable_list result(kInputs + 3);
    const at::Tensor q = own_block(thin_product(dy, stacked(down.B, down.scale)), E, rows);
    const at::Tensor dB =
        thin_product(by_expert(saved.down_hidden, w, rows).t(), dy.t()).mul_(down.scale);
    result[kDownB] = dB.view({E, down.A.size(1), -1}).transpose(1, 2);
    const GatedGradients g =
        gated_rows_backward(in, frozen_product_backward(grads[0], saved.down).to(w.scalar_type()),
                            q * w.unsqueeze(1), rows);
    result[kGateB] = g.gate_B;
    result[kUpB] = g.up_B;
    result[kDownA] = g.down_A;
    if (ctx->needs_input_grad(kRowWeights)) {
      result[kRowWeights] = g.weights + (saved.down_hidden * q).sum(1);
      if (saved.down_bias.defined())
        result[kRowWeights] +=
            dy.mv(saved.down_bias.to(dy.scalar_type())).index_select(0, rows.token);
    }
    const auto input_factor = [&](const at::Tensor& U, const ExpertTerm& term) {
      return input_factor_gradient(U, saved.x, /*by_token=*/true, term.A, rows, term.dropout);
    };
    result[kGateA] = input_factor(g.gate_hidden, in.gate_term);
    result[kUpA] = input_factor(g.up_hidden, in.up_term);
    if (ctx->needs_input_grad(kX)) result[kX] = input_gradient(saved, g, grads[0].scalar_type());
    return result;
  }

 private:
  static void save_term(AutogradContext* ctx, const std::string& name, const ExpertTerm& term) {
    ctx->saved_data[name + "_scale"] = term.scale;
    save_dropout(ctx, term.dropout, name + "_");
  }

  // What forward has kept.
  struct Saved {
    explicit Saved(AutogradContext* ctx) : rows(saved_expert_rows(ctx)) {
      const variable_list v = ctx->get_saved_variables();
      const auto term = [&](const std::string& name, size_t at) {
        return ExpertTerm{v[at], v[at + 1], ctx->saved_data[name + "_scale"].toDouble(),
                          saved_dropout(ctx, name + "_")};
      };
      x = kept_rows(ctx, v[0]);
      in = {v[8],
            v[9],
            v[10],
            v[11],
            term("gate", kGateA),
            term("up", kUpA),
            term("down", kDownA),
            v[kRowWeights]};
      down_hidden = v[12];
      gate = v[13];
      up = v[14];
      down = v[15];
      down_bias = v[16];
    }
    ExpertRows rows;
    GatedRows in;
    at::Tensor x, down_hidden, gate, up, down;
    at::Tensor down_bias;  // where the row weights hear it
  };

  static at::Tensor input_gradient(const Saved& saved, const GatedGradients& g,
                                   at::ScalarType type) {
    const ExpertTerm &gate = saved.in.gate_term, &up = saved.in.up_term;
    const at::Tensor dx = frozen_product_backward(g.gate.to(type), saved.gate)
                              .add_(frozen_product_backward(g.up.to(type), saved.up))
                              .to(saved.in.weights.scalar_type());
    add_through_terms(dx, /*by_token=*/true, g.gate_hidden, gate.A, type, saved.rows, gate.dropout);
    add_through_terms(dx, /*by_token=*/true, g.up_hidden, up.A, type, saved.rows, up.dropout);
    return dx.to(type);
  }
};

void check(const at::Tensor& x, const at::Tensor& row_weights, const ExpertMlp& block,
           const ExpertRows& rows) {
  const at::Tensor &gate = block.gate.weight, &up = block.up.weight, &down = block.down.weight;
  GRAFT_CHECK(gate.dim() == 2 && up.sizes() == gate.sizes() && down.dim() == 2 &&
                  down.size(0) == gate.size(1) && down.size(1) == gate.size(0),
              kArea, "gate and up must be [f, hidden] and down [hidden, f]; got ", gate.sizes(),
              ", ", up.sizes(), " and ", down.sizes());
  GRAFT_CHECK(x.dim() == 2 && x.size(0) == rows.tokens() && x.size(1) == gate.size(1), kArea,
              "the input must be [", rows.tokens(), ", ", gate.size(1), "]; got ", x.sizes());
  check_float(x, kArea, "the input");
  check_one_device(kArea, {x, row_weights, gate});
  const auto type = block.gate.term.A.scalar_type();
  for (const ExpertLayer* layer : {&block.gate, &block.up, &block.down}) {
    check_term(layer->weight, layer->bias, layer->term, rows);
    GRAFT_CHECK(layer->term.A.scalar_type() == type, kArea,
                "the factors of all layers must have one dtype; got ", at::toString(type), " and ",
                layer->term.A.toString());
  }
  GRAFT_CHECK(row_weights.dim() == 1 && row_weights.size(0) == rows.rows() &&
                  row_weights.scalar_type() == type,
              kArea, "weights must be [", rows.rows(), "] of A's dtype; got ",
              row_weights.toString(), " of ", row_weights.sizes());
}

}  // namespace

at::Tensor expert_mlp(const at::Tensor& x, const at::Tensor& row_weights, const ExpertMlp& block,
                      const ExpertRows& rows, bool sum_to_one) {
  check(x, row_weights, block, rows);
  const ExpertTerm &gate = block.gate.term, &up = block.up.term, &down = block.down.term;
  return ExpertMlpFunction::apply(x, row_weights, gate.A, gate.B, up.A, up.B, down.A, down.B, block,
                                  rows, sum_to_one);
}

}  // namespace graft::ops
