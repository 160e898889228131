#include "examples/trainer/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>

namespace graft::trainer {
namespace {

std::string duration(double seconds) {
  const auto whole = static_cast<int64_t>(std::lround(seconds));
  if (whole >= 3600)
    return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
  return fmt::format("{}:{:02}", whole / 60, whole % 60);
}

}  // namespace

Progress::Progress(int64_t total_steps, int64_t log_every, bool quiet)
    : total_(total_steps),
      log_every_(log_every),
      quiet_(quiet),
      terminal_(isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
  if (drawn_) std::fputc('\n', stderr);
}

void Progress::clear() {
  if (drawn_) std::fputs("\r\033[K", stderr);
  drawn_ = false;
}

void Progress::update(int64_t step, const std::string& figures, double tokens_per_second,
                      double seconds_a_step) {
  if (quiet_ || (!terminal_ && step % log_every_ != 0 && step != total_ && step != 1)) return;
  const std::string line =
      fmt::format("step {}/{}  {}  {:.0f} tokens/s  {} left", step, total_, figures,
                  tokens_per_second, duration(seconds_a_step * static_cast<double>(total_ - step)));
  clear();
  std::fputs(line.c_str(), stderr);
  if (terminal_)
    drawn_ = true;
  else
    std::fputc('\n', stderr);
  std::fflush(stderr);
}

void Progress::note(const std::string& text) {
  if (!quiet_) warn(text);
}

void Progress::warn(const std::string& text) {
  clear();
  std::fputs((text + "\n").c_str(), stderr);
  std::fflush(stderr);
}

}  // namespace graft::trainer
