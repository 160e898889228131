/// The state of an unfinished run on disk.
#pragma once

#include <graft/attach/attach.h>
#include <graft/train/adamw.h>
#include <graft/train/grad_scaler.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace graft::trainer {

/// Writes a folder with the adapter, the optimizer's state, the loss scale where there is one, the
/// masks' counters and `step`, the number of finished steps. The folder appears whole or not at
/// all: it is written beside its place and renamed. `settings` is a JSON object that a resumed run
/// must repeat exactly.
void save_checkpoint(const std::filesystem::path& folder, const AttachedAdapter& adapter,
                     const train::AdamW& optimizer, const std::optional<train::GradScaler>& scaler,
                     int64_t step, const std::string& settings, const std::string& base_model);

/// Puts a checkpoint's state back and returns the number of finished steps. Throws when the
/// settings differ, naming them.
int64_t load_checkpoint(const std::filesystem::path& folder, AttachedAdapter& adapter,
                        train::AdamW& optimizer, std::optional<train::GradScaler>& scaler,
                        const std::string& settings);

}  // namespace graft::trainer
