/// The file of `finetune --jobs`.
#pragma once

#include <vector>

#include "examples/trainer/finetune_options.h"

namespace graft::trainer {

/// The options of each job. The file is a JSON array of objects (.json) or one object a line
/// (.jsonl); an object's keys are finetune's flags, with - or _: {"output": "out/a", "rank": 4,
/// "lr": 1e-3}. What it does not say is as in `shared`, the command line. Throws for what is no
/// such file, for a flag that holds for the whole run, and where two jobs have one output; messages
/// name the entry, counted from 1.
std::vector<FinetuneOptions> read_jobs(const FinetuneOptions& shared);

}  // namespace graft::trainer
