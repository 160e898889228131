// Where a part that split_rows made comes from.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>

namespace graft::ops {

// std::shared_ptr or c10::intrusive_ptr, by LibTorch's version.
using NodePointer = std::decay_t<decltype(std::declval<const at::Tensor&>().grad_fn())>;

// Rows [begin, begin + count) of the `of` rows that the node computed.
struct SplitPart {
  NodePointer source;
  int64_t begin, count, of;
};

// Nothing where x is no part, or a part of what no node computed.
std::optional<SplitPart> split_part(const at::Tensor& x);

}  // namespace graft::ops
