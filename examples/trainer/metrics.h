/// metrics.jsonl: one line a step, on disk as soon as the step is done.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace graft::trainer {

/// What is written of one step.
struct StepMetrics {
  int64_t step = 0;  ///< from 0
  double loss = 0, lr = 0, grad_norm = 0;
  int64_t tokens = 0;
  double seconds = 0;
  std::vector<std::pair<std::string, double>> figures = {};  ///< the method's own
};

/// Appends steps to the file. Lines of a resumed run from step `first_step` on are dropped first.
class MetricsFile {
 public:
  MetricsFile(const std::filesystem::path& path, int64_t first_step);
  /// Throws when the line cannot be written (full disk).
  void write(const StepMetrics& metrics);

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::filesystem::path path_;
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace graft::trainer
