#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <graft/core/error.h>
#include <graft/io/gguf.h>

#include <algorithm>
#include <limits>

#include "format_text.h"
#include "gguf_contents.h"

namespace graft::io {
namespace {

constexpr const char* kArea = "gguf";

/// The alignment of the data and of every tensor in it: `general.alignment`, else 32.
uint64_t alignment_of(const GgufHeader& header, const std::string& place) {
  for (const auto& [key, value] : header.values) {
    if (key != "general.alignment") continue;
    GRAFT_CHECK(!value.is_array && value.type == GgufValueType::uint32, kArea,
                "general.alignment must be a uint32; got ", value.is_array ? "an array of " : "",
                name_of(value.type), place);
    const auto alignment = read_unaligned<uint32_t>(value.bytes);
    GRAFT_CHECK(alignment != 0 && (alignment & (alignment - 1)) == 0, kArea,
                "general.alignment must be a power of two; got ", alignment, place);
    return alignment;
  }
  return 32;
}

/// Bytes of a tensor's data; throws when they cannot be counted or a row is no whole number of
/// blocks.
uint64_t bytes_of(const GgufEntry& entry, const std::string& place) {
  const GgufType& type = *entry.type;
  const uint64_t row = entry.dims.empty() ? 1 : entry.dims[0];
  GRAFT_CHECK(row % type.block_elements == 0, kArea, "a row of ", type.name,
              " must be a multiple of ", type.block_elements, "; got ", row, " for ",
              quote(entry.name), place);
  uint64_t elements = 1;
  uint64_t extent =
      sizeof(double);  // bytes of the widest result; a zero size must not hide an overflow
  for (const uint64_t size : entry.dims) {
    elements *= size;
    const bool overflow = __builtin_mul_overflow(extent, std::max<uint64_t>(size, 1), &extent);
    GRAFT_CHECK(!overflow && extent <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()),
                kArea, "a tensor must have fewer than 2^60 elements; got more for ",
                quote(entry.name), place);
  }
  return elements / type.block_elements * type.block_bytes;
}

/// Where the data of one tensor lies in the file.
struct Extent {
  uint64_t begin;
  uint64_t end;
  const std::string* name;
};

void check_no_overlap(std::vector<Extent> extents, const std::string& place) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  for (size_t i = 1; i < extents.size(); ++i) {
    GRAFT_CHECK(extents[i].begin >= extents[i - 1].end, kArea, "tensors must not overlap; got ",
                quote(*extents[i - 1].name), " and ", quote(*extents[i].name), place);
  }
}

at::Tensor dequantize(const GgufType& type, const uint8_t* blocks, at::IntArrayRef shape) {
  at::Tensor out = at::empty(shape, at::kFloat);
  float* const values = out.mutable_data_ptr<float>();
  constexpr int64_t kElementsPerTask = 1 << 15;
  at::parallel_for(0, out.numel() / type.block_elements, kElementsPerTask / type.block_elements,
                   [&](int64_t begin, int64_t end) {
                     type.dequantize(blocks + begin * type.block_bytes,
                                     values + begin * type.block_elements, end - begin);
                   });
  return out;
}

}  // namespace

const GgufFile::Contents::Tensor& GgufFile::Contents::tensor(const std::string& name) const {
  const auto found = tensors.find(name);
  GRAFT_CHECK(found != tensors.end(), kArea, "no tensor of that name; got ", quote(name), place());
  return found->second;
}

std::string GgufFile::Contents::place() const {
  return " (" + quote(file->path().string()) + ")";
}

GgufFile::GgufFile(std::shared_ptr<const Contents> contents) : contents_(std::move(contents)) {}

GgufFile GgufFile::open(const std::filesystem::path& path) {
  auto contents = std::make_shared<Contents>();
  contents->file = MappedFile::open(path, kArea);
  const MappedFile& file = *contents->file;
  GgufHeader header = parse_gguf_header(file.data(), file.size(), quote(path.string()));
  const std::string place = contents->place();

  const uint64_t alignment = alignment_of(header, place);
  const uint64_t data = (header.size + alignment - 1) / alignment * alignment;
  std::vector<Extent> extents;
  for (const GgufEntry& entry : header.tensors) {
    GRAFT_CHECK(entry.offset % alignment == 0, kArea, "a tensor's offset must be a multiple of ",
                alignment, "; got ", entry.offset, " for ", quote(entry.name), place);
    const uint64_t bytes = bytes_of(entry, place);
    GRAFT_CHECK(data <= file.size() && entry.offset <= file.size() - data &&
                    bytes <= file.size() - data - entry.offset,
                kArea, "every tensor must lie within the file; got ", bytes, " bytes at ",
                entry.offset, " after byte ", data, " of ", file.size(), " for ", quote(entry.name),
                place);
    extents.push_back({entry.offset, entry.offset + bytes, &entry.name});
    contents->names.push_back(entry.name);
    contents->tensors.emplace(entry.name,
                              Contents::Tensor{{.stored_type = entry.type->name,
                                                .dtype = entry.type->dtype,
                                                .shape = {entry.dims.rbegin(), entry.dims.rend()},
                                                .bytes = bytes},
                                               entry.type,
                                               data + entry.offset});
  }
  check_no_overlap(std::move(extents), place);
  for (auto& [key, value] : header.values) {
    contents->keys.push_back(key);
    contents->values.emplace(std::move(key), value);
  }
  return GgufFile(std::move(contents));
}

const std::filesystem::path& GgufFile::path() const {
  return contents_->file->path();
}

const std::vector<std::string>& GgufFile::names() const {
  return contents_->names;
}

bool GgufFile::contains(const std::string& name) const {
  return contents_->tensors.contains(name);
}

const TensorInfo& GgufFile::info(const std::string& name) const {
  return contents_->tensor(name).info;
}

at::Tensor GgufFile::tensor(const std::string& name) const {
  const auto& [info, type, offset] = contents_->tensor(name);
  GRAFT_CHECK(info.dtype != at::ScalarType::Undefined, kArea, "type ", info.stored_type,
              " cannot be read; got it for ", quote(name), contents_->place());
  if (type->dequantize == nullptr) {
    return mapped_tensor(contents_->file, offset, info.shape, info.dtype);
  }
  const auto* blocks = reinterpret_cast<const uint8_t*>(contents_->file->data() + offset);
  return dequantize(*type, blocks, info.shape);
}

}  // namespace graft::io
