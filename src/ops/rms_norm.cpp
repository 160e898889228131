#include "aten_rows.h"
#include "cuda_dispatch.h"
#include "kept_rows.h"
#include "tensor_rows.h"
#include "vector_math.h"

#include <graft/core/simd.h>
#include <graft/ops/rms_norm.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

namespace graft::ops {
namespace {

constexpr const char* kArea = "rms_norm";

// One row of y from its reciprocal norm.
template <class T, class C = Compute<T>>
GRAFT_INLINE void scale_body(const T* x, const C* weight, T* y, C reciprocal, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    y[i] = store<T>(load(store<T>(load(x[i]) * reciprocal)) * weight[i]);
  }
}

// One row of y; returns the reciprocal norm.
template <class T, class C = Compute<T>>
GRAFT_INLINE C forward_body(const T* x, const C* weight, T* y, C eps, int64_t n) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += load(x[i]) * load(x[i]);
  const C reciprocal = 1 / std::sqrt(sum / static_cast<C>(n) + eps);
  scale_body<T>(x, weight, y, reciprocal, n);
  return reciprocal;
}

// One row of dx = r (w dy - x r^2 mean(w dy x)), r being the reciprocal norm.
template <class T, class C = Compute<T>>
GRAFT_INLINE void backward_body(const T* x, const C* weight, const T* dy, T* dx, C r, int64_t n) {
  C dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < n; ++i) dot += load(dy[i]) * weight[i] * load(x[i]);
  const C along_x = dot * r * r * r / static_cast<C>(n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    dx[i] = store<T>(load(dy[i]) * weight[i] * r - load(x[i]) * along_x);
  }
}

// Adds one row's part to the weight's gradient, for n of its columns.
template <class T, class C = Compute<T>>
GRAFT_INLINE void weight_body(const T* x, const T* dy, C r, C* dweight, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dweight[i] += load(dy[i]) * load(store<T>(load(x[i]) * r));
}

// Function clones exist for plain functions only, hence one set for each stored type.
#define GRAFT_RMS_NORM_ROWS(T)                                                                  \
  GRAFT_SIMD Compute<T> forward_row(const T* x, const Compute<T>* weight, T* y, Compute<T> eps, \
                                    int64_t n) {                                                \
    return forward_body<T>(x, weight, y, eps, n);                                               \
  }                                                                                             \
  GRAFT_SIMD void scale_row(const T* x, const Compute<T>* weight, T* y, Compute<T> reciprocal,  \
                            int64_t n) {                                                        \
    scale_body<T>(x, weight, y, reciprocal, n);                                                 \
  }                                                                                             \
  GRAFT_SIMD void backward_row(const T* x, const Compute<T>* weight, const T* dy, T* dx,        \
                               Compute<T> r, int64_t n) {                                       \
    backward_body<T>(x, weight, dy, dx, r, n);                                                  \
  }                                                                                             \
  GRAFT_SIMD void weight_row(const T* x, const T* dy, Compute<T> r, Compute<T>* dweight,        \
                             int64_t n) {                                                       \
    weight_body<T>(x, dy, r, dweight, n);                                                       \
  }
GRAFT_RMS_NORM_ROWS(float)
GRAFT_RMS_NORM_ROWS(double)
GRAFT_RMS_NORM_ROWS(at::BFloat16)
GRAFT_RMS_NORM_ROWS(at::Half)
#undef GRAFT_RMS_NORM_ROWS

const DeviceKernels* kernels(const at::Tensor& rows, const at::Tensor& weight) {
  return kernels_for({.op = DeviceOp::rms_norm,
                      .type = rows.scalar_type(),
                      .rows = rows.size(0),
                      .columns = rows.size(1),
                      .one_type = weight.scalar_type() == rows.scalar_type()},
                     rows.device());
}

std::pair<at::Tensor, at::Tensor> on_its_device(const at::Tensor& rows, const at::Tensor& weight,
                                                double eps) {
  const DeviceKernels* device = kernels(rows, weight);
  return device != nullptr ? device->rms_norm(rows, weight, eps)
                           : aten::rms_norm(rows, weight, eps);
}

struct Normalised {
  at::Tensor y;           // x's shape
  at::Tensor rows;        // x as [rows, n]
  at::Tensor reciprocal;  // [rows]
};

Normalised normalise(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor rows = rows_of(x);
  if (on_device(x)) {
    const auto [y, reciprocal] = on_its_device(rows, weight, eps);
    return {y.view(x.sizes()), rows, reciprocal};
  }
  const auto compute = compute_type(x.scalar_type());
  const at::Tensor scale = weight.detach().to(compute).contiguous();
  const at::Tensor y = at::empty(x.sizes(), x.options());
  const at::Tensor reciprocal = at::empty({rows.size(0)}, x.options().dtype(compute));
  const int64_t n = rows.size(1), stride = rows.stride(0);
  dispatch_float(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* source = rows.const_data_ptr<T>();
    const auto* w = scale.const_data_ptr<Compute<T>>();
    auto* target = y.mutable_data_ptr<T>();
    auto* norms = reciprocal.mutable_data_ptr<Compute<T>>();
    at::parallel_for(0, rows.size(0), rows_grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        norms[row] = forward_row(source + row * stride, w, target + row * n,
                                 static_cast<Compute<T>>(eps), n);
      }
    });
  });
  return {y, rows, reciprocal};
}

at::Tensor input_gradient(const at::Tensor& rows, const at::Tensor& weight,
                          const at::Tensor& reciprocal, const at::Tensor& dy) {
  if (on_device(rows)) {
    const DeviceKernels* device = kernels(rows, weight);
    return device != nullptr ? device->rms_norm_backward(rows, weight, reciprocal, dy)
                             : aten::rms_norm_backward(rows, weight, reciprocal, dy);
  }
  const at::Tensor dx = at::empty(rows.sizes(), rows.options());
  const at::Tensor scale = weight.to(reciprocal.scalar_type()).contiguous();
  const int64_t n = rows.size(1), x_stride = rows.stride(0), dy_stride = dy.stride(0);
  dispatch_float(rows.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* x = rows.const_data_ptr<T>();
    const auto* gradient = dy.const_data_ptr<T>();
    const auto* w = scale.const_data_ptr<Compute<T>>();
    const auto* norms = reciprocal.const_data_ptr<Compute<T>>();
    auto* target = dx.mutable_data_ptr<T>();
    at::parallel_for(0, rows.size(0), rows_grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        backward_row(x + row * x_stride, w, gradient + row * dy_stride, target + row * n,
                     norms[row], n);
      }
    });
  });
  return dx;
}

// Threads take columns and go down all rows, so that each sum has one order.
at::Tensor weight_gradient(const at::Tensor& rows, const at::Tensor& reciprocal,
                           const at::Tensor& dy) {
  if (on_device(rows)) {
    const DeviceKernels* device = kernels(rows, rows);
    return device != nullptr ? device->rms_norm_weight_backward(rows, reciprocal, dy)
                             : aten::rms_norm_weight_backward(rows, reciprocal, dy);
  }
  const int64_t n = rows.size(1), x_stride = rows.stride(0), dy_stride = dy.stride(0);
  const at::Tensor dweight = at::zeros({n}, reciprocal.options());
  dispatch_float(rows.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* x = rows.const_data_ptr<T>();
    const auto* gradient = dy.const_data_ptr<T>();
    const auto* norms = reciprocal.const_data_ptr<Compute<T>>();
    auto* target = dweight.mutable_data_ptr<Compute<T>>();
    at::parallel_for(0, n, rows_grain(rows.size(0)), [&](int64_t begin, int64_t end) {
      for (int64_t row = 0; row < rows.size(0); ++row) {
        weight_row(x + row * x_stride + begin, gradient + row * dy_stride + begin, norms[row],
                   target + begin, end - begin);
      }
    });
  });
  return dweight;
}

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& weight, double eps) {
    Normalised result = normalise(x, weight, eps);
    ctx->save_for_backward({result.rows, weight, result.reciprocal});
    ctx->saved_data["shape"] = x.sizes();
    ctx->saved_data["eps"] = eps;
    return result.y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list gradients) {
    refuse_double_backward(kArea);
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &rows = saved[0], &weight = saved[1], &reciprocal = saved[2];
    const at::Tensor dy = rows_of(gradients[0]);
    at::Tensor dx, dweight;
    if (ctx->needs_input_grad(0)) {
      dx =
          input_gradient(rows, weight, reciprocal, dy).view(ctx->saved_data["shape"].toIntVector());
    }
    if (ctx->needs_input_grad(1)) {
      dweight = weight_gradient(rows, reciprocal, dy).to(weight.scalar_type());
    }
    return {dx, dweight, {}};
  }
};

// The output again, as rows: see kept_rows.h.
at::Tensor recompute(torch::autograd::Node& node) {
  auto& context = static_cast<torch::autograd::CppNode<RmsNormFunction>&>(node).ctx_;
  const auto saved = context.get_saved_variables();
  const at::Tensor &rows = saved[0], &reciprocal = saved[2];
  if (on_device(rows))
    return on_its_device(rows, saved[1], context.saved_data["eps"].toDouble()).first;
  const at::Tensor scale = saved[1].to(reciprocal.scalar_type()).contiguous();
  const at::Tensor y = at::empty(rows.sizes(), rows.options());
  const int64_t n = rows.size(1), stride = rows.stride(0);
  dispatch_float(rows.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* x = rows.const_data_ptr<T>();
    const auto* w = scale.const_data_ptr<Compute<T>>();
    const auto* norms = reciprocal.const_data_ptr<Compute<T>>();
    auto* target = y.mutable_data_ptr<T>();
    at::parallel_for(0, rows.size(0), rows_grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        scale_row(x + row * stride, w, target + row * n, norms[row], n);
    });
  });
  return y;
}

const bool registered =
    register_recompute(typeid(torch::autograd::CppNode<RmsNormFunction>), recompute);

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_float(x, kArea, "x");
  check_float(weight, kArea, "weight");
  check_one_device(kArea, {x, weight});
  GRAFT_CHECK(
      x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0) && weight.size(0) > 0,
      kArea, "x must be [..., n] and weight [n], n >= 1; got x ", shape_of(x), ", weight ",
      shape_of(weight));
  GRAFT_CHECK(eps >= 0.0 && std::isfinite(eps), kArea, "eps must be >= 0; got ", eps);
  return RmsNormFunction::apply(x, weight, eps);
}

}  // namespace graft::ops
