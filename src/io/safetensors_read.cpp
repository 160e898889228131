#include <graft/core/error.h>
#include <graft/io/mapped_file.h>
#include <graft/io/safetensors.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <unordered_map>

#include "format_text.h"
#include "safetensors_header.h"

namespace graft::io {
namespace {

constexpr const char* kArea = "safetensors";
constexpr size_t kPrefix = sizeof(uint64_t);

/// The JSON part of a mapped file, after the checks on its length.
std::string_view header_text(const MappedFile& file, const std::string& place) {
  GRAFT_CHECK(file.size() >= kPrefix, kArea, "a file starts with 8 bytes of header length; got ",
              file.size(), " bytes in all (", place, ")");
  uint64_t length = 0;
  std::memcpy(&length, file.data(), kPrefix);
  GRAFT_CHECK(length <= kLongestHeader, kArea, "the header must have at most ", kLongestHeader,
              " bytes; got ", length, " (", place, ")");
  GRAFT_CHECK(length <= file.size() - kPrefix, kArea, "the header must lie within the file; got ",
              length, " bytes of header in a file of ", file.size(), " (", place, ")");
  return {reinterpret_cast<const char*>(file.data()) + kPrefix, length};
}

/// Bytes that the shape needs; throws when they cannot be counted in 63 bits.
uint64_t bytes_of(const SafetensorsEntry& entry, const SafetensorsType& type,
                  const std::string& place) {
  uint64_t elements = 1;
  uint64_t extent = static_cast<uint64_t>(type.bits);  // a zero size must not hide an overflow
  bool overflow = false;
  for (const uint64_t size : entry.shape) {
    elements *= size;
    overflow |= __builtin_mul_overflow(extent, std::max<uint64_t>(size, 1), &extent);
    overflow |= extent > static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    GRAFT_CHECK(!overflow, kArea, "a tensor must have fewer than 2^63 bits; got more for ",
                quote(entry.name), " (", place, ")");
  }
  const uint64_t bits = elements * static_cast<uint64_t>(type.bits);
  GRAFT_CHECK(bits % 8 == 0, kArea, "a tensor must fill whole bytes; got ", bits, " bits for ",
              quote(entry.name), " (", place, ")");
  return bits / 8;
}

TensorInfo checked_info(const SafetensorsEntry& entry, const std::string& place) {
  const SafetensorsType* type = find_safetensors_type(entry.type);
  GRAFT_CHECK(type != nullptr, kArea, "the dtype must be one of the format; got ",
              quote(entry.type), " for ", quote(entry.name), " (", place, ")");
  const uint64_t bytes = bytes_of(entry, *type, place);
  const uint64_t begin = entry.offsets[0];
  const uint64_t end = entry.offsets[1];
  GRAFT_CHECK(begin <= end && end - begin == bytes, kArea,
              "data_offsets must span shape times item size; got [", begin, ", ", end, "] for ",
              bytes, " bytes of ", quote(entry.name), " (", place, ")");
  return {.stored_type = entry.type,
          .dtype = type->dtype,
          .shape = {entry.shape.begin(), entry.shape.end()},
          .bytes = bytes};
}

/// Checks that the entries, sorted by offset, cover `size` bytes without gaps or overlaps.
void check_coverage(const std::vector<SafetensorsEntry>& entries, size_t size,
                    const std::string& place) {
  uint64_t covered = 0;
  for (const SafetensorsEntry& entry : entries) {
    GRAFT_CHECK(entry.offsets[0] == covered, kArea,
                "tensors must follow each other without gaps or overlaps; got offset ",
                entry.offsets[0], " where ", covered, " is due for ", quote(entry.name), " (",
                place, ")");
    covered = entry.offsets[1];
    GRAFT_CHECK(covered <= size, kArea,
                "every tensor must lie within the file; got an end at byte ", covered, " of ", size,
                " for ", quote(entry.name), " (", place, ")");
  }
  GRAFT_CHECK(covered == size, kArea, "the tensors must cover the data exactly; got ", covered,
              " of ", size, " bytes (", place, ")");
}

}  // namespace

struct SafetensorsFile::Contents {
  struct Entry {
    TensorInfo info;
    size_t offset;  // from the start of the file
  };

  const Entry& entry(const std::string& name) const {
    const auto found = entries.find(name);
    GRAFT_CHECK(found != entries.end(), kArea, "no tensor of that name; got ", quote(name), " (",
                quote(file->path().string()), ")");
    return found->second;
  }

  std::shared_ptr<const MappedFile> file;
  std::vector<std::string> names;
  std::unordered_map<std::string, Entry> entries;
  std::map<std::string, std::string> metadata;
};

SafetensorsFile::SafetensorsFile(std::shared_ptr<const Contents> contents)
    : contents_(std::move(contents)) {}

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  const std::string place = quote(path.string());
  auto contents = std::make_shared<Contents>();
  contents->file = MappedFile::open(path, kArea);
  const std::string_view text = header_text(*contents->file, place);
  SafetensorsHeader header = parse_safetensors_header(text, place);

  std::sort(header.entries.begin(), header.entries.end(),
            [](const auto& a, const auto& b) { return a.offsets < b.offsets; });
  const size_t data = kPrefix + text.size();
  for (const SafetensorsEntry& entry : header.entries) {
    contents->entries.emplace(entry.name,
                              Contents::Entry{checked_info(entry, place), data + entry.offsets[0]});
    contents->names.push_back(entry.name);
  }
  check_coverage(header.entries, contents->file->size() - data, place);
  std::sort(contents->names.begin(), contents->names.end());
  contents->metadata = std::move(header.metadata);
  return SafetensorsFile(std::move(contents));
}

const std::filesystem::path& SafetensorsFile::path() const {
  return contents_->file->path();
}

const std::vector<std::string>& SafetensorsFile::names() const {
  return contents_->names;
}

bool SafetensorsFile::contains(const std::string& name) const {
  return contents_->entries.contains(name);
}

const TensorInfo& SafetensorsFile::info(const std::string& name) const {
  return contents_->entry(name).info;
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const auto& [info, offset] = contents_->entry(name);
  GRAFT_CHECK(info.dtype != at::ScalarType::Undefined, kArea, "dtype ", info.stored_type,
              " has no counterpart in LibTorch; got it for ", quote(name), " (",
              quote(path().string()), ")");
  return mapped_tensor(contents_->file, offset, info.shape, info.dtype);
}

const std::map<std::string, std::string>& SafetensorsFile::metadata() const {
  return contents_->metadata;
}

}  // namespace graft::io
