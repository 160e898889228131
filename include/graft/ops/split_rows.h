/// A batch in parts along its leading dimension, and back.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace graft::ops {

/// x [n, ...] in parts of `counts` rows, in order; the counts add up to n. The parts share x's
/// memory. Backward puts the parts' gradients side by side (zeros for a part without one): nothing
/// is added or multiplied, so that a NaN stays in its part. Layers that compute their input again
/// instead of saving it (lora_linear behind a norm, say) do so for a part, too.
std::vector<at::Tensor> split_rows(const at::Tensor& x, const std::vector<int64_t>& counts);

}  // namespace graft::ops
