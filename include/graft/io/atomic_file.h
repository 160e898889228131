/// Files that appear whole or not at all.
///
/// The bytes go to a temporary file in the same folder; `commit` flushes it to the disk and renames
/// it over the path. Until then, and after any failure (full disk, read-only folder, exception,
/// crash), the old file stays as it was.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string_view>

namespace graft::io {

/// One file that is being replaced. Errors of the system are thrown as graft::Error and remove the
/// temporary.
class AtomicFile {
 public:
  /// Creates the temporary file beside `path`. A symbolic link is followed: its target is replaced.
  explicit AtomicFile(const std::filesystem::path& path);

  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  /// Removes the temporary file unless `commit` succeeded.
  ~AtomicFile();

  /// Appends `size` bytes.
  void write(const void* bytes, size_t size);

  /// Flushes to the disk, renames over the path, flushes the folder. Call once; nothing may be
  /// written afterwards.
  void commit();

 private:
  [[noreturn]] void abandon(const char* what, int error);
  void remove_temporary() noexcept;

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  int descriptor_ = -1;
};

/// Replaces the file at `path` by `text`.
void write_text_file(const std::filesystem::path& path, std::string_view text);

}  // namespace graft::io
