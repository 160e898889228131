// Positions that an adapter keeps as an int32 buffer: what torch's modules do to them, and what
// files may hold.
#pragma once

#include <ATen/ATen.h>
#include <graft/core/error.h>

#include <string>

namespace graft::adapters {

/// Module::to(type) converts every buffer: puts int32 back, in place. Types of fewer than 32 bits
/// have lost the positions and are refused. `buffer` is changed through its handle.
inline void keep_int32(const at::Tensor& buffer, const char* method, const std::string& place) {
  const auto type = buffer.scalar_type();
  if (type == at::kInt) return;
  GRAFT_CHECK(type == at::kFloat || type == at::kDouble || type == at::kLong, method,
              "positions must not be converted to a type of 16 bits; got ", type, place);
  at::Tensor(buffer).set_data(buffer.to(at::kInt));
}

/// Throws unless the values are whole numbers in [0, size). PEFT stores positions as floats on
/// Windows, which is why their type is not asked for.
inline void check_positions(const at::Tensor& values, int64_t size, const char* method,
                            const std::string& what, const std::string& place) {
  if (values.numel() == 0) return;
  const at::Tensor numbers = values.to(at::kDouble);
  const double least = numbers.min().item<double>(), most = numbers.max().item<double>();
  GRAFT_CHECK(least >= 0 && most < static_cast<double>(size) && at::equal(numbers, numbers.floor()),
              method, what, " must be whole numbers in [0, ", size, "); got numbers from ", least,
              " to ", most, place);
}

}  // namespace graft::adapters
