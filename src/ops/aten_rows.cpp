#include "aten_rows.h"

#include <ATen/ATen.h>
#include <graft/core/philox.h>

#include <limits>

#include "tensor_rows.h"

namespace graft::ops::aten {

at::Tensor philox_words(const at::Tensor& rows, int64_t blocks, const random::MaskKey& key) {
  constexpr int64_t kLow = 0xFFFFFFFF, kFirst = 0xD2511F53, kSecond = 0xCD9E8D57;
  const auto constant = [&](uint32_t value) {
    return at::full({1, 1}, static_cast<int64_t>(value), rows.options());
  };
  // The upper half of a product that has wrapped into the sign: what is shifted in goes again.
  const auto upper = [&](const at::Tensor& product) {
    return product.bitwise_right_shift(32).bitwise_and_(kLow);
  };
  at::Tensor x = at::arange(blocks, rows.options()).unsqueeze(0),
             y = rows.bitwise_and(kLow).unsqueeze(1), z = constant(key.site),
             w = constant(key.step);
  auto k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const at::Tensor p0 = x * kFirst, p1 = z * kSecond;
    x = upper(p1).bitwise_xor(y).bitwise_xor_(static_cast<int64_t>(k0));
    z = upper(p0).bitwise_xor(w).bitwise_xor_(static_cast<int64_t>(k1));
    y = p1.bitwise_and(kLow);
    w = p0.bitwise_and(kLow);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return at::stack(at::broadcast_tensors({x, y, z, w}), -1).view({rows.size(0), 4 * blocks});
}

at::Tensor dropout_rows(const at::Tensor& x, const at::Tensor& mask_rows, const Dropout& dropout) {
  if (!dropout.active()) return x;
  const int64_t columns = x.size(1);
  const at::Tensor words = philox_words(mask_rows, (columns + 7) / 8, dropout.key);
  const at::Tensor halves =
      at::stack({words.bitwise_and(0xFFFF), words.bitwise_right_shift(16)}, -1)
          .view({x.size(0), -1})
          .narrow(1, 0, columns);
  const at::Tensor scaled = x.to(compute_type(x.scalar_type())) * dropout.scale();
  return scaled.masked_fill_(halves < static_cast<int64_t>(dropout.threshold()), 0)
      .to(x.scalar_type());
}

at::Tensor dropout(const at::Tensor& x, const Dropout& dropout) {
  if (x.numel() == 0) return x;
  const at::Tensor rows = x.reshape({-1, x.dim() == 0 ? 1 : x.size(-1)});
  const auto numbers = at::TensorOptions(at::kLong).device(x.device());
  return dropout_rows(rows, at::arange(rows.size(0), numbers), dropout).reshape(x.sizes());
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
  const at::Tensor index = targets.clamp(0, logits.size(1) - 1).unsqueeze(1);
  // 1, or 0 for an ignored row (-1), or NaN for a target out of range: as the kernel has them.
  const at::Tensor factor =
      (targets >= 0)
          .to(at::kDouble)
          .masked_fill_(targets >= logits.size(1), std::numeric_limits<double>::quiet_NaN());
  const at::Tensor losses =
      (at::logsumexp(z, {1}) - z.gather(1, index).squeeze(1)).to(at::kDouble) * factor;
  if (with_gradient) {
    at::Tensor gradient = at::softmax(z, 1);
    gradient.scatter_add_(1, index, at::full_like(index, -1.0, z.options()));
    at::Tensor(logits).copy_(gradient.mul_(scale).mul_(factor.unsqueeze(1)));
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
