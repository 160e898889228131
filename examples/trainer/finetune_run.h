/// A whole fine-tuning run: data, adapter, loop, files.
#pragma once

#include <memory>

#include "examples/trainer/data.h"
#include "examples/trainer/finetune_options.h"
#include "examples/trainer/progress.h"

namespace graft::trainer {

/// Runs `finetune`; returns the exit code (0, or 130 / 143 after SIGINT / SIGTERM).
int run_finetune(const FinetuneOptions& options);

}  // namespace graft::trainer
