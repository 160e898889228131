#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/io/adapter_tensors.h>
#include <graft/io/pickled_tensors.h>
#include <graft/io/safetensors.h>

namespace graft::io {

AdapterTensors AdapterTensors::open(const std::filesystem::path& folder,
                                    const adapters::MethodEntry& method) {
  AdapterTensors found;
  std::map<std::string, at::Tensor> stored;
  std::error_code ignored;
  found.path_ = folder / "adapter_model.safetensors";
  if (const auto pickled = folder / "adapter_model.bin";
      !std::filesystem::exists(found.path_, ignored) && std::filesystem::exists(pickled, ignored)) {
    found.path_ = pickled;
    stored = read_pickled_tensors(pickled);
  } else {
    const SafetensorsFile file = SafetensorsFile::open(found.path_);
    for (const auto& name : file.names()) stored.emplace(name, file.tensor(name));
  }
  for (auto& [name, tensor] : stored) {
    const std::string now = method.modern_key ? method.modern_key(name) : name;
    GRAFT_CHECK(found.tensors_.emplace(now, tensor).second, "adapter",
                "a tensor must be there once; got ", now, " in an old and a new form (file '",
                found.path_.string(), "')");
  }
  return found;
}

std::vector<std::string> AdapterTensors::names() const {
  std::vector<std::string> names;
  for (const auto& item : tensors_) names.push_back(item.first);
  return names;
}

const at::Tensor& AdapterTensors::tensor(const std::string& name) const {
  const auto it = tensors_.find(name);
  GRAFT_CHECK(it != tensors_.end(), "adapter", "the file must hold the tensor; got no '", name,
              "' (file '", path_.string(), "')");
  return it->second;
}

std::string file_path(const adapters::MethodEntry& method, const std::string& layer) {
  return method.file_path ? method.file_path(layer) : "base_model.model." + layer;
}

}  // namespace graft::io
