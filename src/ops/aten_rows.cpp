#include "aten_rows.h"

#include <ATen/ATen.h>

#include "dropout_rows.h"
#include "tensor_rows.h"

namespace graft::ops::aten {

at::Tensor dropout(const at::Tensor& x, const Dropout& dropout) {
  const auto type = compute_type(x.scalar_type());
  const at::Tensor mask =
      apply_dropout_on_cpu(at::ones(x.sizes(), at::TensorOptions(type)), dropout).to(x.device());
  return (x.to(type) * mask).to(x.scalar_type());
}

std::pair<at::Tensor, at::Tensor> rms_norm(const at::Tensor& rows, const at::Tensor& weight,
                                           double eps) {
  const auto type = rows.scalar_type();
  const at::Tensor x = rows.to(compute_type(type));
  const at::Tensor reciprocal = (x.square().mean(1) + eps).rsqrt();
  const at::Tensor normal = (x * reciprocal.unsqueeze(1)).to(type).to(x.scalar_type());
  return {(normal * weight.to(x.scalar_type())).to(type), reciprocal};
}

at::Tensor rms_norm_backward(const at::Tensor& rows, const at::Tensor& weight,
                             const at::Tensor& reciprocal, const at::Tensor& dy) {
  const auto type = reciprocal.scalar_type();
  const at::Tensor x = rows.to(type), g = dy.to(type) * weight.to(type),
                   r = reciprocal.unsqueeze(1);
  return (r * (g - x * (r * r * (g * x).mean(1, true)))).to(rows.scalar_type());
}

at::Tensor rms_norm_weight_backward(const at::Tensor& rows, const at::Tensor& reciprocal,
                                    const at::Tensor& dy) {
  const auto type = reciprocal.scalar_type();
  const at::Tensor normal =
      (rows.to(type) * reciprocal.unsqueeze(1)).to(rows.scalar_type()).to(type);
  return (dy.to(type) * normal).sum(0);
}

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  const auto type = compute_type(gate.scalar_type());
  return (at::silu(gate.to(type)) * up.to(type)).to(gate.scalar_type());
}

std::pair<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& gate, const at::Tensor& up,
                                                  const at::Tensor& dy_in) {
  const auto type = compute_type(gate.scalar_type());
  const at::Tensor g = gate.to(type), dy = dy_in.to(type), sigmoid = at::sigmoid(g),
                   silu = g * sigmoid;
  return {(dy * up.to(type) * (sigmoid + silu * (1 - sigmoid))).to(gate.scalar_type()),
          (dy * silu).to(up.scalar_type())};
}

at::Tensor turn(const at::Tensor& x, const at::Tensor& cos_in, const at::Tensor& sin_in, int sign) {
  const int64_t half = x.size(3) / 2;
  const at::Tensor cos = cos_in.unsqueeze(-2), sin = sin_in.unsqueeze(-2) * sign;
  const at::Tensor wide = x.to(cos.scalar_type());
  const at::Tensor first = wide.narrow(3, 0, half), second = wide.narrow(3, half, half);
  return at::cat({first * cos - second * sin, second * cos + first * sin}, 3).to(x.scalar_type());
}

at::Tensor softmax_loss(const at::Tensor& logits, const at::Tensor& targets, bool with_gradient,
                        double scale) {
  const at::Tensor z = logits.to(compute_type(logits.scalar_type()));
  const at::Tensor index = targets.unsqueeze(1);
  const at::Tensor losses = (at::logsumexp(z, {1}) - z.gather(1, index).squeeze(1)).to(at::kDouble);
  if (with_gradient) {
    at::Tensor gradient = at::softmax(z, 1);
    gradient.scatter_add_(1, index, at::full_like(index, -1.0, z.options()));
    at::Tensor(logits).copy_(gradient.mul_(scale));
  }
  return losses;
}

void adamw(const AdamwStretch& s, const AdamwConstants& c) {
  const auto stretch = [&](const at::Tensor& t) {
    return t.detach().as_strided({s.count}, {1}, t.storage_offset() + s.begin);
  };
  at::Tensor p = stretch(s.parameter), m = stretch(s.mean), v = stretch(s.square);
  const at::Tensor g = stretch(s.gradient) * c.grad_scale;
  m.mul_(c.beta1).add_(g, 1.0 - c.beta1);
  v.mul_(c.beta2).addcmul_(g, g, 1.0 - c.beta2);
  p.mul_(s.keep).addcdiv_(m, v.sqrt().div_(c.root_bias2).add_(c.eps), -s.step_size);
}

}  // namespace graft::ops::aten
