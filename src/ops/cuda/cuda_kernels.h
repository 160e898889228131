// The kernels of cuda/ as tensor functions.
#pragma once

#include "../device_kernels.h"

namespace graft::ops {

class CudaKernels final : public DeviceKernels {
 public:
  c10::DeviceType device_type() const override;
  int capability(const at::Device& device) const override;

  // graph.cpp
  std::unique_ptr<DeviceGraph> capture(const at::Device& device,
                                       const std::function<void()>& work) const override;

  // rows.cpp
  at::Tensor dropout(const at::Tensor& x, const Dropout& dropout) const override;
  std::pair<at::Tensor, at::Tensor> rms_norm(const at::Tensor& rows, const at::Tensor& weight,
                                             double eps) const override;
  at::Tensor rms_norm_backward(const at::Tensor& rows, const at::Tensor& weight,
                               const at::Tensor& reciprocal, const at::Tensor& dy) const override;
  at::Tensor rms_norm_weight_backward(const at::Tensor& rows, const at::Tensor& reciprocal,
                                      const at::Tensor& dy) const override;
  at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) const override;
  std::pair<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& gate, const at::Tensor& up,
                                                    const at::Tensor& dy) const override;
  at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) const override;
  at::Tensor rope_backward(const at::Tensor& dy, const at::Tensor& cos,
                           const at::Tensor& sin) const override;
  at::Tensor softmax_loss(const at::Tensor& logits, const at::Tensor& targets, bool with_gradient,
                          double scale) const override;

  // low_rank.cpp
  at::Tensor lora_shrink(const at::Tensor& x, const LowRankFactor& factor, double scale,
                         const Dropout& dropout) const override;
  at::Tensor lora_expand(const at::Tensor& hidden, const LowRankFactor& factor, double scale,
                         const Dropout& dropout, const ExpandInto& into) const override;
  at::Tensor lora_outer(const at::Tensor& hidden, const at::Tensor& x, int64_t rank, bool tall,
                        double scale, const Dropout& dropout) const override;
  std::pair<at::Tensor, at::Tensor> lora_backward(const at::Tensor& dy, const at::Tensor& hidden,
                                                  const at::Tensor& B, double scale) const override;
  at::Tensor dora_norm(const at::Tensor& weight, const at::Tensor& squares, const at::Tensor& A,
                       const at::Tensor& B, double scale) const override;
  std::pair<at::Tensor, at::Tensor> dora_backward(const at::Tensor& dy, const at::Tensor& z,
                                                  const at::Tensor& column_scale,
                                                  const at::Tensor& norm) const override;

  // experts.cpp
  at::Tensor expert_shrink(const at::Tensor& x, const ExpertFactor& factor, double scale,
                           const Dropout& dropout, const ExpertRows& rows) const override;
  at::Tensor expert_expand(const at::Tensor& hidden, const ExpertFactor& factor, double scale,
                           const Dropout& dropout, const at::Tensor& base,
                           const ExpertRows& rows) const override;
  at::Tensor expert_outer(const at::Tensor& hidden, const at::Tensor& x, bool tall, double scale,
                          const Dropout& dropout, const ExpertRows& rows) const override;
  at::Tensor gather_rows(const at::Tensor& tokens, const ExpertRows& rows) const override;
  at::Tensor combine_rows(const at::Tensor& values, const at::Tensor& weights,
                          const ExpertRows& rows) const override;
  std::pair<at::Tensor, at::Tensor> combine_rows_backward(const at::Tensor& values,
                                                          const at::Tensor& weights,
                                                          const at::Tensor& gradient,
                                                          const ExpertRows& rows) const override;
  SlotOrder slot_order(const at::Tensor& groups, int64_t count) const override;
  std::pair<at::Tensor, at::Tensor> router(const at::Tensor& logits, int64_t top_k) const override;
  at::Tensor router_backward(const at::Tensor& experts, const at::Tensor& weights,
                             const at::Tensor& gradient, int64_t count) const override;

  // optimizer.cpp
  void adamw(const std::vector<AdamwStretch>& stretches,
             const AdamwConstants& constants) const override;
  at::Tensor grad_norm(const std::vector<at::Tensor>& gradients) const override;
};

const DeviceKernels* cuda_kernels();

}  // namespace graft::ops
