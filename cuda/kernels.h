/// graft's CUDA kernels: pointers, sizes, a stream. No torch header, no allocation, no host sync.
///
/// Every launcher queues its work on `stream` and returns cudaSuccess, or the error of a launch, or
/// cudaErrorInvalidValue for arguments that its comment excludes. Empty matrices are no error and
/// launch nothing. Matrices are row by row without gaps. Sums run in fp32 (fp64 where said) and in
/// an order that depends on the shapes alone; nothing uses atomic additions: the same inputs give
/// the same bits in every run. docs/kernels.md says how each is tested.
#pragma once

#include <cstddef>
#include <cstdint>

#include <driver_types.h>

namespace graft::cuda {

/// How a matrix's numbers are stored.
enum class ElementType { bf16, fp16, fp32 };

/// The mask of one dropout call: the CPU's `ops::Dropout`, with p as its threshold.
struct DropoutMask {
  uint64_t seed = 0;
  uint32_t site = 0, step = 0;
  uint32_t threshold = 0;  ///< round(65536 p) < 65536; 0: no dropout
  /// Null, or the mask's row of each row of the matrix: a mixture's rows lie by expert, and their
  /// masks do not depend on that order.
  const int* rows = nullptr;
  /// Null, or a number in device memory that `step` is increased by: a launch that a graph repeats
  /// so draws another mask each time.
  const uint32_t* later = nullptr;

  /// 1 / (1 - p) for the p really used.
  float scale() const { return static_cast<float>(65536.0 / (65536.0 - threshold)); }
};

// ---- dropout.cu
// ------------------------------------------------------------------------------------
/// y = mask / (1 - p) * x, [rows, columns]; backward is the same function. x may be y.
cudaError_t launch_dropout(ElementType type, const void* x, void* y, int64_t rows, int64_t columns,
                           const DropoutMask& mask, cudaStream_t stream);

// ---- lora_shrink.cu, lora_expand.cu, lora_outer.cu, lora_backward.cu
// -------------------------------
/// The hidden matrices S and dS have padded_rank(rank) columns, zeros from `rank` on. 0: not
/// offered.
constexpr int padded_rank(int rank) {
  return rank < 1 || rank > 64 ? 0 : rank <= 8 ? 8 : rank <= 16 ? 16 : rank <= 32 ? 32 : 64;
}

/// How a low-rank factor lies in memory: lora_A is [rank, columns], lora_B [columns, rank].
enum class FactorLayout { rank_by_columns, columns_by_rank };

/// Where rows belong to experts (mixtures): the rows offsets[e] ... offsets[e + 1] - 1 are expert
/// e's and meet the e-th of the factors that lie one behind the other; rows from offsets[experts]
/// on belong to nobody, and their products are 0. Without offsets all rows meet one factor.
struct ExpertRanges {
  const int* offsets = nullptr;  ///< [experts + 1], rising from 0, in device memory
  int experts = 1;
};

/// S = scale * drop(x) V^T, for x [rows, columns] and a factor V: S of the forward pass (V = A), dS
/// of the backward pass (x = dY, V = B), P = W A^T and A A^T of DoRA's norm.
struct LoraShrink {
  ElementType type;
  const void* x;
  const void* factor;  ///< of the same type
  FactorLayout layout = FactorLayout::rank_by_columns;
  int64_t rows, columns;
  int rank;
  float scale = 1;
  DropoutMask dropout = {};
  ExpertRanges experts = {};
  void* out = nullptr;         ///< [rows, padded_rank(rank)], aligned to 16 bytes
  float* out_fp32 = nullptr;   ///< instead of `out`: the same in fp32
  float* workspace = nullptr;  ///< lora_shrink_workspace(...) numbers
};
size_t lora_shrink_workspace(int64_t rows, int64_t columns, int rank);
cudaError_t launch_lora_shrink(const LoraShrink& args, cudaStream_t stream);

/// y = b + c * (base + mask / (1 - p) * scale * S V): the low-rank part of a forward pass (V =
/// B^T), the input's gradient (S = dS, V = A, with the forward's mask). Written over a frozen
/// product's result, or before it as the matrix that the product then accumulates into (base null).
struct LoraExpand {
  ElementType type;
  const void* hidden;  ///< S [rows, padded_rank(rank)], aligned to 16 bytes
  const void* factor;
  FactorLayout layout = FactorLayout::columns_by_rank;
  int64_t rows, columns;
  int rank;
  float scale = 1;
  DropoutMask dropout = {};
  ExpertRanges experts = {};
  const void* base = nullptr;           ///< [rows, columns], null for zeros; may be `out`
  const float* column_scale = nullptr;  ///< c [columns] of DoRA, null for ones
  const void* bias = nullptr;           ///< b [columns], null for zeros
  void* unscaled = nullptr;  ///< null, or where base + ... goes before c and b; may be `base`
  void* out;
};
cudaError_t launch_lora_expand(const LoraExpand& args, cudaStream_t stream);

/// dV (+)= scale * U^T drop(x), in fp32 and V's layout: dA = dS^T drop(x), dB = s dY^T S (U = S, x
/// = dY).
struct LoraOuter {
  ElementType type;
  const void* hidden;  ///< U [rows, padded_rank(rank)], aligned to 16 bytes
  const void* x;       ///< [rows, columns]
  FactorLayout layout = FactorLayout::rank_by_columns;
  int64_t rows, columns;
  int rank;
  float scale = 1;
  DropoutMask dropout = {};
  ExpertRanges experts = {};  ///< `out` has a gradient for each expert, 0 for one without rows
  bool accumulate = false;    ///< add to what is in `out`
  float* out;
  float* workspace;  ///< lora_outer_workspace(...) numbers
};
size_t lora_outer_workspace(int64_t rows, int64_t columns, int rank, int experts = 1);
cudaError_t launch_lora_outer(const LoraOuter& args, cudaStream_t stream);

/// dS = s dY B and dB (+)= s dY^T S with one read of dY.
struct LoraBackward {
  ElementType type;
  const void* dy;      ///< [rows, columns]
  const void* hidden;  ///< S [rows, padded_rank(rank)], aligned to 16 bytes
  const void* B;       ///< [columns, rank]
  int64_t rows, columns;
  int rank;
  float scale = 1;
  bool accumulate = false;
  void* d_hidden;    ///< dS [rows, padded_rank(rank)], aligned to 16 bytes
  float* dB;         ///< [columns, rank]
  float* workspace;  ///< lora_backward_workspace(...) numbers
};
size_t lora_backward_workspace(ElementType type, int64_t rows, int64_t columns, int rank);
cudaError_t launch_lora_backward(const LoraBackward& args, cudaStream_t stream);

// ---- dora.cu
// ---------------------------------------------------------------------------------------
/// squares_i = ||W_i||^2 in fp64; W [rows, columns].
cudaError_t launch_row_squares(ElementType type, const void* weight, double* squares, int64_t rows,
                               int64_t columns, cudaStream_t stream);

/// n_i = ||W_i + s (B A)_i|| and c_i = m_i / n_i (1 where n_i is 0), for W [rows, columns], in
/// fp64:
///   n_i^2 = ||W_i||^2 + 2 s <B_i, (W A^T)_i> + s^2 B_i (A A^T) B_i^T
/// Rows in which these terms cancel are summed directly.
struct DoraNorm {
  ElementType type;
  const void* weight;
  const double* squares;   ///< of launch_row_squares
  const void* A;           ///< [rank, columns]
  const void* B;           ///< [rows, rank]
  const float* product;    ///< P = W A^T: launch_lora_shrink(x = W, factor = A) into fp32
  const float* gram;       ///< A A^T: launch_lora_shrink(x = A, factor = A) into fp32, rank rows
  const float* magnitude;  ///< m [rows]
  int64_t rows, columns;
  int rank;
  double scale = 1;
  float* norm;          ///< n [rows]
  float* column_scale;  ///< c [rows]
};
cudaError_t launch_dora_norm(const DoraNorm& args, cudaStream_t stream);

/// dz = c * dY, dm_i (+)= sum_t dY_ti z_ti / n_i (0 where n_i is 0), with z = x W^T + s S B^T as
/// launch_lora_expand left it in `unscaled`. Matrices [rows, columns]; dz may be dy or z.
struct DoraBackward {
  ElementType type;
  const void *dy, *z;
  const float *column_scale, *norm;  ///< c, n [columns]
  int64_t rows, columns;
  bool accumulate = false;
  void* dz;
  float* d_magnitude;  ///< [columns]
  float* workspace;    ///< dora_backward_workspace(...) numbers
};
size_t dora_backward_workspace(int64_t rows, int64_t columns);
cudaError_t launch_dora_backward(const DoraBackward& args, cudaStream_t stream);

// ---- rms_norm.cu
// -----------------------------------------------------------------------------------
/// y = cast(x r) w with r = 1 / sqrt(mean(x^2) + eps), row by row over [rows, columns].
struct RmsNorm {
  ElementType type;
  const void* x;
  const void* weight;  ///< [columns], of x's type
  int64_t rows, columns;
  float eps;
  float* reciprocal;  ///< r [rows]: written by forward, read by backward
};
cudaError_t launch_rms_norm_forward(const RmsNorm& args, void* y, cudaStream_t stream);
/// dx = r (w dy - x r^2 mean(w dy x)); dx may be dy.
cudaError_t launch_rms_norm_backward(const RmsNorm& args, const void* dy, void* dx,
                                     cudaStream_t stream);
/// dw (+)= sum_t dy cast(x r), [columns]; `workspace`: rms_norm_workspace(...) numbers.
cudaError_t launch_rms_norm_weight_backward(const RmsNorm& args, const void* dy, float* d_weight,
                                            bool accumulate, float* workspace, cudaStream_t stream);
size_t rms_norm_workspace(int64_t rows, int64_t columns);

// ---- swiglu.cu
// -------------------------------------------------------------------------------------
/// silu(gate) * up; rows of gate and up begin `pitch` numbers apart, those of y and dy are dense.
struct Swiglu {
  ElementType type;
  const void *gate, *up;
  int64_t rows, columns;
  int64_t pitch;  ///< >= columns
};
cudaError_t launch_swiglu_forward(const Swiglu& args, void* y, cudaStream_t stream);
/// d_gate and d_up lie as gate and up do, and may be them.
cudaError_t launch_swiglu_backward(const Swiglu& args, const void* dy, void* d_gate, void* d_up,
                                   cudaStream_t stream);

// ---- rope.cu
// ---------------------------------------------------------------------------------------
/// Turns the pairs (x_i, x_{i + d/2}) of [batch, tokens, heads, d] by the token's angles and
/// transposes to [batch, heads, tokens, d]. Heads of a token lie side by side.
struct Rope {
  ElementType type;
  int64_t batch, tokens, heads;
  int64_t head_size;       ///< d, even
  const float *cos, *sin;  ///< [tokens, d / 2], or [batch, tokens, d / 2]
  bool angles_by_batch = false;
};
/// Tokens of x begin `token_step` numbers apart, elements of the batch `batch_step`; y is dense.
cudaError_t launch_rope_forward(const Rope& args, const void* x, int64_t batch_step,
                                int64_t token_step, void* y, cudaStream_t stream);
/// dy [batch, heads, tokens, d] to dx [batch, tokens, heads, d], both dense.
cudaError_t launch_rope_backward(const Rope& args, const void* dy, void* dx, cudaStream_t stream);

// ---- router.cu
// -------------------------------------------------------------------------------------
/// Which experts each token goes to, and with which weights.
struct Routing {
  int64_t tokens;
  int experts;     ///< at most 256
  int top_k;       ///< at most 8 and at most `experts`
  int* ids;        ///< [tokens, top_k], the largest logit first, of equal ones the lower expert
  float* weights;  ///< [tokens, top_k]: softmax over the chosen logits
};
/// From logits [tokens, experts]; writes ids and weights.
cudaError_t launch_router_forward(const Routing& args, const float* logits, cudaStream_t stream);
/// d_logits_j = w_j (dw_j - sum_i w_i dw_i) for the chosen experts, 0 for the others.
cudaError_t launch_router_backward(const Routing& args, const float* d_weights, float* d_logits,
                                   cudaStream_t stream);

/// Sorts the slots (token * top_k + choice) by expert, within an expert by number. positions
/// [slots]: a slot's place, -1 for an id outside of [0, experts); sources [slots]: the slot at a
/// place; expert e has the places offsets[e] to offsets[e + 1] - 1. workspace:
/// router_order_workspace(...) numbers.
cudaError_t launch_router_order(const Routing& args, int* positions, int* sources, int* offsets,
                                int* workspace, cudaStream_t stream);
size_t router_order_workspace(const Routing& args);

/// Rows of tokens [tokens, columns] and, sorted by expert, of slots [slots, columns].
struct ExpertRows {
  ElementType type;
  int64_t tokens, columns;
  int top_k;
  const int* positions;  ///< [tokens, top_k], -1: the slot has no row
};
/// rows[i] = x[sources[i] / top_k] for the first `count` places. Its backward pass is
/// launch_combine_forward without weights.
cudaError_t launch_dispatch_forward(const ExpertRows& args, const void* x, const int* sources,
                                    void* rows, int64_t count, cudaStream_t stream);
/// out[t] = sum_k w[t, k] rows[position of (t, k)]; weights null: all 1.
cudaError_t launch_combine_forward(const ExpertRows& args, const void* rows, const float* weights,
                                   void* out, cudaStream_t stream);
/// d_rows[position] = w d_out[t], dw = <rows[position], d_out[t]> (0 without a row). d_rows may be
/// rows.
cudaError_t launch_combine_backward(const ExpertRows& args, const void* rows, const float* weights,
                                    const void* d_out, void* d_rows, float* d_weights,
                                    cudaStream_t stream);

// ---- adamw.cu
// --------------------------------------------------------------------------------------
/// One parameter of the optimiser. The kernels read an array of these in device memory.
struct OptimizerTensor {
  float* parameter;
  const float* gradient;
  float *mean, *square;  ///< m, v
  void* copy = nullptr;  ///< null, or where p goes as `copy_type` too
  int64_t size;
  float keep, step_size;    ///< 1 - lr lambda, lr / (1 - beta1^t)
  int64_t first_block = 0;  ///< set by number_blocks
};
/// What a step's launches need to know of the array, to be called on the host's copy before it goes
/// to the device: sets first_block, returns the number of blocks.
int64_t number_blocks(OptimizerTensor* tensors, int count);

/// norm = the gradients' Euclidean norm together, in fp64; grad_scale = min(1, max_norm / (norm +
/// 1e-6)), NaN where a gradient is not finite. Both on the device; workspace: `blocks` numbers.
cudaError_t launch_grad_norm(const OptimizerTensor* tensors, int count, int64_t blocks,
                             double max_norm, double* norm, float* grad_scale, double* workspace,
                             cudaStream_t stream);

/// The step's constants: beta1, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), eps.
struct AdamwStep {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, root_bias2, eps;
};
/// The update of include/graft/train/adamw.h with g = *grad_scale * gradient (grad_scale null: 1).
/// Changes nothing where *grad_scale is not finite.
cudaError_t launch_adamw(const OptimizerTensor* tensors, int count, int64_t blocks,
                         ElementType copy_type, const AdamwStep& step, const float* grad_scale,
                         cudaStream_t stream);

// ---- cross_entropy.cu
// ------------------------------------------------------------------------------
/// loss_i = logsumexp(z_i) - z_i[target_i] for rows z_i of logits [rows, vocabulary] that begin
/// `pitch` numbers apart; with_gradient: z_i becomes scale (softmax(z_i) - onehot(target_i)). A row
/// whose target is ignore_index has loss 0 and gradient 0; with any other target out of range both
/// are NaN.
struct SoftmaxLoss {
  ElementType type;
  void* logits;
  const int64_t* targets;  ///< [rows]
  int64_t ignore_index;
  int64_t rows, vocabulary, pitch;
  float scale;
  bool with_gradient;
  float* losses;  ///< [rows]
};
cudaError_t launch_softmax_loss(const SoftmaxLoss& args, cudaStream_t stream);
/// loss = scale * sum of losses, in fp64.
cudaError_t launch_loss_sum(const float* losses, int64_t rows, double scale, float* loss,
                            cudaStream_t stream);

}  // namespace graft::cuda
