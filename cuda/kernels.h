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
  bool accumulate = false;  ///< add to what is in `out`
  float* out;
  float* workspace;  ///< lora_outer_workspace(...) numbers
};
size_t lora_outer_workspace(int64_t rows, int64_t columns, int rank);
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

}  // namespace graft::cuda
