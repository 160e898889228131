#include <ATen/ATen.h>
#include <graft/io/atomic_file.h>
#include <graft/io/safetensors.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>

#include "tests/io/file_helpers.h"
#include "tests/support/testing.h"

using graft::io::AtomicFile;
using graft::io::write_safetensors;
using graft::io::write_text_file;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::read_bytes;
using graft::testing::TempFolder;
using graft::testing::write_bytes;

namespace {

/// While it lives, a file of this process cannot grow past `bytes`: the nearest thing to a full
/// disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &old_);
    const rlimit limit{bytes, old_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &old_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit old_{};
  void (*handler_)(int);
};

}  // namespace

TEST_CASE("a file appears at commit and not before", "[io][atomic_file]") {
  const TempFolder folder;
  write_bytes(folder / "f", "old");
  {
    AtomicFile file(folder / "f");
    file.write("new ", 4);
    file.write("text", 4);
    REQUIRE(read_bytes(folder / "f") == "old");
    file.commit();
    REQUIRE(read_bytes(folder / "f") == "new text");
    REQUIRE(contains(error_of([&] { file.write("x", 1); }), "after commit"));
    REQUIRE(contains(error_of([&] { file.commit(); }), "called once"));
  }
  REQUIRE(folder.list() == std::vector<std::string>{"f"});
}

TEST_CASE("a file that is not committed leaves no trace", "[io][atomic_file]") {
  const TempFolder folder;
  write_bytes(folder / "f", "old");
  try {
    AtomicFile file(folder / "f");
    file.write("new", 3);
    throw std::runtime_error("stop");
  } catch (const std::runtime_error&) {
  }
  REQUIRE(read_bytes(folder / "f") == "old");
  REQUIRE(folder.list() == std::vector<std::string>{"f"});
}

TEST_CASE("a disk that takes no more leaves the old file and says so", "[io][atomic_file]") {
  const TempFolder folder;
  write_bytes(folder / "f", "old");
  std::string text_error;
  std::string tensor_error;
  {
    const FileSizeLimit limit(4096);
    text_error = error_of([&] { write_text_file(folder / "f", std::string(5000, 'x')); });
    tensor_error = error_of([&] { write_safetensors(folder / "f", {{"w", at::ones({2000})}}); });
  }
  for (const auto& error : {text_error, tensor_error}) {
    INFO(error);
    REQUIRE(contains(error, "[file] "));
    REQUIRE(contains(error, "'File too large' while writing"));
    REQUIRE(contains(error, (folder / "f").string()));
  }
  REQUIRE(read_bytes(folder / "f") == "old");
  REQUIRE(folder.list() == std::vector<std::string>{"f"});
}

TEST_CASE("only regular files are replaced", "[io][atomic_file]") {
  const TempFolder folder;
  const auto error = [](const std::filesystem::path& path) {
    return error_of([&] { write_text_file(path, "x"); });
  };
  REQUIRE(contains(error(folder.path()), "got a folder"));
  REQUIRE(contains(error(folder / "new/"), "got a folder"));
  REQUIRE(contains(error("/dev/full"), "got a device"));
  REQUIRE(contains(error(folder / "absent/f"), "'No such file or directory' while creating"));
  std::filesystem::permissions(folder.path(), std::filesystem::perms(0555));
  // The superuser may write everywhere, so that one steps down for the question.
  const bool root = ::geteuid() == 0;
  if (root) REQUIRE(::seteuid(65534) == 0);
  std::string denied;
  try {
    write_text_file(folder / "f", "x");
  } catch (const graft::Error& caught) {
    denied = caught.what();
  }
  if (root) REQUIRE(::seteuid(0) == 0);
  std::filesystem::permissions(folder.path(), std::filesystem::perms(0755));
  REQUIRE(contains(denied, "'Permission denied' while creating"));
  REQUIRE(folder.list().empty());
}

TEST_CASE("a symbolic link keeps pointing at the file it names", "[io][atomic_file]") {
  const TempFolder folder;
  write_bytes(folder / "target", "old");
  std::filesystem::create_symlink("target", folder / "link");
  write_text_file(folder / "link", "new");
  REQUIRE(std::filesystem::is_symlink(folder / "link"));
  REQUIRE(read_bytes(folder / "target") == "new");
}

TEST_CASE("a replaced file keeps its permissions", "[io][atomic_file]") {
  const TempFolder folder;
  write_bytes(folder / "f", "old");
  ::chmod((folder / "f").c_str(), 0600);
  write_text_file(folder / "f", "new");
  struct stat status {};
  REQUIRE(::stat((folder / "f").c_str(), &status) == 0);
  REQUIRE((status.st_mode & 07777) == 0600);
}
