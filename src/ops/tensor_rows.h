// What the row-wise operations share: checks, views as rows, and the choice of the stored type.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <graft/core/error.h>

#include <algorithm>
#include <string>
#include <utility>

namespace graft::ops {

inline void check_float_type(const at::Tensor& t, const char* area, const char* name) {
  const auto type = t.scalar_type();
  GRAFT_CHECK(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, area,
      name, " must be float32, float64, bfloat16 or float16; got ", at::toString(type));
}

// Refuses what is not a dense tensor of these types on the CPU.
inline void check_cpu_float(const at::Tensor& t, const char* area, const char* name) {
  GRAFT_CHECK(t.defined(), area, name, " must be defined");
  GRAFT_CHECK(t.device().is_cpu() && t.layout() == at::kStrided, area, name,
              " must be a dense CPU tensor; got ", t.toString());
  check_float_type(t, area, name);
}

// The same for operations that run on a device too.
inline void check_float(const at::Tensor& t, const char* area, const char* name) {
  if (!t.defined() || !t.is_cuda()) return check_cpu_float(t, area, name);
  GRAFT_CHECK(t.layout() == at::kStrided, area, name, " must be dense; got ", t.toString());
  check_float_type(t, area, name);
}

// Gradients are formed outside of autograd; a graph through them would silently miss terms.
inline void refuse_double_backward(const char* area) {
  GRAFT_CHECK(!at::GradMode::is_enabled(), area,
              "a second derivative is not supported; got backward with create_graph");
}

// What tensors stored as `type` are computed in.
inline at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Calls f with a value of the C++ type that stands for `type`.
template <class F>
void dispatch_float(at::ScalarType type, F&& f) {
  switch (type) {
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(at::BFloat16{});
    case at::kHalf:
      return f(at::Half{});
    default:
      return f(float{});
  }
}

// t [..., n] as [rows, n] with adjacent columns: a view where one exists, else a copy.
inline at::Tensor rows_of(const at::Tensor& t) {
  const int64_t n = t.size(-1);
  const at::Tensor rows = t.reshape({n == 0 ? 0 : t.numel() / n, n});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

// Rows a thread should get at least, for the start of a thread to be worth it.
inline int64_t rows_grain(int64_t columns) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns));
}

// "[2, 3]"
inline std::string shape_of(const at::Tensor& t) {
  return t.defined() ? concat(t.sizes()) : std::string("undefined");
}

}  // namespace graft::ops
