/// The tensors of an adapter folder, whatever file holds them.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/adapters/recipe.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace graft::io {

/// adapter_model.safetensors, or else the pickled adapter_model.bin, with the names of now
/// (MethodEntry::modern_key).
class AdapterTensors {
 public:
  /// Throws when the folder holds neither, and for what the file's format refuses.
  static AdapterTensors open(const std::filesystem::path& folder,
                             const adapters::MethodEntry& method);

  /// The file that was opened.
  const std::filesystem::path& path() const { return path_; }
  /// All names, sorted.
  std::vector<std::string> names() const;
  bool contains(const std::string& name) const { return tensors_.count(name) > 0; }
  /// The tensor, on the CPU; throws for an unknown name. Of a safetensors file nothing is read
  /// before its elements are.
  const at::Tensor& tensor(const std::string& name) const;

 private:
  std::filesystem::path path_;
  std::map<std::string, at::Tensor> tensors_;
};

/// The path of a layer's tensors in a method's files: "base_model.model." and the layer's name
/// where the method has no other.
std::string file_path(const adapters::MethodEntry& method, const std::string& layer);

}  // namespace graft::io
