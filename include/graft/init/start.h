/// Where the factors of a low-rank adapter start when they are found from the layer's weight, its
/// gradient or its inputs.
///
/// Notation: W [n, k] (n outputs, k inputs), A [r, k], B [n, r], scale s; the update is s B A. All
/// functions compute in fp32 at least (fp64 for an fp64 matrix) and throw for a rank that is not in
/// [1, min(n, k)] or a matrix that is not finite.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace graft::init {

/// Factors at the start of training.
struct Start {
  at::Tensor A;     ///< [r, k]
  at::Tensor B;     ///< [n, r]
  at::Tensor core;  ///< N or R [r, r] between them (NLoRA, LoRA-SB), or undefined
  /// Whether the model starts from W - s B A, so that its output is what it was: the update then
  /// is s (B A - B0 A0). Off where B = 0, and where the method starts elsewhere by design.
  bool subtract = false;
  /// For the report: the leading singular values of what was decomposed, and which share of its
  /// squared norm the start explains (0: says nothing).
  at::Tensor singular_values;
  double explained = 0.0;
};

/// PiSSA (Meng et al. 2024, arXiv 2404.02948): W = U S V^T; A = sqrt(S_r / s) V_r^T,
/// B = U_r sqrt(S_r / s), so that s B A = [W]_r. iterations < 0: exact; else randomised SVD with so
/// many iterations (PEFT's "pissa_niter_N", but oversampled). s > 0.
Start pissa(const at::Tensor& W, int64_t rank, double scale, int64_t iterations,
            at::Generator generator);

/// OLoRA (Büyükakyüz 2024, arXiv 2406.01775): W = Q R without pivoting; B = Q[:, :r], A = R[:r].
/// Not divided by s, as in PEFT. Needs only the first r columns' QR: A = B^T W.
Start olora(const at::Tensor& W, int64_t rank);

/// Options of LoRA-GA; the names are PEFT's.
struct LoraGaOptions {
  /// Which singular vectors go where, of the 2r leading ones (index from 0):
  ///   ArB2r  A: first r of V, B: second r of U      A2rBr  A: second r of V, B: first r of U
  ///   ArBr   A: odd ones of V, B: even ones of U    random  a random split into r and r
  std::string direction = "ArB2r";
  /// stable  both factors times n^(1/4) / sqrt(gamma)      unit  as they are
  /// gd      both factors divided by s ("gd_scale")        weight_svd  both factors times
  ///         sqrt(S_0(W) / S_0(G))^... see the source: the authors' "weightS"
  std::string scale = "stable";
  double gamma = 16.0;  ///< of "stable"
  /// PEFT's variant, which is not the paper's: B also times the singular values of G, and the
  /// "stable" factor on B alone. Its first step is not the best rank-2r step.
  bool peft_variant = false;
};

/// LoRA-GA (Wang, Yu, Li 2024, arXiv 2407.05000): from the mean gradient G [n, k] of the loss with
/// respect to W. One step of gradient descent on A and B moves W along the best rank-2r
/// approximation of G. Where 2r > min(n, k) only floor(min(n, k) / 2) of each factor's rows come
/// from G; that is the effective rank, and the returned factors have it.
Start lora_ga(const at::Tensor& G, const at::Tensor& W, int64_t rank, double scale,
              const LoraGaOptions& options, at::Generator generator);

/// CorDA (Yang et al. 2024, arXiv 2406.05223): from the covariance C [k, k] of the layer's inputs.
/// U S V^T = SVD(W C), V^T <- V^T C^-1; A = sqrt(S / s) V^T, B = U sqrt(S / s) of the r largest
/// triplets (mode "ipm", instruction-previewed) or the r smallest ("kpm", knowledge-preserved).
/// C is damped as in PEFT: d mean(diag C) on its diagonal, d from 0.01 doubled until
/// |C C^-1 - I|_F < 0.05.
Start corda(const at::Tensor& W, const at::Tensor& C, int64_t rank, double scale,
            std::string_view mode);

/// LoRA-SB (Ponkshe et al. 2024, arXiv 2411.19557): the first step of full fine-tuning with Adam,
/// dW = -step sign(G); dW = U S V^T; A = V_r^T, B = U_r, core = diag(S_r) / s, so that s B core A
/// is the best rank-r part of that step. `step`: its size, lr / (warmup share * steps) in the
/// paper's code.
Start lora_sb(const at::Tensor& G, int64_t rank, double scale, double step,
              at::Generator generator);

/// Options of the Nyström start (NLoRA).
struct NystromOptions {
  /// block  N = W[:r, :r], as the released code does it: no Nyström approximation
  /// pinv   N = pinv(W[:r, :r]) / s with singular values below rcond * the largest cut off
  /// cur    N = B^+ W A^+ / s: the projection of W onto both spans, the best core there is
  std::string core = "cur";
  double rcond = 0.1;    ///< of pinv
  bool subtract = true;  ///< the residual W - s B N A is what is frozen
};

/// The Nyström start (Guo, Chang, Wu 2025, arXiv 2502.14482): A = W[:r, :], B = W[:, :r] and a core
/// N. Throws for pinv without subtract: the product can be many times as large as W, so the model
/// would start far from where it was.
Start nystrom(const at::Tensor& W, int64_t rank, double scale, const NystromOptions& options);

}  // namespace graft::init
