/// One adapter's training: its data, its optimiser and schedule, its files.
#pragma once

#include <graft/attach/attach.h>
#include <graft/train/adamw.h>
#include <graft/train/grad_scaler.h>
#include <graft/train/schedule.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "examples/trainer/data.h"
#include "examples/trainer/finetune_options.h"
#include "examples/trainer/memory.h"
#include "examples/trainer/metrics.h"

namespace graft::trainer {

/// The order of calls: `read_data`, `attach`, `start`; then for each step `begin_step`, a forward
/// and backward pass for each of its batches, backward from what `minimised` says, `end_step`; then
/// `finish`. Who passes the batches through the model may pass several jobs' at once.
class TrainingJob {
 public:
  /// Checks the options, the method's included. `name`: the adapter's in the model. `shared`: other
  /// jobs have adapters in the model too.
  explicit TrainingJob(FinetuneOptions options, std::string name = "default", bool shared = false);

  /// Before the model is loaded, since a wrong path is the likelier mistake.
  void read_data(const text::Tokenizer& tokenizer);
  /// The model must outlive the job. `load_seconds`: what loading it took.
  void attach(models::LoadedModel& model, double load_seconds);
  /// The output folder, the optimiser, a checkpoint's state; held-out loss and sample before.
  void start();

  /// What the job needs in memory when it has the model for itself, predicted.
  MemoryUse memory(const models::DecoderConfig& config) const;
  /// What would be trained, for people and for programs.
  std::string plan() const;
  nlohmann::ordered_json plan_json() const;

  /// Where the model is shared, makes this adapter the only one at work.
  void take_model();
  /// The micro-batches of the next step. Valid until `end_step`.
  const std::vector<Batch>& begin_step();
  /// What the losses of the step's batches are divided by: its counted targets; with a loss scale,
  /// which so reaches the gradients before they are rounded, its part of them.
  double normalizer() const { return static_cast<double>(step_.counted) / loss_scale(); }
  /// S, or 1 where the loss is not scaled.
  double loss_scale() const { return scaler_ ? scaler_->scale() : 1.0; }
  /// Counts the loss of a batch, divided by `normalizer`, that was passed backward already.
  void add_loss(const at::Tensor& loss) { step_.loss += loss.item<double>() / loss_scale(); }
  /// What to pass backward for a batch of that loss: with the method's own term, of which each
  /// batch takes an equal share, since it may speak of the batch. Call it after the batch's forward
  /// pass and before any other, once a batch.
  at::Tensor minimised(const at::Tensor& loss);
  /// Updates the adapter and writes the metrics. Where loss or gradient are not finite, a run with
  /// a loss scale that can still fall goes on without the update; any other throws, with the
  /// adapter of the step before saved.
  StepMetrics end_step();
  /// The state of the run so far as a folder to resume from.
  void save_checkpoint() const;
  /// Loss on the held-out rows; nothing where none are held out.
  std::optional<double> evaluate();
  /// Saves the adapter and run.json. `whole`: the run was not broken off, so that the held-out loss
  /// and the sample after it are due. Returns what run.json holds.
  nlohmann::ordered_json finish(bool whole);

  const FinetuneOptions& options() const { return o_; }
  const std::string& name() const { return name_; }
  AttachedAdapter& adapter() { return *adapter_; }
  /// Whether its batches can go through the model beside those of other jobs: not where the adapter
  /// trains what the model has once, mixes whole blocks (MixLoRA) or takes two passes (X-LoRA).
  bool shares_passes() const;
  int64_t first_step() const { return first_step_; }
  int64_t finished_steps() const { return finished_; }
  int64_t total_steps() const { return schedule_.total_steps; }
  bool done() const { return finished_ == schedule_.total_steps; }
  std::optional<double> loss_before() const { return loss_before_; }
  /// Whether the step just ended is one after which --eval-every or --save-every asks for
  /// something.
  bool due(int64_t every) const { return every > 0 && finished_ % every == 0 && !done(); }

 private:
  using Clock = std::chrono::steady_clock;

  // The step that has begun.
  struct Step {
    Clock::time_point start;
    std::vector<Batch> batches;
    adapters::StepInfo info;
    int64_t counted = 0, tokens = 0, passes = 0;
    double loss = 0;
    std::optional<double> penalty;
  };

  std::string sample();
  int64_t steps_of_run() const;
  int64_t total_parameters() const;
  std::string settings() const;
  [[noreturn]] void keep_last_good(const std::string& problem);
  void multiply_gradients(double factor);
  void update(double grad_norm);
  nlohmann::ordered_json results() const;

  const FinetuneOptions o_;
  const std::string name_;
  const bool shared_;
  AdapterPlan plan_;
  models::LoadedModel* model_ = nullptr;
  std::optional<TokenData> training_, held_out_;
  std::optional<AttachedAdapter> adapter_;
  std::unique_ptr<train::AdamW> optimizer_;
  std::optional<train::GradScaler> scaler_;  // with --dtype fp16
  std::unique_ptr<RowOrder> order_;
  std::unique_ptr<MetricsFile> metrics_;
  train::Schedule schedule_;
  Step step_;
  Clock::time_point training_since_;
  int64_t base_parameters_ = 0, first_step_ = 0, finished_ = 0, tokens_ = 0;
  double load_seconds_ = 0, init_seconds_ = 0, init_peak_mib_ = 0, train_seconds_ = 0,
         first_step_seconds_ = 0;
  std::optional<double> loss_before_, loss_after_;
  std::vector<std::pair<int64_t, double>> held_out_losses_;  // finished steps, loss: --eval-every
  std::string sample_before_, sample_after_;
};

}  // namespace graft::trainer
