/// Which part of a parameter a training step updates.
#pragma once

#include <cstdint>

namespace graft::nn {

/// Indices [begin, end) along dimension `dim` of a parameter: the rest of it is left alone by the
/// optimiser, values and state.
struct LiveRows {
  int64_t dim = 0;
  int64_t begin = 0;
  int64_t end = 0;
};

}  // namespace graft::nn
