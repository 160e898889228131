/// What a file says about one of its tensors.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace graft::io {

/// A tensor's entry in a file's header; knowing it costs no access to the data.
struct TensorInfo {
  /// The type's name in the file format: "BF16" (safetensors), "Q4_1" (GGUF).
  std::string stored_type;
  /// The dtype that `tensor(name)` returns; Undefined for a stored type that ATen cannot hold.
  at::ScalarType dtype = at::ScalarType::Undefined;
  /// The sizes in PyTorch's order (slowest dimension first); empty for a scalar.
  std::vector<int64_t> shape;
  /// Bytes of the data in the file.
  size_t bytes = 0;
};

}  // namespace graft::io
