/// Tensors in the files that `torch.save` writes of a flat dict: PEFT's and MoE-PEFT's
/// adapter_model.bin. Nothing of such a file is run: what is not a dict of tensors is refused.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace graft::io {

/// All tensors of the file, on the CPU, by name. Throws one line for a file that is truncated, of
/// another kind, or holds anything but tensors under text keys.
std::map<std::string, at::Tensor> read_pickled_tensors(const std::filesystem::path& path);

/// Writes a file that `torch.load(path, weights_only=True)` opens as a dict, atomically.
void write_pickled_tensors(const std::filesystem::path& path,
                           const std::vector<std::pair<std::string, at::Tensor>>& tensors);

}  // namespace graft::io
