#include <ATen/ATen.h>

#include "expert_device.h"
#include "expert_mlp_rows.h"
#include "expert_sums.h"
#include "expert_terms.h"
#include "swiglu_rows.h"

namespace graft::ops::device {
namespace {

// h1, h3 and z of the rows, in the type of the tokens' products, or of the factors where LibTorch
// computes.
struct Rows {
  Rows(const GatedRows& in, const ExpertRows& rows)
      : h1(with_terms(in.gate, in.gate_hidden, in.gate_term, rows)),
        h3(with_terms(in.up, in.up_hidden, in.up_term, rows)),
        z(swiglu_matrix(h1, h3)) {}

  static at::Tensor with_terms(const at::Tensor& product, const at::Tensor& hidden,
                               const ExpertTerm& term, const ExpertRows& rows) {
    return add_output_terms(gather_rows(product, rows), hidden, term.B, term.scale, rows);
  }

  at::Tensor h1, h3, z;
};

}  // namespace

ActivatedRows gated_rows(const GatedRows& in, const ExpertRows& rows) {
  const at::Tensor z = Rows(in, rows).z;
  return {sum_rows(z, in.weights.detach(), rows),
          hidden_rows(z, /*by_token=*/false, in.down_term.A, rows, in.down_term.dropout)};
}

GatedGradients gated_rows_backward(const GatedRows& in, const at::Tensor& v, const at::Tensor& dS,
                                   const ExpertRows& rows) {
  const Rows made(in, rows);
  const auto type = made.z.scalar_type();
  const ExpertTerm& down = in.down_term;
  GatedGradients to;
  at::Tensor through;  // w_m v_t
  std::tie(through, to.weights) =
      combine_rows_backward(made.z, in.weights.detach(), v.to(type), rows);
  const at::Tensor dz =
      expert_expand(dS, {down.A}, 1.0, down.dropout, through, type, rows).to(type);
  to.down_A = input_factor_gradient(dS, made.z, /*by_token=*/false, down.A, rows, down.dropout);
  const auto [dh1, dh3] = swiglu_matrix_backward(made.h1, made.h3, dz.contiguous());
  const auto finish = [&](const at::Tensor& dh, const at::Tensor& S, const ExpertTerm& term,
                          at::Tensor& product, at::Tensor& hidden, at::Tensor& B) {
    product = sum_rows(dh, {}, rows);
    const OutputGradients g = output_gradients(dh, S, term.B, term.scale, rows, /*wants_B=*/true);
    hidden = g.hidden;
    B = g.B;
  };
  finish(dh1, in.gate_hidden, in.gate_term, to.gate, to.gate_hidden, to.gate_B);
  finish(dh3, in.up_hidden, in.up_term, to.up, to.up_hidden, to.up_B);
  return to;
}

}  // namespace graft::ops::device
