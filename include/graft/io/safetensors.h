/// Tensors in safetensors files, as Hugging Face writes and reads them.
///
/// Layout: 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets: [begin,
/// end]}}, then the data. Format: https://github.com/huggingface/safetensors#format Reading is as
/// strict as the reference: the tensors must cover the data exactly, without gaps or overlaps.
/// Every failure is a graft::Error that names the file, the rule and the value.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/io/tensor_info.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace graft::io {

/// One safetensors file, mapped. Copies are cheap and share the mapping.
class SafetensorsFile {
 public:
  /// Maps the file and checks its whole header.
  static SafetensorsFile open(const std::filesystem::path& path);

  /// The path that was opened.
  const std::filesystem::path& path() const;
  /// All names, sorted.
  const std::vector<std::string>& names() const;
  /// Whether the file holds a tensor of that name.
  bool contains(const std::string& name) const;
  /// The header's entry; throws for an unknown name.
  const TensorInfo& info(const std::string& name) const;
  /// The tensor, on the CPU. It shares the mapping and keeps it alive: nothing is read before its
  /// elements are, and writes in place never reach the file. Throws for an unknown name and for a
  /// dtype that ATen lacks (F4, F6_*).
  at::Tensor tensor(const std::string& name) const;
  /// The header's `__metadata__`; empty when there is none.
  const std::map<std::string, std::string>& metadata() const;

 private:
  struct Contents;
  explicit SafetensorsFile(std::shared_ptr<const Contents> contents);

  std::shared_ptr<const Contents> contents_;
};

/// The weights of a Hugging Face model folder: `model.safetensors`, or
/// `model.safetensors.index.json` and its shards.
class Checkpoint {
 public:
  /// Opens a folder, one safetensors file, or an index (*.index.json). Every shard must exist
  /// within the folder and hold exactly the tensors that the index promises; what is missing or
  /// unexpected is listed by name, all at once.
  static Checkpoint open(const std::filesystem::path& folder_or_file);

  /// All names, sorted.
  const std::vector<std::string>& names() const { return names_; }
  /// Whether one of the files holds a tensor of that name.
  bool contains(const std::string& name) const;
  /// The header's entry; throws for an unknown name.
  const TensorInfo& info(const std::string& name) const;
  /// The tensor, as SafetensorsFile::tensor gives it.
  at::Tensor tensor(const std::string& name) const;
  /// The files, in the order of their names.
  const std::vector<SafetensorsFile>& files() const { return files_; }

 private:
  static Checkpoint open_index(const std::filesystem::path& index);
  void add(const SafetensorsFile& file);
  const SafetensorsFile& file_of(const std::string& name) const;

  std::filesystem::path path_;
  std::vector<std::string> names_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, size_t> file_index_;
};

/// Writes the tensors byte for byte as Python's `safetensors.torch.save_file` does (its order, its
/// header), atomically: see AtomicFile. Tensors may lie on any device and need not be contiguous;
/// they are gathered one at a time. Metadata keys are sorted (the reference leaves the order of
/// several to chance). Throws for duplicate names, the reserved name `__metadata__`,
/// names that are not UTF-8, undefined or sparse tensors and dtypes that the format lacks.
void write_safetensors(const std::filesystem::path& path,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace graft::io
