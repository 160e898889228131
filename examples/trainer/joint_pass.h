/// Forward and backward passes over the batches of several jobs.
#pragma once

#include <cstdint>
#include <vector>

#include "examples/models/decoder.h"
#include "examples/trainer/training_job.h"

namespace graft::trainer {

/// A job and the micro-batches of the step that it has begun.
struct JobBatches {
  TrainingJob* job;
  const std::vector<Batch>* batches;
};

/// How much may share a pass.
struct PassLimit {
  int64_t jobs = 0;    ///< at most so many; 0: any number
  int64_t tokens = 0;  ///< of all jobs of the pass, if they are several; 0: any number

  /// Whether a pass that holds so many jobs and tokens takes one with `more` tokens.
  bool has_room(int64_t jobs_inside, int64_t tokens_inside, int64_t more) const;
};

/// `jobs_per_pass` > 0: so many. 0: on a device all; on the CPU up to 256 tokens, since more rows
/// make its products no faster, while a pass keeps the activations of all its rows
/// (docs/many_adapters.md has figures).
PassLimit pass_limit(int64_t jobs_per_pass, bool on_cpu);

/// Passes every batch through the model, forward and backward, and tells the jobs their losses. A
/// pass takes jobs side by side up to the limit, as parts of one batch; only batches of one length
/// share one, since padding would be a change, and only jobs that can (TrainingJob::shares_passes).
/// Whoever shares, each job's losses and gradients are those of a run of its own, bit for bit.
void run_passes(models::DecoderImpl& model, const std::vector<JobBatches>& jobs,
                const PassLimit& limit);

}  // namespace graft::trainer
