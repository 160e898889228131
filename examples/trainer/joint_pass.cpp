#include "examples/trainer/joint_pass.h"

#include <ATen/ATen.h>
#include <graft/moe/token_scope.h>

#include <algorithm>

namespace graft::trainer {
namespace {

// A job's part of a pass.
struct Share {
  TrainingJob* job;
  const Batch* batch;
};

// Rows with several pieces have masks of their own and go with their like; padding goes alone.
bool fit_together(const Share& one, const Share& other) {
  const Batch &a = *one.batch, &b = *other.batch;
  return one.job->shares_passes() && other.job->shares_passes() &&
         a.inputs.size(1) == b.inputs.size(1) && a.segments.defined() == b.segments.defined() &&
         !a.valid.defined() && !b.valid.defined();
}

void run_alone(models::DecoderImpl& model, const Share& share) {
  share.job->take_model();
  const Batch& batch = *share.batch;
  const moe::TokenScope padding({.valid = batch.valid});
  const at::Tensor loss =
      model.loss(batch.inputs, batch.targets, share.job->normalizer(), batch.segments, batch.valid);
  share.job->minimised(loss).backward();
}

void run_together(models::DecoderImpl& model, const std::vector<Share>& shares) {
  nn::BatchParts parts;
  std::vector<std::string> names;
  std::vector<double> normalizers;
  std::vector<at::Tensor> inputs, targets, segments;
  for (const auto& [job, batch] : shares) {
    parts.push_back({job->name(), batch->inputs.size(0)});
    names.push_back(job->name());
    normalizers.push_back(job->normalizer());
    inputs.push_back(batch->inputs);
    targets.push_back(batch->targets);
    if (batch->segments.defined()) segments.push_back(batch->segments);
  }
  AttachedAdapter& first = shares.front().job->adapter();
  first.set_active(names);
  const auto rows = first.batch_rows(parts);
  const auto losses = model.losses(at::cat(inputs), at::cat(targets), normalizers,
                                   segments.empty() ? at::Tensor() : at::cat(segments));
  at::Tensor sum;
  for (size_t i = 0; i < shares.size(); ++i) {
    const at::Tensor loss = shares[i].job->minimised(losses[i]);
    sum = sum.defined() ? sum + loss : loss;
  }
  sum.backward();  // the adapters are disjoint: each gets the gradient of its own loss
}

}  // namespace

bool PassLimit::has_room(int64_t jobs_inside, int64_t tokens_inside, int64_t more) const {
  return jobs_inside == 0 ||
         ((jobs == 0 || jobs_inside < jobs) && (tokens == 0 || tokens_inside + more <= tokens));
}

PassLimit pass_limit(int64_t jobs_per_pass, bool on_cpu) {
  constexpr int64_t kTokens = 256;
  return {jobs_per_pass, jobs_per_pass == 0 && on_cpu ? kTokens : 0};
}

void run_passes(models::DecoderImpl& model, const std::vector<JobBatches>& jobs,
                const PassLimit& limit) {
  size_t most = 0;
  for (const auto& job : jobs) most = std::max(most, job.batches->size());
  for (size_t micro = 0; micro < most; ++micro) {
    std::vector<Share> open;
    for (const auto& [job, batches] : jobs)
      if (micro < batches->size() && (*batches)[micro].counted > 0)
        open.push_back({job, &(*batches)[micro]});
    while (!open.empty()) {
      std::vector<Share> pass, rest;
      int64_t tokens = 0;
      for (const Share& share : open) {
        const int64_t more = share.batch->inputs.numel();
        const bool room = limit.has_room(static_cast<int64_t>(pass.size()), tokens, more);
        const bool fits = pass.empty() || fit_together(pass.front(), share);
        (room && fits ? pass : rest).push_back(share);
        if (room && fits) tokens += more;
      }
      if (pass.size() == 1)
        run_alone(model, pass.front());
      else
        run_together(model, pass);
      open = std::move(rest);
    }
  }
}

}  // namespace graft::trainer
