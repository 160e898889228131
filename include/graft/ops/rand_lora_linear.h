/// A linear layer with RandLoRA's full-rank term as one differentiable operation.
///
/// y = x W^T + b + s drop(x) dW^T,  dW = D where out >= in, else D^T,  D = B S  [q, p]
///
/// with p = min(out, in), q = max(out, in), a frozen B [q, m] and S [m, p], the m = N r rows of the
/// small basis after scaling: lambda[a, b] A[a, :] gamma[b, :] for rank index a and basis index b.
/// Row a N + b of S meets column a N + b of B, or row b r + a column b r + a (RandLoraPairing).
/// Source: Albert et al. 2025, arXiv 2502.00987.
///
/// Two exact routes, taken by the count of multiplications for T tokens, in forward, in the
/// gradient of x, and in the gradients of lambda and gamma each by itself:
///   dense  form D: q p m, and then one product with W + s D where x and W have the type of the
///          factors and no dropout is active, else T q p more; backward (x^T dY) B, T q p + q p m
///   thin   two products through the m hidden units: T m (p + q)
///
/// Saves x and the tensors by reference and nothing else: neither S nor D.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/ops/dropout.h>

namespace graft::ops {

/// Which column of B a scaled row (rank a, basis b) of the small basis meets. B's columns are
/// b r + a.
enum class RandLoraPairing {
  peft,   ///< column a N + b: the rows flattened rank by rank, as PEFT and the authors' code do
  paper,  ///< column b r + a: sum over bases of B_b diag(lambda_b) A diag(gamma_b)
};

/// The full-rank term of one layer.
struct RandLoraTerm {
  at::Tensor A;          ///< [r, p], frozen
  at::Tensor B;          ///< [q, N r], frozen, column b r + a; rows may be strided
  at::Tensor lambda;     ///< [r, N]
  at::Tensor gamma;      ///< [N, p]
  double scale = 1.0;    ///< s
  Dropout dropout = {};  ///< on the term's input
  RandLoraPairing pairing = RandLoraPairing::peft;
};

/// x: [..., in], weight: [out, in], bias: [out] or undefined; returns [..., out] in x's dtype.
/// The base product runs in x's dtype, the term in the dtype of lambda and gamma, their sum is
/// rounded once. Gradients reach x, lambda, gamma, and the base's weight and bias where those
/// require them.
at::Tensor rand_lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            const RandLoraTerm& term);

/// s dW for a weight of [out, in]; records nothing for autograd.
at::Tensor rand_lora_delta(int64_t out, int64_t in, const RandLoraTerm& term);

/// Whether the dense route takes fewer multiplications than the thin one. `extra_product`: whether
/// it needs a product of [tokens, .] beside the base's.
bool rand_lora_dense(int64_t tokens, int64_t q, int64_t p, int64_t m, bool extra_product);

}  // namespace graft::ops
