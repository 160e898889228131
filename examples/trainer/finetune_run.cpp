#include "examples/trainer/finetune_run.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <graft/core/error.h>
#include <graft/io/atomic_file.h>
#include <graft/ops/frozen_product.h>
#include <graft/train/adamw.h>
#include <graft/train/clip_grad.h>
#include <graft/train/parameter_groups.h>
#include <graft/train/schedule.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <iostream>
#include <nlohmann/json.hpp>

#include "examples/trainer/checkpoint.h"
#include "examples/trainer/generation.h"
#include "examples/trainer/initialisation.h"
#include "examples/trainer/metrics.h"

namespace graft::trainer {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using nlohmann::ordered_json;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

volatile std::sig_atomic_t stop_signal = 0;

// The first signal asks the loop to end after its step, the second one ends the process at once.
void on_signal(int signal) {
  if (stop_signal != 0) _exit(128 + signal);
  stop_signal = signal;
}

// Everything a run holds on to.
class Run {
 public:
  explicit Run(const FinetuneOptions& options) : o_(options), started_(Clock::now()) {}

  int execute();

 private:
  void prepare();
  void attach_adapter();
  void print_plan() const;
  int64_t steps_of_run() const;
  std::optional<double> evaluate();
  std::string sample();
  StepMetrics step(int64_t index);
  void train();
  void keep_last_good(int64_t index, const std::string& problem);
  void write_results();
  std::string settings() const;
  fs::path checkpoint_folder(int64_t finished) const {
    return fs::path(o_.output) / ("checkpoint-" + std::to_string(finished));
  }

  const FinetuneOptions& o_;
  Clock::time_point started_;
  models::LoadedModel model_{nullptr, text::Tokenizer(nullptr)};
  std::optional<TokenData> training_, held_out_;
  std::optional<AdapterPlan> plan_;
  std::optional<AttachedAdapter> adapter_;
  std::unique_ptr<train::AdamW> optimizer_;
  std::unique_ptr<RowOrder> order_;
  std::unique_ptr<Progress> progress_;
  train::Schedule schedule_;
  int64_t first_step_ = 0, finished_ = 0, tokens_ = 0;
  double load_seconds_ = 0, init_seconds_ = 0, init_peak_mib_ = 0, train_seconds_ = 0,
         first_step_seconds_ = 0;
  std::optional<double> loss_before_, loss_after_;
  std::vector<std::pair<int64_t, double>> held_out_losses_;  // finished steps, loss: --eval-every
  std::string sample_before_, sample_after_;
};

int64_t Run::steps_of_run() const {
  if (o_.steps) return *o_.steps;
  const double chunks_a_step = static_cast<double>(o_.batch_size * o_.grad_accum);
  return std::max<int64_t>(
      1, static_cast<int64_t>(
             std::ceil(o_.epochs * static_cast<double>(training_->size()) / chunks_a_step)));
}

void Run::prepare() {
  o_.validate();
  apply_common(o_.common);
  plan_ = make_plan(o_);  // before the model: a mistake in the options should not cost a load
  // One tokenizer serves data and model; the data are read first, since a wrong path is the
  // likelier mistake.
  const text::Tokenizer tokenizer = models::load_tokenizer(o_.common.model);
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
  model_ = models::load(o_.common.model, compute_dtype(o_.common));
  GRAFT_CHECK(o_.seq_len <= model_.decoder->config.max_positions, "data",
              "seq-len must not exceed the model's context; got ", o_.seq_len, " for ",
              model_.decoder->config.max_positions);
  model_.decoder->gradient_checkpointing = o_.gradient_checkpointing;
  schedule_ = {train::parse_schedule_kind(o_.schedule), o_.warmup_steps, steps_of_run()};
  schedule_.validate();
  order_ = std::make_unique<RowOrder>(training_->size(), o_.batch_size, o_.shuffle, o_.common.seed);
  load_seconds_ = seconds_since(started_);
  attach_adapter();
}

void Run::attach_adapter() {
  const auto start = Clock::now();
  AttachOptions options = plan_->attach;
  options.init_data =
      init_data(*model_.decoder, *training_, *order_, o_.init_batches, o_.common.quiet);
  if (!o_.resume.empty()) options = resumed(options, *plan_->recipe, o_.resume);
  adapter_ = attach(*model_.decoder, plan_->recipe, options);
  if (!o_.init_adapter.empty())
    adapter_->load(o_.init_adapter, /*same_options=*/false);  // flags win
  init_seconds_ = seconds_since(start);
  init_peak_mib_ = peak_rss_mib();
}

void Run::print_plan() const {
  int64_t total = 0;
  for (const auto& parameter : model_.decoder->parameters()) total += parameter.numel();
  if (model_.decoder->config.tied) total -= model_.decoder->lm_head->weight.numel();
  const int64_t trainable = adapter_->parameter_count();
  std::map<std::string, std::pair<int64_t, int64_t>> kinds;  // last name -> layers, parameters
  for (const auto& layer : adapter_->layers()) {
    auto& [count, numbers] = kinds[layer.name.substr(layer.name.rfind('.') + 1)];
    ++count;
    for (const auto& parameter : layer.adapter->parameters()) numbers += parameter.numel();
  }
  std::string text =
      fmt::format("method      {} ({})\n", plan_->recipe->method(), plan_->recipe->describe());
  for (const auto& [name, kind] : kinds)
    text += fmt::format("  {:<12} {:>4} layers {:>12} parameters\n", name, kind.first, kind.second);
  text += fmt::format("trainable   {} of {} parameters ({:.3f} %), {} bytes\n", trainable, total,
                      100.0 * static_cast<double>(trainable) / static_cast<double>(total),
                      trainable * 4);
  text += fmt::format("data        {} rows of up to {} tokens to train on, {} held out\n",
                      training_->size(), o_.seq_len, held_out_ ? held_out_->size() : 0);
  if (training_->cut() > 0)
    text +=
        fmt::format("            {} examples are longer and lose their end\n", training_->cut());
  text += fmt::format("steps       {} of {} x {} rows\n", schedule_.total_steps, o_.grad_accum,
                      o_.batch_size);
  (o_.dry_run && !o_.common.json ? std::cout : std::cerr) << text << std::flush;
  if (o_.dry_run && o_.common.json)
    std::cout << ordered_json{{"trainable_parameters", trainable},
                              {"total_parameters", total},
                              {"layers", adapter_->layers().size()},
                              {"steps", schedule_.total_steps},
                              {"bytes", trainable * 4}}
                     .dump()
              << std::endl;
}

std::optional<double> Run::evaluate() {
  if (!held_out_) return std::nullopt;
  const at::NoGradGuard no_grad;
  model_.decoder->eval();
  double sum = 0;
  int64_t counted = 0;
  for (int64_t first = 0; first < held_out_->size(); first += o_.batch_size) {
    std::vector<int64_t> chunks;
    for (int64_t i = first; i < std::min(first + o_.batch_size, held_out_->size()); ++i)
      chunks.push_back(i);
    const Batch batch = held_out_->batch(chunks);
    if (batch.counted == 0) continue;
    sum += model_.decoder->loss(batch.inputs, batch.targets, 1.0, batch.segments).item<double>();
    counted += batch.counted;
  }
  model_.decoder->train();
  GRAFT_CHECK(counted > 0, "data", "the held-out rows must hold a token that counts; got none");
  return sum / static_cast<double>(counted);
}

std::string Run::sample() {
  return o_.sample.empty() ? "" : generate(model_, o_.sample, {.max_new_tokens = 60});
}

StepMetrics Run::step(int64_t index) {
  const auto start = Clock::now();
  const double lr = o_.lr * schedule_.factor(index);
  std::vector<Batch> batches;
  int64_t counted = 0, tokens = 0;
  for (int64_t micro = 0; micro < o_.grad_accum; ++micro) {
    batches.push_back(training_->batch(order_->batch(index * o_.grad_accum + micro)));
    counted += batches.back().counted;
    tokens += batches.back().inputs.size(0) * (batches.back().inputs.size(1) + 1);
  }
  GRAFT_CHECK(counted > 0, "data", "a step must hold a token that counts; got none in step ",
              index);
  const adapters::StepInfo info{index, schedule_.total_steps, lr, o_.common.seed};
  adapter_->begin_step(info);
  double loss = 0;
  for (const Batch& batch : batches) {
    if (batch.counted == 0) continue;
    const at::Tensor part = model_.decoder->loss(batch.inputs, batch.targets,
                                                 static_cast<double>(counted), batch.segments);
    loss += part.item<double>();
    part.backward();
  }
  // The loss of a step is what is minimised, as in PEFT: with the method's own term.
  adapters::Figures figures;
  if (const at::Tensor penalty = adapter_->penalty(); penalty.defined()) {
    penalty.backward();
    figures.emplace_back("penalty", penalty.item<double>());
    loss += figures.back().second;
  }
  const double norm = train::grad_norm(optimizer_->parameters());
  if (!std::isfinite(loss) || !std::isfinite(norm))
    keep_last_good(index, std::isfinite(loss) ? "gradient norm" : "loss");
  // Clipped in place, so that a method's end_step sees the gradients of the update.
  if (o_.max_grad_norm > 0)
    if (const double scale = train::clip_scale(norm, o_.max_grad_norm); scale < 1.0)
      for (at::Tensor& parameter : optimizer_->parameters())
        if (parameter.grad().defined()) parameter.mutable_grad().mul_(scale);
  adapter_->before_update(info);
  optimizer_->step(lr);
  adapter_->end_step(info);
  optimizer_->zero_grad();
  for (auto& figure : adapter_->figures()) figures.push_back(std::move(figure));
  return {index, loss, lr, norm, tokens, seconds_since(start), std::move(figures)};
}

// The parameters are still those of the last finished step: they are saved before the run ends.
void Run::keep_last_good(int64_t index, const std::string& problem) {
  adapter_->save(o_.output, o_.common.model);
  fail("finetune", concat("the ", problem, " must be finite; got NaN or infinity in step ", index,
                          " (the adapter of the step before is in '", o_.output, "')"));
}

void Run::train() {
  MetricsFile metrics(fs::path(o_.output) / "metrics.jsonl", first_step_);
  const auto start = Clock::now();
  model_.decoder->train();
  for (int64_t index = first_step_; index < schedule_.total_steps; ++index) {
    const StepMetrics m = step(index);
    if (index == first_step_) first_step_seconds_ = m.seconds;
    tokens_ += m.tokens;
    finished_ = index + 1;
    metrics.write(m);
    const double a_step = seconds_since(start) / static_cast<double>(finished_ - first_step_);
    progress_->update(finished_, m.loss, m.lr, static_cast<double>(m.tokens) / m.seconds, a_step);
    const bool last = finished_ == schedule_.total_steps;
    if (stop_signal != 0 || (o_.save_every > 0 && finished_ % o_.save_every == 0 && !last)) {
      save_checkpoint(checkpoint_folder(finished_), *adapter_, *optimizer_, finished_, settings(),
                      o_.common.model);
      if (stop_signal != 0) break;
    }
    if (o_.eval_every > 0 && finished_ % o_.eval_every == 0 && !last)
      if (const auto loss = evaluate()) {
        held_out_losses_.emplace_back(finished_, *loss);
        progress_->note(fmt::format("step {}: held-out loss {:.4f}", finished_, *loss));
      }
  }
  train_seconds_ = seconds_since(start);
}

// What must not change when a run is resumed.
std::string Run::settings() const {
  ordered_json settings = ordered_json::parse(options_json(o_));
  for (const char* free : {"threads", "eval_fraction", "init_adapter", "adapter_config", "set"})
    settings.erase(free);
  settings["steps"] = schedule_.total_steps;
  settings["method"] = o_.method;
  settings["model"] = o_.common.model;
  return settings.dump();
}

void Run::write_results() {
  int64_t total = 0;
  for (const auto& parameter : model_.decoder->parameters()) total += parameter.numel();
  if (model_.decoder->config.tied) total -= model_.decoder->lm_head->weight.numel();
  const auto or_null = [](const std::optional<double>& value) {
    return value ? ordered_json(*value) : ordered_json(nullptr);
  };
  ordered_json run = {{"method", o_.method},
                      {"model", o_.common.model},
                      {"trainable_parameters", adapter_->parameter_count()},
                      {"total_parameters", total},
                      {"steps", finished_},
                      {"tokens", tokens_},
                      {"eval_loss_before", or_null(loss_before_)},
                      {"eval_loss_after", or_null(loss_after_)},
                      {"eval_losses", held_out_losses_},
                      {"load_seconds", load_seconds_},
                      {"init_seconds", init_seconds_},
                      {"init_peak_rss_mib", init_peak_mib_},
                      {"train_seconds", train_seconds_},
                      {"tokens_per_second",
                       train_seconds_ > 0 ? static_cast<double>(tokens_) / train_seconds_ : 0.0},
                      {"peak_rss_mib", peak_rss_mib()},
                      {"first_step_seconds", first_step_seconds_},
                      {"products", ops::describe_product_library()},
                      {"options", ordered_json::parse(options_json(o_))}};
  nlohmann::json fields;
  plan_->recipe->write_config(fields);
  for (const auto& [key, value] : fields.items()) run["options"][key] = value;
  if (!adapter_->start_reports().empty()) run["initialisation"] = start_report(*adapter_);
  if (!o_.sample.empty()) {
    run["sample_prompt"] = o_.sample;
    run["sample_before"] = sample_before_;
    run["sample_after"] = sample_after_;
  }
  io::write_text_file(fs::path(o_.output) / "run.json", run.dump(2) + "\n");
  if (o_.common.json) {
    std::cout << run.dump() << std::endl;
    return;
  }
  if (loss_before_ && loss_after_)
    std::cout << fmt::format("held-out loss {:.4f} -> {:.4f}\n", *loss_before_, *loss_after_);
  if (!o_.sample.empty())
    std::cout << "sample before: " << o_.sample << sample_before_
              << "\nsample after:  " << o_.sample << sample_after_ << "\n";
  std::cout << "adapter saved in " << o_.output << std::endl;
}

int Run::execute() {
  prepare();
  if (!o_.common.quiet || o_.dry_run) print_plan();
  if (o_.dry_run) return 0;
  std::error_code error;
  fs::create_directories(o_.output, error);
  GRAFT_CHECK(!error, "output", "the output folder must be writable; got '", o_.output,
              "': ", error.message());
  io::write_text_file(fs::path(o_.output) / "run.json",
                      "{}\n");  // a folder that refuses files should say so now

  optimizer_ = std::make_unique<train::AdamW>(train::parameter_groups(*adapter_, o_.weight_decay));
  if (!o_.resume.empty())
    first_step_ = load_checkpoint(o_.resume, *adapter_, *optimizer_, settings());
  GRAFT_CHECK(first_step_ < schedule_.total_steps, "checkpoint",
              "a resumed run must have steps left; got ", first_step_, " of ",
              schedule_.total_steps, " done");
  finished_ = first_step_;
  progress_ = std::make_unique<Progress>(schedule_.total_steps, o_.log_every, o_.common.quiet);
  loss_before_ = evaluate();
  sample_before_ = sample();
  if (loss_before_) progress_->note(fmt::format("held-out loss before: {:.4f}", *loss_before_));
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  train();
  adapter_->save(o_.output, o_.common.model);
  const int signal = stop_signal;
  if (signal == 0) {
    loss_after_ = evaluate();
    sample_after_ = sample();
  }
  progress_.reset();
  write_results();
  return signal == 0 ? 0 : 128 + signal;
}

}  // namespace

int run_finetune(const FinetuneOptions& options) {
  return Run(options).execute();
}

}  // namespace graft::trainer
