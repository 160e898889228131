/// For adapters whose stored tensors must obey more than their shapes.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

namespace graft::nn {

/// An adapter that derives from this too is asked about each of its tensors in a file before any
/// value is taken over (positions that must lie inside of the weight, say).
class ChecksFileTensors {
 public:
  virtual ~ChecksFileTensors() = default;
  /// Throws unless the values make sense under that suffix.
  virtual void check_file_tensor(std::string_view suffix, const at::Tensor& values) const = 0;
};

}  // namespace graft::nn
