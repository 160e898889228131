#include "examples/trainer/graphed_passes.h"

#include <ATen/ATen.h>

namespace graft::trainer {

GraphedPasses::GraphedPasses(models::DecoderImpl& model, TrainingJob& job, const at::Device& device)
    : model_(model), job_(job), device_(device) {}

// Into the memory that the graph reads.
void GraphedPasses::fill(const Batch& batch) {
  const int64_t length = batch.inputs.size(1);
  const bool first = !inputs_.defined();
  const auto of = [&](at::Tensor& kept, const at::Tensor& values, int64_t rest) {
    if (first)
      kept = at::empty({job_.options().batch_size, job_.options().seq_len - 1},
                       at::TensorOptions(device_).dtype(at::kLong));
    if (length < kept.size(1)) kept.fill_(rest);
    kept.narrow(1, 0, length).copy_(values);
  };
  of(inputs_, batch.inputs, 0);
  of(targets_, batch.targets, -100);
  // A batch whose rows are one piece each says nothing of segments; the graph looks at them always.
  if (job_.options().may_pack())
    of(segments_, batch.segments.defined() ? batch.segments : at::zeros_like(batch.inputs), -1);
  if (first) share_ = at::empty({}, at::TensorOptions(device_).dtype(at::kFloat));
}

void GraphedPasses::run(const Batch& batch) {
  fill(batch);
  // fp16's gradients are rounded inside the pass, so they must be captured with the present scale.
  if (!graph_ || loss_scale_ != job_.loss_scale()) {
    normalizer_ = job_.normalizer();
    loss_scale_ = job_.loss_scale();
    graph_.reset();  // its memory serves the next one
    graph_ = std::make_unique<train::PassGraph>(job_.adapter(), device_, [this] {
      const at::Tensor loss = model_.loss(inputs_, targets_, normalizer_, segments_) * share_;
      loss.backward();
      return loss.detach();
    });
  }
  share_.fill_(normalizer_ / job_.normalizer());
  const bool waiting = model_.loss_without_waiting;
  model_.loss_without_waiting = true;
  const at::Tensor loss = graph_->run();
  model_.loss_without_waiting = waiting;
  job_.add_loss(loss);
}

}  // namespace graft::trainer
