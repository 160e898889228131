#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/io/atomic_file.h>
#include <graft/io/safetensors.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "format_text.h"
#include "safetensors_header.h"

namespace graft::io {
namespace {

constexpr const char* kArea = "safetensors";

using NamedTensor = std::pair<std::string, at::Tensor>;

const SafetensorsType& stored_type(const at::Tensor& tensor) {
  return *find_safetensors_type(tensor.scalar_type());
}

void check_tensor(const NamedTensor& item, const std::string& place) {
  const auto& [name, tensor] = item;
  GRAFT_CHECK(name != "__metadata__", kArea, "the name __metadata__ is reserved; got a tensor (",
              place, ")");
  GRAFT_CHECK(is_utf8(name), kArea, "names must be UTF-8; got ", quote(name), " (", place, ")");
  GRAFT_CHECK(tensor.defined(), kArea, "every tensor must be defined; got an undefined ",
              quote(name), " (", place, ")");
  GRAFT_CHECK(tensor.layout() == at::kStrided && !tensor.is_meta(), kArea,
              "every tensor must be dense; got ",
              tensor.is_meta() ? "a meta tensor" : "another layout", " for ", quote(name), " (",
              place, ")");
  GRAFT_CHECK(find_safetensors_type(tensor.scalar_type()) != nullptr, kArea,
              "the format lacks the dtype; got ", c10::toString(tensor.scalar_type()), " for ",
              quote(name), " (", place, ")");
}

/// The tensors in the file's order: the reference's rank of the type, highest first, then the name.
std::vector<const NamedTensor*> file_order(const std::vector<NamedTensor>& tensors,
                                           const std::string& place) {
  std::set<std::string_view> names;
  std::vector<const NamedTensor*> order;
  for (const NamedTensor& item : tensors) {
    check_tensor(item, place);
    GRAFT_CHECK(names.insert(item.first).second, kArea, "every name must appear once; got ",
                quote(item.first), " twice (", place, ")");
    order.push_back(&item);
  }
  std::sort(order.begin(), order.end(), [](const NamedTensor* a, const NamedTensor* b) {
    return std::tuple(-stored_type(a->second).rank, std::string_view(a->first)) <
           std::tuple(-stored_type(b->second).rank, std::string_view(b->first));
  });
  return order;
}

/// The JSON part, padded with spaces so that the data starts at a multiple of 8 bytes.
std::string header_text(const std::vector<const NamedTensor*>& order,
                        const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  // ordered_json looks a key up by linear search; the names are known to be distinct.
  auto& members = header.get_ref<nlohmann::ordered_json::object_t&>();
  size_t offset = 0;
  for (const NamedTensor* item : order) {
    const at::Tensor& tensor = item->second;
    const size_t end = offset + tensor.nbytes();
    nlohmann::ordered_json entry;
    entry["dtype"] = stored_type(tensor).name;
    entry["shape"] = tensor.sizes().vec();
    entry["data_offsets"] = {offset, end};
    members.emplace_back(item->first, std::move(entry));
    offset = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return text;
}

}  // namespace

void write_safetensors(const std::filesystem::path& path, const std::vector<NamedTensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  const std::string place = quote(path.string());
  for (const auto& [key, value] : metadata) {
    GRAFT_CHECK(is_utf8(key) && is_utf8(value), kArea, "metadata must be UTF-8; got ", quote(key),
                ": ", quote(value), " (", place, ")");
  }
  const std::vector<const NamedTensor*> order = file_order(tensors, place);
  const std::string header = header_text(order, metadata);
  GRAFT_CHECK(header.size() <= kLongestHeader, kArea, "the header must have at most ",
              kLongestHeader, " bytes; got ", header.size(), " (", place, ")");

  AtomicFile file(path);
  const uint64_t length = header.size();
  file.write(&length, sizeof(length));
  file.write(header.data(), header.size());
  for (const NamedTensor* item : order) {
    const at::Tensor dense =
        item->second.detach().to(at::kCPU).resolve_conj().resolve_neg().contiguous();
    file.write(dense.const_data_ptr(), dense.nbytes());
  }
  file.commit();
}

}  // namespace graft::io
