/// Progress of a training run, on stderr.
#pragma once

#include <cstdint>
#include <string>

namespace graft::trainer {

/// One line that is redrawn on a terminal, and printed every few steps elsewhere.
class Progress {
 public:
  Progress(int64_t total_steps, int64_t log_every, bool quiet);
  ~Progress();
  /// `step` counts from 1.
  void update(int64_t step, const std::string& figures, double tokens_per_second,
              double seconds_a_step);
  /// A line of its own, above the progress line.
  void note(const std::string& text);
  /// The same, whatever --quiet says.
  void warn(const std::string& text);
  /// Takes the redrawn line away.
  void clear();

 private:
  int64_t total_, log_every_;
  bool quiet_, terminal_;
  bool drawn_ = false;
};

}  // namespace graft::trainer
