#include "examples/trainer/training_job.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/io/atomic_file.h>
#include <graft/moe/token_scope.h>
#include <graft/train/clip_grad.h>
#include <graft/train/parameter_groups.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "examples/trainer/checkpoint.h"
#include "examples/trainer/generation.h"
#include "examples/trainer/initialisation.h"

namespace graft::trainer {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using nlohmann::ordered_json;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Those of the model alone; a tied output layer counts once.
int64_t parameters_of(const models::DecoderImpl& decoder) {
  int64_t total = 0;
  for (const auto& item : decoder.named_parameters())
    if (item.key().find(".adapters.") == std::string::npos) total += item.value().numel();
  return decoder.config.tied ? total - decoder.lm_head->weight.numel() : total;
}

}  // namespace

TrainingJob::TrainingJob(FinetuneOptions options, std::string name, bool shared)
    : o_(std::move(options)), name_(std::move(name)), shared_(shared) {
  o_.validate();
  plan_ = make_plan(o_);
  plan_.attach.name = name_;
  GRAFT_CHECK(!o_.cuda_graph || (plan_.recipe->passes_are_alike() && shares_passes()), "finetune",
              "cuda-graph repeats passes that are all alike, of adapters on plain layers alone (no "
              "bias, no modules_to_save, no experts, no ranks that move); got the method ",
              o_.method);
  if (compute_dtype(o_.common) != at::kHalf) return;
  scaler_.emplace();
  const init::Kind start = plan_.recipe->start_plan().kind;
  GRAFT_CHECK(start.needs != init::Needs::gradient || !o_.resume.empty(), "finetune", "the start ",
              start.name, " reads gradients that no loss scale keeps in fp16's range",
              " (--dtype bf16 and fp32 need none); got --dtype fp16");
  // Its choices of ranks stand on every step's gradients, and come at fixed steps.
  GRAFT_CHECK(o_.method != "adalora", "finetune",
              "adalora needs every step, and fp16 skips some (--dtype bf16 and fp32 do not); got "
              "--dtype fp16");
}

int64_t TrainingJob::steps_of_run() const {
  if (o_.steps) return *o_.steps;
  const double chunks_a_step = static_cast<double>(o_.batch_size * o_.grad_accum);
  return std::max<int64_t>(
      1, static_cast<int64_t>(
             std::ceil(o_.epochs * static_cast<double>(training_->size()) / chunks_a_step)));
}

void TrainingJob::read_data(const text::Tokenizer& tokenizer) {
  training_ = TokenData::from_file(o_.data, tokenizer, o_.seq_len, o_.packing);
  if (!o_.eval_data.empty()) {
    held_out_ = TokenData::from_file(o_.eval_data, tokenizer, o_.seq_len, o_.packing);
  } else if (o_.eval_fraction > 0) {
    const int64_t count = std::max<int64_t>(
        1, std::llround(o_.eval_fraction * static_cast<double>(training_->size())));
    GRAFT_CHECK(count < training_->size(), "data",
                "the text must leave a chunk to train on beside the held-out ones; got ",
                training_->size(), " chunks, ", count, " held out");
    std::tie(training_, held_out_) = training_->split_last(count);
  }
  schedule_ = {train::parse_schedule_kind(o_.schedule), o_.warmup_steps, steps_of_run()};
  schedule_.validate();
  order_ = std::make_unique<RowOrder>(training_->size(), o_.batch_size, o_.shuffle, o_.common.seed);
}

void TrainingJob::attach(models::LoadedModel& model, double load_seconds) {
  model_ = &model;
  load_seconds_ = load_seconds;
  models::DecoderImpl& decoder = *model.decoder;
  GRAFT_CHECK(o_.seq_len <= decoder.config.max_positions, "data",
              "seq-len must not exceed the model's context; got ", o_.seq_len, " for ",
              decoder.config.max_positions);
  base_parameters_ = parameters_of(decoder);
  const auto start = Clock::now();
  AttachOptions options = plan_.attach;
  options.init_data = init_data(decoder, *training_, *order_, o_.init_batches, o_.common.quiet);
  if (!o_.resume.empty()) options = resumed(options, *plan_.recipe, o_.resume);
  adapter_ = graft::attach(decoder, plan_.recipe, options);
  if (!o_.init_adapter.empty())
    adapter_->load(o_.init_adapter, /*same_options=*/false);  // flags win
  init_seconds_ = seconds_since(start);
  init_peak_mib_ = peak_rss_mib();
}

void TrainingJob::start() {
  std::error_code error;
  fs::create_directories(o_.output, error);
  GRAFT_CHECK(!error, "output", "the output folder must be writable; got '", o_.output,
              "': ", error.message());
  io::write_text_file(fs::path(o_.output) / "run.json",
                      "{}\n");  // a folder that refuses files should say so now
  take_model();                 // the optimiser takes the parameters of an active adapter
  optimizer_ = std::make_unique<train::AdamW>(train::parameter_groups(*adapter_, o_.weight_decay));
  if (!o_.resume.empty())
    first_step_ = load_checkpoint(o_.resume, *adapter_, *optimizer_, scaler_, settings());
  GRAFT_CHECK(first_step_ < schedule_.total_steps, "checkpoint",
              "a resumed run must have steps left; got ", first_step_, " of ",
              schedule_.total_steps, " done");
  finished_ = first_step_;
  loss_before_ = evaluate();
  sample_before_ = sample();
  metrics_ = std::make_unique<MetricsFile>(fs::path(o_.output) / "metrics.jsonl", first_step_);
}

bool TrainingJob::shares_passes() const {
  return plan_.attach.bias == TrainedBias::none && plan_.attach.modules_to_save.empty() &&
         !plan_.recipe->adapts_blocks() && plan_.recipe->method() != "xlora";
}

void TrainingJob::take_model() {
  if (shared_) adapter_->set_active();
}

std::optional<double> TrainingJob::evaluate() {
  if (!held_out_) return std::nullopt;
  take_model();
  const at::NoGradGuard no_grad;
  model_->decoder->eval();
  double sum = 0;
  int64_t counted = 0;
  for (int64_t first = 0; first < held_out_->size(); first += o_.batch_size) {
    std::vector<int64_t> chunks;
    for (int64_t i = first; i < std::min(first + o_.batch_size, held_out_->size()); ++i)
      chunks.push_back(i);
    const Batch batch = held_out_->batch(chunks);
    if (batch.counted == 0) continue;
    const moe::TokenScope padding({.valid = batch.valid});
    sum += model_->decoder->loss(batch.inputs, batch.targets, 1.0, batch.segments, batch.valid)
               .item<double>();
    counted += batch.counted;
  }
  model_->decoder->train();
  GRAFT_CHECK(counted > 0, "data", "the held-out rows must hold a token that counts; got none");
  const double loss = sum / static_cast<double>(counted);
  if (finished_ > first_step_ && !done()) held_out_losses_.emplace_back(finished_, loss);
  return loss;
}

std::string TrainingJob::sample() {
  if (o_.sample.empty()) return "";
  take_model();
  return generate(*model_, o_.sample, {.max_new_tokens = 60});
}

const std::vector<Batch>& TrainingJob::begin_step() {
  step_ = {};
  step_.start = Clock::now();
  if (finished_ == first_step_) training_since_ = step_.start;
  for (int64_t micro = 0; micro < o_.grad_accum; ++micro) {
    const Batch& batch = step_.batches.emplace_back(
        training_->batch(order_->batch(finished_ * o_.grad_accum + micro)));
    step_.counted += batch.counted;
    step_.passes += batch.counted > 0;
    step_.tokens += batch.inputs.size(0) * (batch.inputs.size(1) + 1);
  }
  GRAFT_CHECK(step_.counted > 0, "data", "a step must hold a token that counts; got none in step ",
              finished_);
  step_.info = {finished_, schedule_.total_steps, o_.lr * schedule_.factor(finished_),
                o_.common.seed};
  adapter_->begin_step(step_.info);
  return step_.batches;
}

at::Tensor TrainingJob::minimised(const at::Tensor& loss) {
  add_loss(loss);
  const at::Tensor penalty = adapter_->penalty();
  if (!penalty.defined()) return loss;
  const at::Tensor share = penalty / static_cast<double>(step_.passes);
  step_.penalty = step_.penalty.value_or(0) + share.item<double>();
  return loss + share * loss_scale();
}

// In place, so that a method's hooks see the gradients of the update.
void TrainingJob::multiply_gradients(double factor) {
  if (factor == 1.0) return;
  for (at::Tensor& parameter : optimizer_->parameters())
    if (parameter.grad().defined()) parameter.mutable_grad().mul_(factor);
}

void TrainingJob::update(double grad_norm) {
  if (o_.max_grad_norm > 0) multiply_gradients(train::clip_scale(grad_norm, o_.max_grad_norm));
  adapter_->before_update(step_.info);
  optimizer_->step(step_.info.lr);
  adapter_->end_step(step_.info);
}

StepMetrics TrainingJob::end_step() {
  if (!adapter_->is_active()) take_model();
  // The loss of a step is what is minimised, as in PEFT: with the method's own term.
  StepMetrics metrics{finished_, step_.loss, step_.info.lr, 0, step_.tokens};
  if (step_.penalty) {
    metrics.figures.emplace_back("penalty", *step_.penalty);
    metrics.loss += *step_.penalty;
  }
  multiply_gradients(1.0 / loss_scale());
  metrics.grad_norm = train::grad_norm(optimizer_->parameters());
  const bool finite_loss = std::isfinite(metrics.loss);
  const bool finite = finite_loss && std::isfinite(metrics.grad_norm);
  if (!finite && !(scaler_ && scaler_->can_fall()))
    keep_last_good(finite_loss ? "gradient norm" : "loss");
  if (finite) update(metrics.grad_norm);
  optimizer_->zero_grad();
  if (scaler_) {
    metrics.figures.emplace_back("loss_scale", scaler_->scale());
    scaler_->update(finite);
    metrics.figures.emplace_back("skipped_steps", static_cast<double>(scaler_->skipped()));
  }
  for (auto& figure : adapter_->figures()) metrics.figures.push_back(std::move(figure));
  metrics.seconds = seconds_since(step_.start);
  if (finished_ == first_step_) first_step_seconds_ = metrics.seconds;
  tokens_ += metrics.tokens;
  ++finished_;
  metrics_->write(metrics);
  train_seconds_ = seconds_since(training_since_);
  return metrics;
}

// The parameters are still those of the last finished step: they are saved before the run ends.
void TrainingJob::keep_last_good(const std::string& problem) {
  optimizer_->zero_grad();
  adapter_->save(o_.output, o_.common.model);
  const std::string scale = scaler_ ? concat(" at the least loss scale, ", scaler_->scale(),
                                             ", after ", scaler_->skipped(), " skipped steps")
                                    : "";
  fail("finetune",
       concat("the ", problem, " must be finite; got NaN or infinity in step ", finished_, scale,
              " (the adapter of the step before is in '", o_.output, "')"));
}

void TrainingJob::save_checkpoint() const {
  trainer::save_checkpoint(fs::path(o_.output) / ("checkpoint-" + std::to_string(finished_)),
                           *adapter_, *optimizer_, scaler_, finished_, settings(), o_.common.model);
}

// What must not change when a run is resumed.
std::string TrainingJob::settings() const {
  ordered_json settings = ordered_json::parse(options_json(o_));
  for (const char* free : {"threads", "eval_fraction", "init_adapter", "adapter_config", "set"})
    settings.erase(free);
  settings["steps"] = schedule_.total_steps;
  settings["method"] = o_.method;
  if (const std::string& key = adapters::find_method(o_.method).keys.balance_loss; !key.empty()) {
    nlohmann::json fields;
    plan_.recipe->write_config(fields);
    settings["balance_loss"] = fields.value(key, nlohmann::json());
  }
  settings["model"] = o_.common.model;
  return settings.dump();
}

ordered_json TrainingJob::finish(bool whole) {
  adapter_->save(o_.output, o_.common.model);
  if (whole) {
    loss_after_ = evaluate();
    sample_after_ = sample();
  }
  const ordered_json run = results();
  io::write_text_file(fs::path(o_.output) / "run.json", run.dump(2) + "\n");
  return run;
}

}  // namespace graft::trainer
