/// What all programs share: common flags, error lines, exit codes, facts about the process.
#pragma once

#include <c10/core/ScalarType.h>
#include <graft/attach/attach.h>
#include <CLI/CLI.hpp>

#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "examples/models/load.h"

namespace graft::trainer {

/// Flags that every program understands.
struct CommonOptions {
  std::string model;
  std::vector<std::string> adapters;
  std::string device = "cpu";
  std::string dtype = "fp32";
  int threads = 0;  ///< 0: as many as LibTorch chooses
  uint64_t seed = 0;
  bool quiet = false;
  bool verbose = false;
  bool json = false;
};

/// Adds the common flags. `adapter`: the program takes --adapter.
void add_common_flags(CLI::App& app, CommonOptions& options, bool adapter);

/// Applies the threads, and says what computes where asked to.
void apply_common(const CommonOptions& options);

/// The device of --device, ready for use (device.h).
at::Device compute_device(const CommonOptions& options);

/// The compute type that --dtype names.
at::ScalarType compute_dtype(const CommonOptions& options);

/// Attaches the adapters that the flags name, all of them active, and puts the model in eval mode.
/// Returns the handle of the last one, or nothing.
std::optional<AttachedAdapter> attach_adapters(models::DecoderImpl& decoder,
                                               const CommonOptions& options);

/// A mistake in the call: exit code 2 instead of 1.
class UsageError : public Error {
 public:
  using Error::Error;
};

/// What a failed allocation asked for, "2.00 GiB"; nothing where the error is another one.
std::optional<std::string> out_of_memory(const std::exception& error);

/// Parses the command line and runs `body`, whose value is the exit code. Prints one line and
/// returns 2 for wrong usage, 1 for any other failure.
int run_program(CLI::App& app, int argc, char** argv, const std::function<int()>& body);

/// The file's bytes; throws unless it is a readable file.
std::string read_file(const std::string& path, const char* area);

/// Largest resident set of the process so far, MiB.
double peak_rss_mib();

}  // namespace graft::trainer
