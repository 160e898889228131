// What the library asks of a device's kernels, in tensors.
//
// src/ops/cuda implements it on cuda/kernels.h, which has the formulas. It stands behind an
// interface because a build without CUDA has none, and because the tests put the same glue on
// emulated kernels and CPU tensors. Arguments are of the types and sizes that fallback_reason
// (cuda_dispatch.h) lets through; every function checks them again, copies what is not dense, and
// queues its work on the current stream without waiting for it.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/ops/dropout.h>
#include <graft/ops/expert_rows.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace graft::ops {

// A low-rank factor: lora_A [rank, columns] or, `tall`, lora_B [columns, rank].
struct LowRankFactor {
  at::Tensor values;  // of the wide matrices' type
  bool tall = false;
  int64_t rank() const { return values.size(tall ? 1 : 0); }
  int64_t columns() const { return values.size(tall ? 0 : 1); }
};

// The columns of a hidden matrix for factors of this rank, in [1, 64].
constexpr int64_t hidden_columns(int64_t rank) {
  return rank <= 8 ? 8 : rank <= 16 ? 16 : rank <= 32 ? 32 : 64;
}

// Those of all experts: lora_A [E, rank, columns] or, `tall`, lora_B [E, columns, rank].
struct ExpertFactor {
  at::Tensor values;
  bool tall = false;
  int64_t rank() const { return values.size(tall ? 2 : 1); }
  int64_t columns() const { return values.size(tall ? 1 : 2); }
};

// Slots sorted by group, within a group by number: group g has the places offsets[g] ...
// offsets[g + 1] - 1. All int64.
struct SlotOrder {
  at::Tensor slots;    // [slots]: the slot at a place
  at::Tensor places;   // [slots]: the place of a slot that has a group
  at::Tensor offsets;  // [groups + 1]
};

// What a low-rank product is added to, and what becomes of the sum: b + c (base + product).
struct ExpandInto {
  at::Tensor base = {};          // [rows, columns]; undefined: zeros
  at::Tensor column_scale = {};  // c [columns], fp32; undefined: ones
  at::Tensor bias = {};          // b [columns]; undefined: zeros
  at::Tensor unscaled = {};      // where base + product is kept, or undefined; may be base
};

// A stretch of a parameter for AdamW: `count` numbers from `begin` on, in memory order.
struct AdamwStretch {
  at::Tensor parameter, gradient, mean, square;
  int64_t begin, count;
  double keep, step_size;  // 1 - lr lambda, lr / (1 - beta1^t)
};
struct AdamwConstants {
  double beta1, beta2, root_bias2, eps;  // root_bias2 = sqrt(1 - beta2^t)
  double grad_scale;
};

// A pass that a device was shown once and runs again at a single request: a CUDA graph.
class DeviceGraph {
 public:
  virtual ~DeviceGraph() = default;
  // Dropout masks are those of `later` steps after the captured ones.
  virtual void replay(uint32_t later) = 0;
};

class DeviceKernels {
 public:
  virtual ~DeviceKernels() = default;
  virtual c10::DeviceType device_type() const = 0;
  virtual int capability(const at::Device& device) const = 0;  // 90 for 9.0
  // Calls `work` once, with nothing run on the device. It must not wait for the device.
  virtual std::unique_ptr<DeviceGraph> capture(const at::Device& device,
                                               const std::function<void()>& work) const = 0;

  virtual at::Tensor dropout(const at::Tensor& x, const Dropout& dropout) const = 0;

  // Hidden matrices are [rows, padded rank], zeros behind the rank.
  virtual at::Tensor lora_shrink(const at::Tensor& x, const LowRankFactor& factor, double scale,
                                 const Dropout& dropout) const = 0;
  virtual at::Tensor lora_expand(const at::Tensor& hidden, const LowRankFactor& factor,
                                 double scale, const Dropout& dropout,
                                 const ExpandInto& into) const = 0;
  // The gradient of a factor with this shape, fp32: scale U^T drop(x), or its transpose.
  virtual at::Tensor lora_outer(const at::Tensor& hidden, const at::Tensor& x, int64_t rank,
                                bool tall, double scale, const Dropout& dropout) const = 0;
  // dS = s dY B and dB = s dY^T S (fp32).
  virtual std::pair<at::Tensor, at::Tensor> lora_backward(const at::Tensor& dy,
                                                          const at::Tensor& hidden,
                                                          const at::Tensor& B,
                                                          double scale) const = 0;

  // The same with each row's own expert's factor V, over rows grouped by expert; dropout is row
  // `pair` of the mask. Rows without expert have a term of 0. Hidden matrices are [M, rank], fp32.
  // S = scale drop(x) V^T
  virtual at::Tensor expert_shrink(const at::Tensor& x, const ExpertFactor& factor, double scale,
                                   const Dropout& dropout, const ExpertRows& rows) const = 0;
  // base + mask(scale S V), in the factor's type; base: [M, columns], or undefined for zeros.
  virtual at::Tensor expert_expand(const at::Tensor& hidden, const ExpertFactor& factor,
                                   double scale, const Dropout& dropout, const at::Tensor& base,
                                   const ExpertRows& rows) const = 0;
  // The gradients of all experts' factors with this shape, fp32: scale U^T drop(x) over each one's
  // rows.
  virtual at::Tensor expert_outer(const at::Tensor& hidden, const at::Tensor& x, bool tall,
                                  double scale, const Dropout& dropout,
                                  const ExpertRows& rows) const = 0;
  // x[token of the row].
  virtual at::Tensor gather_rows(const at::Tensor& tokens, const ExpertRows& rows) const = 0;
  // sum of weight_m v_m over a token's rows; weights: fp32 [M], or undefined for ones.
  virtual at::Tensor combine_rows(const at::Tensor& values, const at::Tensor& weights,
                                  const ExpertRows& rows) const = 0;
  // weight_m g_t(m) and <v_m, g_t(m)> (fp32).
  virtual std::pair<at::Tensor, at::Tensor> combine_rows_backward(const at::Tensor& values,
                                                                  const at::Tensor& weights,
                                                                  const at::Tensor& gradient,
                                                                  const ExpertRows& rows) const = 0;
  // groups: int64 [slots], in [0, count]; `count` is no group.
  virtual SlotOrder slot_order(const at::Tensor& groups, int64_t count) const = 0;
  // The top_k largest logits' experts (int64) and the softmax over them, [tokens, top_k] both.
  virtual std::pair<at::Tensor, at::Tensor> router(const at::Tensor& logits,
                                                   int64_t top_k) const = 0;
  virtual at::Tensor router_backward(const at::Tensor& experts, const at::Tensor& weights,
                                     const at::Tensor& gradient, int64_t count) const = 0;

  // n [rows], fp32; squares: fp64 of ops::row_squares.
  virtual at::Tensor dora_norm(const at::Tensor& weight, const at::Tensor& squares,
                               const at::Tensor& A, const at::Tensor& B, double scale) const = 0;
  // dz = c dY and dm (fp32).
  virtual std::pair<at::Tensor, at::Tensor> dora_backward(const at::Tensor& dy, const at::Tensor& z,
                                                          const at::Tensor& column_scale,
                                                          const at::Tensor& norm) const = 0;

  // y and the rows' reciprocal norms (fp32).
  virtual std::pair<at::Tensor, at::Tensor> rms_norm(const at::Tensor& rows,
                                                     const at::Tensor& weight,
                                                     double eps) const = 0;
  virtual at::Tensor rms_norm_backward(const at::Tensor& rows, const at::Tensor& weight,
                                       const at::Tensor& reciprocal,
                                       const at::Tensor& dy) const = 0;
  virtual at::Tensor rms_norm_weight_backward(const at::Tensor& rows, const at::Tensor& reciprocal,
                                              const at::Tensor& dy) const = 0;

  virtual at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) const = 0;
  virtual std::pair<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& gate,
                                                            const at::Tensor& up,
                                                            const at::Tensor& dy) const = 0;

  // [batch, tokens, heads, d] to [batch, heads, tokens, d], and its gradient back.
  virtual at::Tensor rope(const at::Tensor& x, const at::Tensor& cos,
                          const at::Tensor& sin) const = 0;
  virtual at::Tensor rope_backward(const at::Tensor& dy, const at::Tensor& cos,
                                   const at::Tensor& sin) const = 0;

  // The rows' losses (fp32); with a gradient, logits becomes scale (softmax - onehot). Both are 0
  // where a target is -1, and NaN where it is out of range.
  virtual at::Tensor softmax_loss(const at::Tensor& logits, const at::Tensor& targets,
                                  bool with_gradient, double scale) const = 0;

  virtual void adamw(const std::vector<AdamwStretch>& stretches,
                     const AdamwConstants& constants) const = 0;
  // The gradients' Euclidean norm together: a number in fp64 on the device.
  virtual at::Tensor grad_norm(const std::vector<at::Tensor>& gradients) const = 0;
};

// Those of this build, or those that a test has set; null where there are none.
const DeviceKernels* device_kernels();
// Returns the ones before.
const DeviceKernels* set_device_kernels(const DeviceKernels* kernels);

}  // namespace graft::ops
