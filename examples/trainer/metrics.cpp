#include "examples/trainer/metrics.h"

#include <graft/core/error.h>
#include <graft/io/atomic_file.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

namespace graft::trainer {
namespace {

// The lines of the steps before `first_step`.
std::string kept_lines(const std::filesystem::path& path, int64_t first_step) {
  std::string kept;
  std::ifstream stream(path);
  for (std::string line; first_step > 0 && std::getline(stream, line);) {
    const auto object = nlohmann::json::parse(line, nullptr, false);
    if (object.is_object() && object.value("step", first_step) < first_step) kept += line + "\n";
  }
  return kept;
}

}  // namespace

MetricsFile::MetricsFile(const std::filesystem::path& path, int64_t first_step) : path_(path) {
  io::write_text_file(path, kept_lines(path, first_step));
  file_.reset(std::fopen(path.c_str(), "a"));
  GRAFT_CHECK(file_ != nullptr, "metrics", "the output folder must be writable; got '",
              path.string(), "': ", std::strerror(errno));
}

void MetricsFile::write(const StepMetrics& m) {
  nlohmann::ordered_json line = {{"step", m.step},     {"loss", m.loss},
                                 {"lr", m.lr},         {"grad_norm", m.grad_norm},
                                 {"tokens", m.tokens}, {"seconds", m.seconds}};
  for (const auto& [name, value] : m.figures) line[name] = value;
  const std::string text = line.dump() + "\n";
  const bool written = std::fwrite(text.data(), 1, text.size(), file_.get()) == text.size() &&
                       std::fflush(file_.get()) == 0;
  GRAFT_CHECK(written, "metrics", "the line must reach the disk; got '", path_.string(),
              "': ", std::strerror(errno));
}

}  // namespace graft::trainer
