#include "aten_rows.h"
#include "cuda_dispatch.h"
#include "kept_rows.h"
#include "swiglu_rows.h"
#include "tensor_rows.h"
#include "vector_math.h"

#include <graft/core/simd.h>
#include <graft/ops/swiglu.h>
#include <torch/csrc/autograd/custom_function.h>

namespace graft::ops {
namespace {

constexpr const char* kArea = "swiglu";

template <class T>
GRAFT_INLINE void forward_body(const T* gate, const T* up, T* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto g = load(gate[i]);
    y[i] = store<T>(g / (1 + fast_exp(-g)) * load(up[i]));
  }
}

// silu'(g) = s + g s (1 - s), s = sigmoid(g).
template <class T>
GRAFT_INLINE void backward_body(const T* gate, const T* up, const T* dy, T* dgate, T* dup,
                                int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto g = load(gate[i]), gradient = load(dy[i]);
    const auto sigmoid = 1 / (1 + fast_exp(-g));
    const auto silu = g * sigmoid;
    dgate[i] = store<T>(gradient * load(up[i]) * (sigmoid + silu * (1 - sigmoid)));
    dup[i] = store<T>(gradient * silu);
  }
}

}  // namespace

// Function clones exist for plain functions only, hence one set for each stored type.
#define GRAFT_SWIGLU_ROWS(T)                                                                     \
  GRAFT_SIMD void swiglu_row(const T* gate, const T* up, T* y, int64_t n) {                      \
    forward_body<T>(gate, up, y, n);                                                             \
  }                                                                                              \
  GRAFT_SIMD void swiglu_row_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, \
                                      int64_t n) {                                               \
    backward_body<T>(gate, up, dy, dgate, dup, n);                                               \
  }
GRAFT_SWIGLU_ROWS(float)
GRAFT_SWIGLU_ROWS(double)
GRAFT_SWIGLU_ROWS(at::BFloat16)
GRAFT_SWIGLU_ROWS(at::Half)
#undef GRAFT_SWIGLU_ROWS

namespace {

// Calls f(row, first column, columns) for pieces of a [rows, columns] matrix, in parallel. Pieces
// may be parts of a row: a contiguous tensor is one long row.
template <class F>
void for_pieces(int64_t rows, int64_t columns, const F& f) {
  at::parallel_for(0, rows * columns, 16384, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t column = begin % columns;
      const int64_t count = std::min(end - begin, columns - column);
      f(begin / columns, column, count);
      begin += count;
    }
  });
}

// The common shape of the loops: [1, numel] when every tensor is contiguous, else [rows, n].
struct Layout {
  int64_t rows, columns;
};

Layout layout_of(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return {1, a.numel()};
  return {a.size(0), a.size(1)};
}

const DeviceKernels* kernels(const at::Tensor& gate) {
  return kernels_for({.op = DeviceOp::swiglu,
                      .type = gate.scalar_type(),
                      .rows = gate.size(0),
                      .columns = gate.size(1)},
                     gate.device());
}

}  // namespace

at::Tensor swiglu_matrix(const at::Tensor& gate, const at::Tensor& up) {
  if (on_device(gate)) {
    const DeviceKernels* device = kernels(gate);
    return device != nullptr ? device->swiglu(gate, up) : aten::swiglu(gate, up);
  }
  const at::Tensor y = at::empty(gate.sizes(), gate.options());
  const Layout layout = layout_of(gate, up);
  dispatch_float(gate.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T *g = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>();
    T* target = y.mutable_data_ptr<T>();
    for_pieces(layout.rows, layout.columns, [&](int64_t row, int64_t column, int64_t count) {
      swiglu_row(g + row * gate.stride(0) + column, u + row * up.stride(0) + column,
                 target + row * layout.columns + column, count);
    });
  });
  return y;
}

std::pair<at::Tensor, at::Tensor> swiglu_matrix_backward(const at::Tensor& gate,
                                                         const at::Tensor& up,
                                                         const at::Tensor& dy) {
  if (on_device(gate)) {
    const DeviceKernels* device = kernels(gate);
    return device != nullptr ? device->swiglu_backward(gate, up, dy)
                             : aten::swiglu_backward(gate, up, dy);
  }
  const at::Tensor dgate = at::empty(gate.sizes(), gate.options());
  const at::Tensor dup = at::empty(up.sizes(), up.options());
  const Layout layout = layout_of(gate, up);
  dispatch_float(gate.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T *g = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>();
    const T* gradient = dy.const_data_ptr<T>();
    T *g_target = dgate.mutable_data_ptr<T>(), *u_target = dup.mutable_data_ptr<T>();
    for_pieces(layout.rows, layout.columns, [&](int64_t row, int64_t column, int64_t count) {
      const int64_t at = row * layout.columns + column;
      swiglu_row_backward(g + row * gate.stride(0) + column, u + row * up.stride(0) + column,
                          gradient + at, g_target + at, u_target + at, count);
    });
  });
  return {dgate, dup};
}

namespace {

struct SwigluFunction : torch::autograd::Function<SwigluFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& gate,
                            const at::Tensor& up) {
    const at::Tensor gate_rows = rows_of(gate), up_rows = rows_of(up);
    ctx->save_for_backward({gate_rows, up_rows});
    ctx->saved_data["shape"] = gate.sizes();
    return swiglu_matrix(gate_rows, up_rows).view(gate.sizes());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list gradients) {
    refuse_double_backward(kArea);
    const auto saved = ctx->get_saved_variables();
    const auto shape = ctx->saved_data["shape"].toIntVector();
    const at::Tensor dy = gradients[0].contiguous().view(saved[0].sizes());
    const auto [dgate, dup] = swiglu_matrix_backward(saved[0], saved[1], dy);
    return {dgate.view(shape), dup.view(shape)};
  }
};

// The output again: see kept_rows.h.
at::Tensor recompute(torch::autograd::Node& node) {
  const auto saved =
      static_cast<torch::autograd::CppNode<SwigluFunction>&>(node).ctx_.get_saved_variables();
  return swiglu_matrix(saved[0], saved[1]);
}

const bool registered =
    register_recompute(typeid(torch::autograd::CppNode<SwigluFunction>), recompute);

}  // namespace

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  check_float(gate, kArea, "gate");
  check_float(up, kArea, "up");
  check_one_device(kArea, {gate, up});
  GRAFT_CHECK(gate.dim() >= 1 && gate.sizes() == up.sizes(), kArea,
              "gate and up must have one shape [..., n]; got ", shape_of(gate), " and ",
              shape_of(up));
  GRAFT_CHECK(gate.scalar_type() == up.scalar_type(), kArea,
              "gate and up must have one dtype; got ", at::toString(gate.scalar_type()), " and ",
              at::toString(up.scalar_type()));
  return SwigluFunction::apply(gate, up);
}

}  // namespace graft::ops
