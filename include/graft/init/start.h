/// Where the factors of a low-rank adapter start when they are found from the layer's weight, its
/// gradient or its inputs.
///
/// Notation: W [n, k] (n outputs, k inputs), A [r, k], B [n, r], scale s > 0; the update is s B A,
/// or s B core A. All functions compute in fp32 at least (fp64 for an fp64 matrix), return that
/// type, never write to what they are given, and throw for a rank that is not in [1, min(n, k)] and
/// for a matrix that is not finite or all zero.
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
  /// is s (B A - B0 A0), with the core between them if there is one. Off where B = 0, and where the
  /// method starts elsewhere by design.
  bool subtract = false;
  /// For the report: the singular values that the start is made of, undefined for OLoRA and
  /// Nystrom, and the share of the squared norm that it explains of what was decomposed.
  at::Tensor singular_values;
  double explained = 0.0;
};

/// PiSSA (Meng et al. 2024, arXiv 2404.02948): W = U S V^T; A = sqrt(S_r / s) V_r^T,
/// B = U_r sqrt(S_r / s), so that s B A = [W]_r. iterations < 0: exact; else randomised SVD with so
/// many iterations (PEFT's "pissa_niter_N") of 2r triplets where PEFT takes r. The generator serves
/// the randomised one. `whole`: the exact one by whole_svd.
Start pissa(const at::Tensor& W, int64_t rank, double scale, int64_t iterations,
            at::Generator generator, bool whole = false);

/// OLoRA (Büyükakyüz 2024, arXiv 2406.01775): W = Q R without pivoting; B = Q[:, :r], A = R[:r].
/// Not divided by s, as in PEFT. Found from the first r columns alone: A = B^T W.
Start olora(const at::Tensor& W, int64_t rank);

/// Options of LoRA-GA; the names are PEFT's.
struct LoraGaOptions {
  /// Which singular vectors go where, of the 2r leading ones (index from 0):
  ///   ArB2r  A: first r of V, B: second r of U      A2rBr  A: second r of V, B: first r of U
  ///   ArBr   A: odd ones of V, B: even ones of U    random  a random split into r and r
  std::string direction = "ArB2r";
  /// What both factors are multiplied by:
  ///   stable      n^(1/4) / sqrt(gamma)             unit  1
  ///   gd_scale    1 / s (the authors' "gd")
  ///   weight_svd  the mean of sqrt(S_i(W) / s) over the r largest singular values of W (the
  ///               authors' code, "weightS")
  std::string scale = "stable";
  double gamma = 16.0;  ///< of "stable"
  /// PEFT's variant, which is not the paper's and whose first step is not the best rank-2r step:
  /// B is also multiplied by the singular values S_B of its own vectors; "stable" is on B alone;
  /// "weight_svd" multiplies B alone by S_0(W) / S_B[0]; "random" gives A and B the same r.
  bool peft_variant = false;
};

/// LoRA-GA (Wang, Yu, Li 2024, arXiv 2407.05000, algorithm 1): from the mean gradient G [n, k] of
/// the loss with respect to W. For factors c V_I^T and c U_J with I and J disjoint, one step of
/// gradient descent on A and B moves W along s^2 c^2 sum over I and J of S_i u_i v_i^T: the best
/// rank-2r approximation of G. Where 2r > min(n, k), rank floor(min(n, k) / 2) is what comes from
/// G, and the returned factors have that rank. W is read for "weight_svd" alone. The decomposition
/// is exact up to min(n, k) = 128, else randomised as in PEFT (4r triplets, 4 iterations); the
/// generator serves that and the random split.
Start lora_ga(const at::Tensor& G, const at::Tensor& W, int64_t rank, double scale,
              const LoraGaOptions& options, at::Generator generator);

/// CorDA (Yang et al. 2024, arXiv 2406.05223): from the covariance C [k, k] of the layer's inputs.
/// U S V^T = SVD(W C), V^T <- V^T C^-1; A = sqrt(S / s) V^T, B = U sqrt(S / s) of the r largest
/// triplets (mode "ipm", instruction-previewed) or the r smallest ("kpm", knowledge-preserved). C
/// is damped by 0.01 mean(diag C) on its diagonal, as in PEFT, which doubles that until its fp32
/// inverse is good enough; here V^T C^-1 = S^-1 U^T W needs no inverse, and s B A = U U^T W.
/// "kpm" computes in fp64.
Start corda(const at::Tensor& W, const at::Tensor& C, int64_t rank, double scale,
            std::string_view mode);

/// LoRA-SB (Ponkshe et al. 2024, arXiv 2411.19557): the first step of full fine-tuning with Adam,
/// dW = -step sign(G); dW = U S V^T; A = V_r^T, B = U_r, core = diag(S_r) / s, so that s B core A
/// is the best rank-r part of that step, and the model starts after it. `step`: its size, > 0;
/// lr / (warmup share * steps) in the authors' code, which also rounds U, S and V to bf16 and does
/// not divide by s.
Start lora_sb(const at::Tensor& G, int64_t rank, double scale, double step);

/// Options of the Nyström start (NLoRA).
struct NystromOptions {
  /// block  N = W[:r, :r], as the released code does it: no Nyström approximation
  /// pinv   N = pinv(W[:r, :r]) / s with singular values up to rcond * the largest cut off: with
  ///        none cut off, s B N A has W's first r rows and columns
  /// cur    N = B^+ W A^+ / s: the projection of W onto both spans, the best core there is; what is
  ///        rounding in A and B is cut off
  /// pinv and cur give W itself where rank(W[:r, :r]) = rank(W).
  std::string core = "cur";
  double rcond = 0.1;    ///< of pinv
  bool subtract = true;  ///< the residual W - s B N A is what is frozen

  /// Throws unless every option is in its range, and for pinv without subtract: the product can be
  /// many times as large as W, so the model would start far from where it was.
  void validate() const;
};

/// The Nyström start (Guo, Chang, Wu 2025, arXiv 2502.14482): A = W[:r, :], B = W[:, :r] and a core
/// N. Throws for options that are not sound.
Start nystrom(const at::Tensor& W, int64_t rank, double scale, const NystromOptions& options);

}  // namespace graft::init
