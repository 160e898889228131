/// A job's passes on a CUDA device through a graph: --cuda-graph.
#pragma once

#include <graft/train/pass_graph.h>

#include <memory>

#include "examples/models/decoder.h"
#include "examples/trainer/training_job.h"

namespace graft::trainer {

/// Forward and backward passes over the batches of one job that has the model for itself. Batches
/// lie in memory of one size, [batch_size, seq_len]; shorter rows are filled up behind their end,
/// which attention does not look at.
class GraphedPasses {
 public:
  /// The job's options have cuda_graph. Both must outlive the passes.
  GraphedPasses(models::DecoderImpl& model, TrainingJob& job, const at::Device& device);

  /// Adds the batch's gradients and tells the job its loss.
  void run(const Batch& batch);

 private:
  void fill(const Batch& batch);

  models::DecoderImpl& model_;
  TrainingJob& job_;
  at::Device device_;
  at::Tensor inputs_, targets_, segments_;
  at::Tensor share_;       // what the captured normalizer is of the batch's own
  double normalizer_ = 0;  // of the passes of `graph_`
  double loss_scale_ = 1;  // which is part of it
  std::unique_ptr<train::PassGraph> graph_;
};

}  // namespace graft::trainer
