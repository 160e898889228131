// One row of swiglu and of its backward: the inner loops of ops/swiglu.h.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace graft::ops {

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
