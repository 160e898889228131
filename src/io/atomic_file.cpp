#include <fcntl.h>
#include <graft/core/error.h>
#include <graft/io/atomic_file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "format_text.h"

namespace graft::io {
namespace {

namespace fs = std::filesystem;

constexpr const char* kArea = "file";

/// A name that no other AtomicFile of this machine uses now; O_EXCL decides for the rest.
std::string temporary_name() {
  static std::atomic<unsigned> counter{0};
  return ".graft-" + std::to_string(::getpid()) + "-" + std::to_string(counter++) + ".tmp";
}

fs::path folder_of(const fs::path& path) {
  return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

[[noreturn]] void fail_with(const char* what, int error, const fs::path& path) {
  fail(kArea, concat("the file must be written in full; got '", std::strerror(error), "' while ",
                     what, " (", quote(path.string()), ")"));
}

/// Makes a rename in `folder` survive a power loss. Some file systems cannot flush a folder, which
/// is no error.
void flush_folder(const fs::path& folder, const fs::path& path) {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return;
  const int error = ::fsync(descriptor) == 0 ? 0 : errno;
  ::close(descriptor);
  if (error == EIO || error == ENOSPC || error == EDQUOT) {
    fail_with("flushing its folder (the file itself is replaced)", error, path);
  }
}

}  // namespace

AtomicFile::AtomicFile(const fs::path& path) : path_(path) {
  std::error_code error;
  if (fs::is_symlink(path, error)) {
    const fs::path target = fs::canonical(path, error);
    if (!error) path_ = target;  // a link that leads nowhere is replaced itself
  }
  struct stat old {};
  const bool exists = ::stat(path_.c_str(), &old) == 0;
  GRAFT_CHECK(path_.has_filename() && (!exists || S_ISREG(old.st_mode)), kArea,
              "only a regular file can be written; got ",
              !exists || S_ISDIR(old.st_mode) ? "a folder" : "a device, pipe or socket", " (",
              quote(path.string()), ")");

  do {
    temporary_ = folder_of(path_) / temporary_name();
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (descriptor_ < 0 && (errno == EEXIST || errno == EINTR));
  if (descriptor_ < 0) {
    const int reason = errno;
    temporary_.clear();
    fail_with("creating a temporary file in its folder", reason, path_);
  }
  // Whoever could not read the old file shall not read the new one.
  if (exists && ::fchmod(descriptor_, old.st_mode & 07777) != 0) {
    abandon("copying the old file's permissions", errno);
  }
}

AtomicFile::~AtomicFile() {
  remove_temporary();
}

void AtomicFile::remove_temporary() noexcept {
  if (descriptor_ >= 0) ::close(descriptor_);
  descriptor_ = -1;
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
  temporary_.clear();
}

void AtomicFile::abandon(const char* what, int error) {
  remove_temporary();
  fail_with(what, error, path_);
}

void AtomicFile::write(const void* bytes, size_t size) {
  GRAFT_CHECK(descriptor_ >= 0, kArea, "nothing can be written after commit or an error; got ",
              size, " bytes (", quote(path_.string()), ")");
  // Linux writes at most 2^31 - 4096 bytes a call.
  constexpr size_t kMost = size_t{1} << 30;
  const char* next = static_cast<const char*>(bytes);
  while (size > 0) {
    const ssize_t written = ::write(descriptor_, next, std::min(size, kMost));
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) abandon("writing", written < 0 ? errno : ENOSPC);
    next += written;
    size -= static_cast<size_t>(written);
  }
}

void AtomicFile::commit() {
  GRAFT_CHECK(descriptor_ >= 0, kArea,
              "commit must be called once, before any error; got a closed file (",
              quote(path_.string()), ")");
  if (::fsync(descriptor_) != 0) abandon("flushing it to the disk", errno);
  // Network file systems report a full disk only here.
  if (::close(std::exchange(descriptor_, -1)) != 0 && errno != EINTR) abandon("closing it", errno);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) abandon("renaming the temporary", errno);
  temporary_.clear();
  flush_folder(folder_of(path_), path_);
}

void write_text_file(const fs::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

}  // namespace graft::io
