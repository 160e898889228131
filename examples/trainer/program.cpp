#include "examples/trainer/program.h"

#include "examples/trainer/device.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <graft/core/error.h>
#include <graft/ops/frozen_product.h>
#include <malloc.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

namespace graft::trainer {
namespace {

// The first line of a message, without LibTorch's back trace.
std::string first_line(std::string text) {
  const size_t end = text.find('\n');
  return end == std::string::npos ? text : text.substr(0, end);
}

int report(const std::string& text, int code) {
  std::cout.flush();
  std::cerr << "error: " << first_line(text) << std::endl;
  return code;
}

// Activations of a step are allocated and freed in the same sizes over and over: keeping them
// spares the kernel from handing out, zeroing and mapping the same pages in every step.
void keep_freed_memory() {
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
  mallopt(M_ARENA_MAX, 1);  // one heap: memory kept by one thread's would be lost to the others
}

}  // namespace

void add_common_flags(CLI::App& app, CommonOptions& options, bool adapter) {
  const char* group = "Common";
  app.add_option("--model", options.model, "Hugging Face folder, or one .gguf file")
      ->required()
      ->group(group);
  if (adapter)
    app.add_option("--adapter", options.adapters,
                   "PEFT adapter folder; may be repeated, the updates add up")
        ->group(group)
        ->allow_extra_args(false);
  app.add_option("--device", options.device, "cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str()
      ->group(group);
  app.add_option("--dtype", options.dtype, "compute type: fp32, bf16 or fp16")
      ->check(CLI::IsMember({"fp32", "bf16", "fp16"}))
      ->capture_default_str()
      ->group(group);
  app.add_option("--threads", options.threads, "threads; 0 leaves the choice to LibTorch")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str()
      ->group(group);
  app.add_option("--seed", options.seed, "seed of all random draws")
      ->capture_default_str()
      ->group(group);
  app.add_flag("--quiet", options.quiet, "no progress lines")->group(group);
  app.add_flag("--verbose", options.verbose, "say which paths were chosen and why")->group(group);
  app.add_flag("--json", options.json, "machine-readable result on stdout")->group(group);
}

void apply_common(const CommonOptions& options) {
  const at::Device device = compute_device(options);
  if (options.threads > 0) at::set_num_threads(options.threads);
  if (options.verbose)
    std::cerr << "threads: " << at::get_num_threads() << "\nmatrix products: "
              << (device.is_cpu() ? ops::describe_product_library() : "LibTorch's, on cuda")
              << std::endl;
}

at::Device compute_device(const CommonOptions& options) {
  return open_device(options.device);
}

at::ScalarType compute_dtype(const CommonOptions& options) {
  return options.dtype == "bf16" ? at::kBFloat16 : options.dtype == "fp16" ? at::kHalf : at::kFloat;
}

std::optional<AttachedAdapter> attach_adapters(models::DecoderImpl& decoder,
                                               const CommonOptions& options) {
  std::vector<std::string> names;
  std::optional<AttachedAdapter> last;
  for (size_t i = 0; i < options.adapters.size(); ++i) {
    names.push_back(i == 0 ? "default" : "adapter" + std::to_string(i));
    last = attach_from(decoder, options.adapters[i], names.back(), options.seed);
  }
  if (last) last->set_active(names);
  decoder.eval();
  return last;
}

// LibTorch's allocators say "Tried to allocate 2.00 GiB. GPU 0 has ...", "DefaultCPUAllocator:
// can't allocate memory: you tried to allocate 4096 bytes. Error code 12"; an error type of its own
// has the first of them alone.
std::optional<std::string> out_of_memory(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  if (torch_error == nullptr)
    return dynamic_cast<const std::bad_alloc*>(&error) != nullptr
               ? std::optional<std::string>("an allocation outside of tensors")
               : std::nullopt;
  const std::string text = torch_error->what_without_backtrace();
  if (dynamic_cast<const c10::OutOfMemoryError*>(&error) == nullptr &&
      text.find("DefaultCPUAllocator: ") == std::string::npos)
    return std::nullopt;
  const std::string before = "ried to allocate ";
  const size_t begin = text.find(before);
  if (begin == std::string::npos) return first_line(text);
  const size_t size = begin + before.size();
  return text.substr(size, text.find_first_of("Bs", size) + 1 - size);  // "2.00 GiB", "4096 bytes"
}

int run_program(CLI::App& app, int argc, char** argv, const std::function<int()>& body) {
  keep_freed_memory();
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::CallForAllHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    return report("[usage] " + std::string(error.what()) + " (--help lists the flags)", 2);
  }
  try {
    return body();
  } catch (const UsageError& error) {
    return report(error.what(), 2);
  } catch (const Error& error) {
    return report(error.what(), 1);
  } catch (const std::exception& error) {
    if (const auto request = out_of_memory(error))
      return report("[memory] the run must fit the memory; got no room for " + *request, 1);
    if (const auto* torch_error = dynamic_cast<const c10::Error*>(&error))
      return report("[libtorch] " + std::string(torch_error->what_without_backtrace()), 1);
    return report("[program] " + std::string(error.what()), 1);
  }
}

std::string read_file(const std::string& path, const char* area) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  GRAFT_CHECK(std::filesystem::exists(status), area, "the file must exist; got '", path, "'");
  GRAFT_CHECK(!std::filesystem::is_directory(status), area, "a file is wanted; got the folder '",
              path, "'");
  std::ifstream stream(path, std::ios::binary);
  std::stringstream bytes;
  bytes << stream.rdbuf();
  GRAFT_CHECK(stream.is_open() && !stream.bad(), area, "the file must be readable; got '", path,
              "'");
  return std::move(bytes).str();
}

double peak_rss_mib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) return std::stod(line.substr(6)) / 1024.0;
  return 0.0;
}

}  // namespace graft::trainer
