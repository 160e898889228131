#include "arguments.h"
#include "cuda_kernels.h"

namespace graft::ops {
namespace {

graft::cuda::RmsNorm norm_of(const at::Tensor& rows, const at::Tensor& weight, double eps,
                             float* reciprocal) {
  return {.type = element_type(rows.scalar_type()),
          .x = pointer(rows),
          .weight = pointer(weight),
          .rows = rows.size(0),
          .columns = rows.size(1),
          .eps = static_cast<float>(eps),
          .reciprocal = reciprocal};
}

// gate and up as the kernel takes them: rows of equal pitch, else dense copies.
struct Gated {
  at::Tensor gate, up;
  graft::cuda::Swiglu args;
};
Gated gated(const Call& call, const at::Tensor& gate_in, const at::Tensor& up_in) {
  const auto type = gate_in.scalar_type();
  const bool alike = gate_in.stride(1) == 1 && up_in.stride(1) == 1 &&
                     gate_in.stride(0) == up_in.stride(0) && gate_in.stride(0) >= gate_in.size(1) &&
                     up_in.scalar_type() == type && up_in.device() == gate_in.device();
  const at::Tensor gate = alike ? gate_in.detach() : call.dense(gate_in, type),
                   up = alike ? up_in.detach() : call.dense(up_in, type);
  call.check_sizes(gate.sizes() == up.sizes(), gate, up);
  return {gate,
          up,
          {.type = element_type(type),
           .gate = pointer(gate),
           .up = pointer(up),
           .rows = gate.size(0),
           .columns = gate.size(1),
           .pitch = alike && gate.size(0) > 1 ? gate.stride(0) : gate.size(1)}};
}

graft::cuda::Rope turn_of(at::ScalarType type, at::IntArrayRef shape, const at::Tensor& cos,
                          const at::Tensor& sin) {
  return {.type = element_type(type),
          .batch = shape[0],
          .tokens = shape[1],
          .heads = shape[2],
          .head_size = shape[3],
          .cos = floats(cos),
          .sin = floats(sin),
          .angles_by_batch = cos.dim() == 3};
}

void check_angles(const Call& call, at::IntArrayRef shape, const at::Tensor& cos,
                  const at::Tensor& sin) {
  call.check_sizes(cos.sizes() == sin.sizes(), cos, sin);
  GRAFT_CHECK((cos.dim() == 2 || (cos.dim() == 3 && cos.size(0) == shape[0])) &&
                  cos.size(-2) == shape[1] && 2 * cos.size(-1) == shape[3],
              kCudaArea, "angles must be [tokens, d/2] or [batch, tokens, d/2]; got ", cos.sizes(),
              " for ", shape, " (rope)");
}

}  // namespace

at::Tensor CudaKernels::dropout(const at::Tensor& x_in, const Dropout& dropout) const {
  const Call call("dropout", x_in);
  const at::Tensor x = call.dense(x_in, x_in.scalar_type()),
                   y = call.empty(x.sizes(), x.scalar_type());
  const int64_t columns = x.dim() == 0 ? 1 : x.size(-1);
  if (x.numel() == 0) return y;
  call.check(graft::cuda::launch_dropout(element_type(x.scalar_type()), pointer(x),
                                         y.mutable_data_ptr(), x.numel() / columns, columns,
                                         dropout_mask(dropout), call.stream()));
  return y;
}

std::pair<at::Tensor, at::Tensor> CudaKernels::rms_norm(const at::Tensor& rows_in,
                                                        const at::Tensor& weight_in,
                                                        double eps) const {
  const Call call("rms_norm", rows_in);
  const auto type = rows_in.scalar_type();
  const at::Tensor rows = call.dense(rows_in, type), weight = call.dense(weight_in, type);
  call.check_sizes(rows.dim() == 2 && weight.numel() == rows.size(1), rows, weight);
  const at::Tensor y = call.empty(rows.sizes(), type),
                   reciprocal = call.empty({rows.size(0)}, at::kFloat);
  call.check(graft::cuda::launch_rms_norm_forward(
      norm_of(rows, weight, eps, own_floats(reciprocal)), y.mutable_data_ptr(), call.stream()));
  return {y, reciprocal};
}

at::Tensor CudaKernels::rms_norm_backward(const at::Tensor& rows_in, const at::Tensor& weight_in,
                                          const at::Tensor& reciprocal_in,
                                          const at::Tensor& dy_in) const {
  const Call call("rms_norm_backward", rows_in);
  const auto type = rows_in.scalar_type();
  const at::Tensor rows = call.dense(rows_in, type), weight = call.dense(weight_in, type),
                   dy = call.dense(dy_in, type), reciprocal = call.dense(reciprocal_in, at::kFloat);
  call.check_sizes(rows.dim() == 2 && weight.numel() == rows.size(1), rows, weight);
  call.check_sizes(dy.sizes() == rows.sizes() && reciprocal.numel() == rows.size(0), dy, rows);
  const at::Tensor dx = call.empty(rows.sizes(), type);
  call.check(
      graft::cuda::launch_rms_norm_backward(norm_of(rows, weight, 0.0, own_floats(reciprocal)),
                                            pointer(dy), dx.mutable_data_ptr(), call.stream()));
  return dx;
}

at::Tensor CudaKernels::rms_norm_weight_backward(const at::Tensor& rows_in,
                                                 const at::Tensor& reciprocal_in,
                                                 const at::Tensor& dy_in) const {
  const Call call("rms_norm_weight_backward", rows_in);
  const auto type = rows_in.scalar_type();
  const at::Tensor rows = call.dense(rows_in, type), dy = call.dense(dy_in, type),
                   reciprocal = call.dense(reciprocal_in, at::kFloat);
  call.check_sizes(dy.sizes() == rows.sizes() && reciprocal.numel() == rows.size(0), dy, rows);
  const at::Tensor dw = call.empty({rows.size(1)}, at::kFloat),
                   space =
                       call.workspace(graft::cuda::rms_norm_workspace(rows.size(0), rows.size(1)));
  if (rows.size(0) == 0) return dw.zero_();
  call.check(graft::cuda::launch_rms_norm_weight_backward(
      norm_of(rows, {}, 0.0, own_floats(reciprocal)), pointer(dy), own_floats(dw),
      /*accumulate=*/false, own_floats(space), call.stream()));
  return dw;
}

at::Tensor CudaKernels::swiglu(const at::Tensor& gate, const at::Tensor& up) const {
  const Call call("swiglu", gate);
  const Gated in = gated(call, gate, up);
  const at::Tensor y = call.empty(gate.sizes(), gate.scalar_type());
  call.check(graft::cuda::launch_swiglu_forward(in.args, y.mutable_data_ptr(), call.stream()));
  return y;
}

// The gradients lie as gate and up do, hence dense inputs for dense gradients.
std::pair<at::Tensor, at::Tensor> CudaKernels::swiglu_backward(const at::Tensor& gate_in,
                                                               const at::Tensor& up_in,
                                                               const at::Tensor& dy_in) const {
  const Call call("swiglu_backward", gate_in);
  const auto type = gate_in.scalar_type();
  const Gated in = gated(call, call.dense(gate_in, type), call.dense(up_in, type));
  const at::Tensor dy = call.dense(dy_in, type);
  call.check_sizes(dy.numel() == in.gate.numel(), dy, in.gate);
  const at::Tensor d_gate = call.empty(in.gate.sizes(), type),
                   d_up = call.empty(in.up.sizes(), type);
  call.check(graft::cuda::launch_swiglu_backward(in.args, pointer(dy), d_gate.mutable_data_ptr(),
                                                 d_up.mutable_data_ptr(), call.stream()));
  return {d_gate, d_up};
}

at::Tensor CudaKernels::rope(const at::Tensor& x_in, const at::Tensor& cos_in,
                             const at::Tensor& sin_in) const {
  const Call call("rope", x_in);
  const auto type = x_in.scalar_type();
  // The kernel steps from token to token; a token's heads must lie side by side.
  const bool dense_heads = x_in.dim() == 4 && x_in.stride(3) == 1 && x_in.stride(2) == x_in.size(3);
  const at::Tensor x = dense_heads ? x_in.detach() : call.dense(x_in, type),
                   cos = call.dense(cos_in, at::kFloat), sin = call.dense(sin_in, at::kFloat);
  GRAFT_CHECK(x.dim() == 4 && x.size(3) % 2 == 0, kCudaArea,
              "x must be [batch, tokens, heads, d] with an even d; got ", x.sizes(), " (rope)");
  check_angles(call, x.sizes(), cos, sin);
  const at::Tensor y = call.empty({x.size(0), x.size(2), x.size(1), x.size(3)}, type);
  call.check(graft::cuda::launch_rope_forward(turn_of(type, x.sizes(), cos, sin), pointer(x),
                                              x.stride(0), x.stride(1), y.mutable_data_ptr(),
                                              call.stream()));
  return y;
}

at::Tensor CudaKernels::rope_backward(const at::Tensor& dy_in, const at::Tensor& cos_in,
                                      const at::Tensor& sin_in) const {
  const Call call("rope_backward", dy_in);
  const auto type = dy_in.scalar_type();
  const at::Tensor dy = call.dense(dy_in, type), cos = call.dense(cos_in, at::kFloat),
                   sin = call.dense(sin_in, at::kFloat);
  const std::vector<int64_t> shape = {dy.size(0), dy.size(2), dy.size(1), dy.size(3)};
  check_angles(call, shape, cos, sin);
  const at::Tensor dx = call.empty(shape, type);
  call.check(graft::cuda::launch_rope_backward(turn_of(type, shape, cos, sin), pointer(dy),
                                               dx.mutable_data_ptr(), call.stream()));
  return dx;
}

at::Tensor CudaKernels::softmax_loss(const at::Tensor& logits, const at::Tensor& targets_in,
                                     bool with_gradient, double scale) const {
  const Call call("softmax_loss", logits);
  const at::Tensor targets = call.dense(targets_in, at::kLong);
  // Written to in place: a copy would be lost.
  GRAFT_CHECK(logits.dim() == 2 && logits.stride(1) == 1 && logits.stride(0) >= logits.size(1) &&
                  targets.numel() == logits.size(0),
              kCudaArea, "logits must be [rows, vocabulary] with dense rows; got ", logits.sizes(),
              " for ", targets.sizes(), " (softmax_loss)");
  const at::Tensor losses = call.empty({logits.size(0)}, at::kFloat);
  call.check(graft::cuda::launch_softmax_loss({.type = element_type(logits.scalar_type()),
                                               .logits = logits.mutable_data_ptr(),
                                               .targets = targets.const_data_ptr<int64_t>(),
                                               .ignore_index = -1,
                                               .rows = logits.size(0),
                                               .vocabulary = logits.size(1),
                                               .pitch = logits.stride(0),
                                               .scale = static_cast<float>(scale),
                                               .with_gradient = with_gradient,
                                               .losses = own_floats(losses)},
                                              call.stream()));
  return losses;
}

}  // namespace graft::ops
