/// Runs one of the example programs and catches what it says.
#pragma once

#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string>

#include "tests/support/testing.h"

namespace graft::testing {

/// What a finished program left.
struct ProgramResult {
  int code = -1;
  std::string out;
  std::string err;
};

/// A folder that is gone at the end of the test.
class ScratchFolder {
 public:
  ScratchFolder() {
    std::random_device seed;
    path_ = std::filesystem::temp_directory_path() / ("graft-programs-" + std::to_string(seed()));
    std::filesystem::create_directories(path_);
  }
  ~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

inline std::string slurp(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::stringstream bytes;
  bytes << stream.rdbuf();
  return bytes.str();
}

inline void spill(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// Runs a shell command.
inline ProgramResult run_shell(const std::string& command_line) {
  const ScratchFolder scratch;
  const std::string command = "( " + command_line + " ) 2> " + (scratch / "err");
  ProgramResult result;
  std::FILE* pipe = popen(command.c_str(), "r");
  std::array<char, 4096> buffer;
  for (size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;)
    result.out.append(buffer.data(), n);
  const int status = pclose(pipe);
  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  result.err = slurp(scratch / "err");
  return result;
}

/// Runs one program; `arguments` go through the shell.
inline ProgramResult run(const std::string& program, const std::string& arguments) {
  return run_shell(std::string(GRAFT_BIN) + "/" + program + " " + arguments);
}

inline std::string golden(const std::string& name) {
  std::string path = GRAFT_GOLDENS;
  path += "/programs/";
  path += name;
  return path;
}

/// The flags of a run of a method on the tiny model and text.
inline std::string on_tiny_model(const std::string& method) {
  return "--method " + method + " --model " + golden("tiny") + " --data " + golden("text.txt") +
         " --seq-len 32 --batch-size 2 --quiet --schedule constant ";
}

/// What `evaluate` says of the tiny model on the text, with these arguments besides.
inline double loss_of(const std::string& arguments) {
  const auto result = run("evaluate", "--model " + golden("tiny") + " --data " +
                                          golden("text.txt") + " --seq-len 32 " + arguments);
  INFO(result.err);
  REQUIRE(result.code == 0);
  return nlohmann::json::parse(result.out)["loss"];
}

}  // namespace graft::testing
