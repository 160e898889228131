/// A file's bytes as memory, and tensors that live in them.
///
/// The mapping is private: pages are read on first use and shared with every other process that
/// reads the file, and a write in place goes to a private copy of its page, never to the file. A
/// file that another process shortens while it is mapped can no longer be read safely (the system
/// raises SIGBUS); replacing it by rename, as AtomicFile does, is safe.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <filesystem>
#include <memory>

namespace graft::io {

/// One mapped file. Shared, because every tensor in it keeps it alive.
class MappedFile {
 public:
  /// Maps a regular file; throws Error("[area] ...") for a missing, unreadable or special file and
  /// for a folder.
  static std::shared_ptr<const MappedFile> open(const std::filesystem::path& path,
                                                const char* area);

  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  /// The first byte; null for an empty file. Writable, see above.
  std::byte* data() const { return data_; }
  /// Bytes in the file when it was opened.
  size_t size() const { return size_; }
  /// The path that was opened.
  const std::filesystem::path& path() const { return path_; }

 private:
  MappedFile(std::filesystem::path path, std::byte* data, size_t size);

  std::filesystem::path path_;
  std::byte* data_;
  size_t size_;
};

/// The tensor whose elements start at byte `offset` of the file: shares the mapping and keeps it
/// alive; copied when `offset` is misaligned for the dtype. The caller has checked that the
/// elements lie within the file.
at::Tensor mapped_tensor(const std::shared_ptr<const MappedFile>& file, size_t offset,
                         at::IntArrayRef shape, at::ScalarType dtype);

}  // namespace graft::io
