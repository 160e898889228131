/// Models in GGUF files (versions 2 and 3, little endian), the format of llama.cpp.
///
/// Layout: magic "GGUF", version, counts, key/value metadata, tensor entries, padding, data.
/// Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
/// Every failure is a graft::Error that names the file, the rule and the value; no count in the
/// file is believed before it was compared with the file's size.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/io/tensor_info.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace graft::io {

/// One GGUF file, mapped. Copies are cheap and share the mapping.
class GgufFile {
 public:
  /// Maps the file and checks its whole header.
  static GgufFile open(const std::filesystem::path& path);

  /// The path that was opened.
  const std::filesystem::path& path() const;

  // ---- metadata. A getter throws for a missing key and for a value of another type; its `find_`
  // form returns nothing for a missing key and still throws for another type.

  /// All keys, in the file's order.
  const std::vector<std::string>& keys() const;
  /// Whether the file has that key.
  bool has_key(const std::string& key) const;

  /// A string.
  std::string get_string(const std::string& key) const;
  /// An integer of any width that is >= 0.
  uint64_t get_uint(const std::string& key) const;
  /// An integer of any width that fits in 64 bits with sign.
  int64_t get_int(const std::string& key) const;
  /// A float32 or float64; an integer is refused.
  double get_float(const std::string& key) const;
  /// A bool.
  bool get_bool(const std::string& key) const;
  /// An array of strings.
  std::vector<std::string> get_string_array(const std::string& key) const;
  /// An array of float32 or float64.
  std::vector<double> get_float_array(const std::string& key) const;
  /// An array of integers of any width (or of bools, as 0 and 1).
  std::vector<int64_t> get_int_array(const std::string& key) const;

  std::optional<std::string> find_string(const std::string& key) const;
  std::optional<uint64_t> find_uint(const std::string& key) const;
  std::optional<int64_t> find_int(const std::string& key) const;
  std::optional<double> find_float(const std::string& key) const;
  std::optional<bool> find_bool(const std::string& key) const;
  std::optional<std::vector<std::string>> find_string_array(const std::string& key) const;
  std::optional<std::vector<double>> find_float_array(const std::string& key) const;
  std::optional<std::vector<int64_t>> find_int_array(const std::string& key) const;

  // ---- tensors

  /// All tensor names, in the file's order.
  const std::vector<std::string>& names() const;
  /// Whether the file holds a tensor of that name.
  bool contains(const std::string& name) const;
  /// The header's entry; shape in PyTorch's order, which is the reverse of the file's. Throws for
  /// an unknown name.
  const TensorInfo& info(const std::string& name) const;
  /// The tensor, on the CPU. Quantised types (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K) are
  /// expanded to float32, bit for bit as the Python package `gguf` does; F32, F16, BF16, F64 and I8
  /// to I64 share the mapping in their own dtype.
  at::Tensor tensor(const std::string& name) const;

 private:
  struct Contents;
  explicit GgufFile(std::shared_ptr<const Contents> contents);

  std::shared_ptr<const Contents> contents_;
};

}  // namespace graft::io
