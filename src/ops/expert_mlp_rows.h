// The part of ops/expert_mlp.h that works on rows: from the tokens' frozen products to what the
// down projection reads, and back.
//
// A row is never written to memory: the loops go over tiles of adjacent columns, and a row's part
// of h1, h3 and z = silu(h1) h3 lives in the cache while all that needs it is computed. Forward
// reads the two products once for each of a token's rows and writes one [tokens, f]; backward reads
// three and writes two. A tile belongs to one thread, and what sums over columns is kept by tile
// and summed in the tiles' order, so the bits do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/ops/expert_linear.h>

namespace graft::ops {

// m a row, t its token, e its expert:  h1_m = gate_t + s S_m B_e^T, h3_m likewise.
struct GatedRows {
  at::Tensor gate, up;                // W x + b of the tokens, [tokens, f]
  at::Tensor gate_hidden, up_hidden;  // S [M, r], 0 for rows without expert
  ExpertTerm gate_term, up_term;      // their B
  ExpertTerm down_term;               // its A and dropout
  at::Tensor weights;                 // w [M]
};

struct ActivatedRows {
  at::Tensor summed;  // sum of w_m z_m over a token's rows, by expert: [tokens, f]
  at::Tensor hidden;  // drop(z_m) A_e^T, [M, r]; 0 for rows without expert
};
ActivatedRows gated_rows(const GatedRows& in, const ExpertRows& rows);

// From v [tokens, f], the gradient of `summed`, and the gradient dS [M, r] of `hidden`, with
// dz_m = w_m v_t + mask(dS_m A_e):
struct GatedGradients {
  at::Tensor gate, up;                // of the products: dh1 and dh3, summed over a token's rows
  at::Tensor gate_hidden, up_hidden;  // of S: s dh B_e, [M, r]
  at::Tensor gate_B, up_B, down_A;    // s dh^T S, dS^T drop(z)
  at::Tensor weights;                 // <z_m, v_t>, [M]
};
GatedGradients gated_rows_backward(const GatedRows& in, const at::Tensor& v, const at::Tensor& dS,
                                   const ExpertRows& rows);

// The same on a device (expert_mlp_device.cpp), where rows are written to memory: each step is a
// pass of its own over [M, f].
namespace device {
ActivatedRows gated_rows(const GatedRows& in, const ExpertRows& rows);
GatedGradients gated_rows_backward(const GatedRows& in, const at::Tensor& v, const at::Tensor& dS,
                                   const ExpertRows& rows);
}  // namespace device

}  // namespace graft::ops
