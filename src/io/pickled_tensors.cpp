#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/io/atomic_file.h>
#include <graft/io/pickled_tensors.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iterator>

namespace graft::io {
namespace {

constexpr const char* kArea = "pickle";

std::vector<char> read_bytes(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  std::error_code ignored;
  GRAFT_CHECK(stream && std::filesystem::is_regular_file(path, ignored), kArea,
              "the file must exist and be readable; got '", path.string(), "'");
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

// LibTorch says in many lines what is wrong: the first will do.
std::string first_line(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  const std::string text = torch_error ? torch_error->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

c10::IValue load(const std::filesystem::path& path) {
  const std::vector<char> bytes = read_bytes(path);
  try {
    return torch::jit::pickle_load(bytes);
  } catch (const std::exception& error) {
    fail(kArea, concat("the file must be a dict of tensors as torch.save writes it; got ",
                       first_line(error), " (file '", path.string(), "')"));
  }
}

}  // namespace

std::map<std::string, at::Tensor> read_pickled_tensors(const std::filesystem::path& path) {
  const c10::IValue value = load(path);
  GRAFT_CHECK(value.isGenericDict(), kArea, "the file must hold a dict of tensors; got a ",
              value.tagKind(), " (file '", path.string(), "')");
  std::map<std::string, at::Tensor> tensors;
  for (const auto& item : value.toGenericDict()) {
    GRAFT_CHECK(item.key().isString() && item.value().isTensor(), kArea,
                "the dict must hold tensors by name; got a ", item.value().tagKind(), " under a ",
                item.key().tagKind(), " (file '", path.string(), "')");
    tensors.emplace(item.key().toStringRef(), item.value().toTensor().to(at::kCPU));
  }
  return tensors;
}

void write_pickled_tensors(const std::filesystem::path& path,
                           const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
  c10::Dict<std::string, at::Tensor> dict;
  // Copies: a view would take its whole storage along.
  for (const auto& [name, tensor] : tensors)
    dict.insert(name, tensor.detach().to(at::kCPU).clone(at::MemoryFormat::Contiguous));
  const std::vector<char> bytes = torch::jit::pickle_save(dict);
  AtomicFile file(path);
  file.write(bytes.data(), bytes.size());
  file.commit();
}

}  // namespace graft::io
