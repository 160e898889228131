#include "aten_rows.h"
#include "cuda_dispatch.h"
#include "tensor_rows.h"
#include "vector_math.h"

#include <graft/core/simd.h>
#include <graft/ops/rope.h>
#include <torch/csrc/autograd/custom_function.h>

namespace graft::ops {
namespace {

constexpr const char* kArea = "rope";

// The heads of one token. sign = 1 turns forward, -1 back.
template <class T, class C = Compute<T>>
GRAFT_INLINE void rotate_body(const T* x, int64_t x_stride, const C* cos, const C* sin, C sign,
                              T* y, int64_t y_stride, int64_t heads, int64_t half) {
  for (int64_t head = 0; head < heads; ++head, x += x_stride, y += y_stride) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const C first = load(x[i]), second = load(x[i + half]), s = sign * sin[i];
      y[i] = store<T>(first * cos[i] - second * s);
      y[i + half] = store<T>(second * cos[i] + first * s);
    }
  }
}

// Function clones exist for plain functions only, hence one for each stored type.
#define GRAFT_ROPE_TOKEN(T)                                                                    \
  GRAFT_SIMD void rotate_token(const T* x, int64_t x_stride, const Compute<T>* cos,            \
                               const Compute<T>* sin, Compute<T> sign, T* y, int64_t y_stride, \
                               int64_t heads, int64_t half) {                                  \
    rotate_body<T>(x, x_stride, cos, sin, sign, y, y_stride, heads, half);                     \
  }
GRAFT_ROPE_TOKEN(float)
GRAFT_ROPE_TOKEN(double)
GRAFT_ROPE_TOKEN(at::BFloat16)
GRAFT_ROPE_TOKEN(at::Half)
#undef GRAFT_ROPE_TOKEN

// Rotates x into y, both seen as [batch, tokens, heads, d] with adjacent last elements.
void rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int sign,
            const at::Tensor& y) {
  const int64_t tokens = x.size(1), heads = x.size(2), half = x.size(3) / 2;
  dispatch_float(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* source = x.const_data_ptr<T>();
    const auto* c = cos.const_data_ptr<Compute<T>>();
    const auto* s = sin.const_data_ptr<Compute<T>>();
    T* target = y.mutable_data_ptr<T>();
    const int64_t grain = rows_grain(heads * half * 2);
    at::parallel_for(0, x.size(0) * tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t batch = i / tokens, token = i % tokens;
        const int64_t angle = (cos.dim() == 3 ? i : token) * half;
        rotate_token(source + batch * x.stride(0) + token * x.stride(1), x.stride(2), c + angle,
                     s + angle, static_cast<Compute<T>>(sign),
                     target + batch * y.stride(0) + token * y.stride(1), y.stride(2), heads, half);
      }
    });
  });
}

at::Tensor with_adjacent_elements(const at::Tensor& x) {
  return x.stride(3) == 1 ? x : x.contiguous();
}

const DeviceKernels* kernels(const at::Tensor& x) {
  return kernels_for({.op = DeviceOp::rope,
                      .type = x.scalar_type(),
                      .rows = x.size(0) * x.size(1),
                      .columns = x.size(2) * x.size(3)},
                     x.device());
}

struct RopeFunction : torch::autograd::Function<RopeFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& cos, const at::Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    if (on_device(x)) {
      const DeviceKernels* device = kernels(x);
      return device != nullptr ? device->rope(x, cos, sin)
                               : aten::turn(x, cos, sin, 1).transpose(1, 2).contiguous();
    }
    const at::Tensor y = at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options());
    rotate(with_adjacent_elements(x), cos, sin, 1, y.transpose(1, 2));
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list gradients) {
    refuse_double_backward(kArea);
    const auto saved = ctx->get_saved_variables();
    if (on_device(gradients[0])) {
      const DeviceKernels* device = kernels(gradients[0]);
      return {device != nullptr ? device->rope_backward(gradients[0], saved[0], saved[1])
                                : aten::turn(gradients[0].transpose(1, 2), saved[0], saved[1], -1),
              {},
              {}};
    }
    const at::Tensor dy = with_adjacent_elements(gradients[0].transpose(1, 2));
    const at::Tensor dx = at::empty(dy.sizes(), dy.options());
    rotate(dy, saved[0], saved[1], -1, dx);
    return {dx, {}, {}};
  }
};

void check_angles(const at::Tensor& x, const at::Tensor& angles, const char* name) {
  check_float(angles, kArea, name);
  GRAFT_CHECK(!angles.requires_grad(), kArea, name, " must not require a gradient");
  const bool shared = angles.dim() == 2;
  GRAFT_CHECK((shared || (angles.dim() == 3 && angles.size(0) == x.size(0))) &&
                  angles.size(-2) == x.size(1) && angles.size(-1) * 2 == x.size(3),
              kArea, name, " must be [tokens, d/2] or [batch, tokens, d/2]; got ", shape_of(angles),
              " for x ", shape_of(x));
}

}  // namespace

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  check_float(x, kArea, "x");
  check_one_device(kArea, {x, cos, sin});
  GRAFT_CHECK(x.dim() == 4 && x.size(3) % 2 == 0, kArea,
              "x must be [batch, tokens, heads, d] with an even d; got ", shape_of(x));
  check_angles(x, cos, "cos");
  check_angles(x, sin, "sin");
  GRAFT_CHECK(cos.sizes() == sin.sizes(), kArea, "cos and sin must have one shape; got ",
              shape_of(cos), " and ", shape_of(sin));
  const auto compute = compute_type(x.scalar_type());
  return RopeFunction::apply(x, cos.to(compute).contiguous(), sin.to(compute).contiguous());
}

}  // namespace graft::ops
