// ops/swiglu.h without autograd: on matrices, and on one row, its inner loops.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <utility>

namespace graft::ops {

// gate, up, dy: [rows, n] of one type, dy contiguous.
at::Tensor swiglu_matrix(const at::Tensor& gate, const at::Tensor& up);
std::pair<at::Tensor, at::Tensor> swiglu_matrix_backward(const at::Tensor& gate,
                                                         const at::Tensor& up,
                                                         const at::Tensor& dy);

#define GRAFT_SWIGLU_ROWS(T)                                    \
  /* y = silu(gate) * up */                                     \
  void swiglu_row(const T* gate, const T* up, T* y, int64_t n); \
  void swiglu_row_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t n);
GRAFT_SWIGLU_ROWS(float)
GRAFT_SWIGLU_ROWS(double)
GRAFT_SWIGLU_ROWS(c10::BFloat16)
GRAFT_SWIGLU_ROWS(c10::Half)
#undef GRAFT_SWIGLU_ROWS

}  // namespace graft::ops
