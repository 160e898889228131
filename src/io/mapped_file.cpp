#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <graft/core/error.h>
#include <graft/io/mapped_file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "format_text.h"

namespace graft::io {
namespace {

/// Closes a file descriptor at the end of its scope.
struct Descriptor {
  int value;
  ~Descriptor() {
    if (value >= 0) ::close(value);
  }
};

[[noreturn]] void fail_to_open(const std::filesystem::path& path, const char* area, int error) {
  fail(area, concat("the file must exist and be readable; got '", std::strerror(error), "' (",
                    quote(path.string()), ")"));
}

}  // namespace

MappedFile::MappedFile(std::filesystem::path path, std::byte* data, size_t size)
    : path_(std::move(path)), data_(data), size_(size) {}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

std::shared_ptr<const MappedFile> MappedFile::open(const std::filesystem::path& path,
                                                   const char* area) {
  // Without O_NONBLOCK, opening a named pipe would wait for a writer.
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.value < 0) fail_to_open(path, area, errno);
  struct stat status {};
  if (::fstat(file.value, &status) != 0) fail_to_open(path, area, errno);
  GRAFT_CHECK(S_ISREG(status.st_mode), area, "must be a regular file; got ",
              S_ISDIR(status.st_mode) ? "a folder" : "a device, pipe or socket", " (",
              quote(path.string()), ")");

  const auto size = static_cast<size_t>(status.st_size);
  void* data = nullptr;
  if (size > 0) {
    // MAP_NORESERVE: the pages are writable, but a checkpoint larger than the memory must still
    // map.
    data =
        ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.value, 0);
    if (data == MAP_FAILED) fail_to_open(path, area, errno);
  }
  return std::shared_ptr<const MappedFile>(
      new MappedFile(path, static_cast<std::byte*>(data), size));
}

at::Tensor mapped_tensor(const std::shared_ptr<const MappedFile>& file, size_t offset,
                         at::IntArrayRef shape, at::ScalarType dtype) {
  const size_t bytes = c10::multiply_integers(shape) * c10::elementSize(dtype);
  const auto options = at::TensorOptions().dtype(dtype);
  if (bytes == 0) return at::empty(shape, options);
  std::byte* const data = file->data() + offset;
  if (reinterpret_cast<uintptr_t>(data) % c10::elementSize(dtype) != 0) {
    at::Tensor copy = at::empty(shape, options);
    std::memcpy(copy.mutable_data_ptr(), data, bytes);
    return copy;
  }
  return at::from_blob(
      data, shape, [file](void*) {}, options);
}

}  // namespace graft::io
