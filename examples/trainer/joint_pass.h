/// Forward and backward passes over the batches of several jobs.
#pragma once

#include <vector>

#include "examples/models/decoder.h"
#include "examples/trainer/training_job.h"

namespace graft::trainer {

/// A job and the micro-batches of the step that it has begun.
struct JobBatches {
  TrainingJob* job;
  const std::vector<Batch>* batches;
};

/// Passes every batch through the model, forward and backward, and tells the jobs their losses. A
/// pass takes up to `jobs_per_pass` jobs side by side (0: any number), as parts of one batch; only
/// batches of one length share one, since padding would be a change, and only jobs that can
/// (TrainingJob::shares_passes). Whoever shares, each job's losses and gradients are those of a run
/// of its own, bit for bit.
void run_passes(models::DecoderImpl& model, const std::vector<JobBatches>& jobs,
                int64_t jobs_per_pass);

}  // namespace graft::trainer
