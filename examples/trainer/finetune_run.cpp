#include "examples/trainer/finetune_run.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <graft/core/error.h>
#include <graft/ops/device_paths.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>

#include "examples/trainer/graphed_passes.h"
#include "examples/trainer/jobs_file.h"
#include "examples/trainer/joint_pass.h"
#include "examples/trainer/progress.h"
#include "examples/trainer/training_job.h"

namespace graft::trainer {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

volatile std::sig_atomic_t stop_signal = 0;

// The first signal asks the loop to end after its step, the second one ends the process at once.
void on_signal(int signal) {
  if (stop_signal != 0) _exit(128 + signal);
  stop_signal = signal;
}

// Everything a run holds on to: one job, or those of --jobs.
class Run {
 public:
  explicit Run(const FinetuneOptions& options) : o_(options), started_(Clock::now()) {}

  int execute();

 private:
  int run();
  PassLimit limit_of_passes() const;
  MemoryUse memory() const;
  void prepare();
  void for_job(const std::string& output, const std::function<void()>& action) const;
  void print_plans() const;
  void start();
  void train();
  std::vector<StepMetrics> step();
  void after_step(TrainingJob& job);
  void report(const std::vector<StepMetrics>& metrics);
  void stopped_early(const TrainingJob& job, const Error& error);
  void finish(TrainingJob& job);
  bool single() const { return o_.jobs.empty(); }

  const FinetuneOptions& o_;
  Clock::time_point started_, training_since_;
  models::LoadedModel model_{nullptr, text::Tokenizer(nullptr)};
  std::vector<std::unique_ptr<TrainingJob>> jobs_;
  std::vector<TrainingJob*> running_;
  std::vector<std::string> failed_;         // their output folders
  std::unique_ptr<GraphedPasses> graphed_;  // with --cuda-graph
  std::unique_ptr<Progress> progress_;
  int64_t steps_done_ = 0;
};

// What the command line must hold: of a run of its own, or of one of several jobs.
void check_usage(const FinetuneOptions& o) {
  const auto refuse = [](const char* text) {
    throw UsageError(concat("[usage] ", text, " (--help lists the flags)"));
  };
  if (o.cuda_graph && o.common.device == "cpu") refuse("--cuda-graph needs --device cuda");
  if (o.cuda_graph && !o.jobs.empty()) refuse("--cuda-graph is for a run of its own, not --jobs");
  if (o.jobs.empty()) {
    if (o.data.empty()) refuse("--data is required");
    if (o.output.empty()) refuse("--output is required");
  } else {
    if (!o.output.empty()) refuse("--output is each job's own and belongs into the file of --jobs");
    if (!o.resume.empty()) refuse("--resume is each job's own and belongs into the file of --jobs");
  }
}

// One of several jobs is named where it fails.
void Run::for_job(const std::string& output, const std::function<void()>& action) const {
  if (single()) return action();
  try {
    action();
  } catch (const Error& error) {
    throw Error(concat(error.what(), " (job '", output, "')"));
  }
}

void Run::prepare() {
  check_usage(o_);
  apply_common(o_.common);
  // Before the model: a mistake in the options should not cost a load.
  if (single())
    jobs_.push_back(std::make_unique<TrainingJob>(o_));
  else
    for (const auto& options : read_jobs(o_))
      for_job(options.output, [&] {
        const std::string name = "job" + std::to_string(jobs_.size() + 1);
        jobs_.push_back(std::make_unique<TrainingJob>(options, name, /*shared=*/true));
      });
  {
    const text::Tokenizer tokenizer = models::load_tokenizer(o_.common.model);
    for (const auto& job : jobs_)
      for_job(job->options().output, [&] { job->read_data(tokenizer); });
  }
  model_ = models::load(o_.common.model, compute_dtype(o_.common), compute_device(o_.common));
  model_.decoder->gradient_checkpointing = o_.gradient_checkpointing;
  const double load_seconds = seconds_since(started_);
  for (const auto& job : jobs_)
    for_job(job->options().output, [&] { job->attach(model_, load_seconds); });
}

void Run::print_plans() const {
  auto& stream = o_.dry_run && !o_.common.json ? std::cout : std::cerr;
  for (const auto& job : jobs_) {
    if (!single()) stream << "job         " << job->options().output << "\n";
    stream << job->plan() << std::flush;
    if (o_.dry_run && o_.common.json) std::cout << job->plan_json().dump() << std::endl;
  }
  if (!single()) stream << "all jobs    " << describe(memory()) << " (predicted)\n" << std::flush;
}

void Run::start() {
  int64_t longest = 0;
  for (const auto& job : jobs_) {
    for_job(job->options().output, [&] { job->start(); });
    running_.push_back(job.get());
    longest = std::max(longest, job->total_steps() - job->first_step());
  }
  if (o_.cuda_graph)
    graphed_ = std::make_unique<GraphedPasses>(*model_.decoder, *running_.front(),
                                               compute_device(o_.common));
  // A resumed run counts on; jobs count from where the longest of them begins.
  steps_done_ = single() ? jobs_.front()->first_step() : 0;
  progress_ = std::make_unique<Progress>(steps_done_ + longest, o_.log_every, o_.common.quiet);
  for (const auto& job : jobs_)
    if (job->loss_before())
      progress_->note(fmt::format("{}held-out loss before: {:.4f}",
                                  single() ? "" : job->options().output + ": ",
                                  *job->loss_before()));
}

// One optimiser step of every job that is still running.
std::vector<StepMetrics> Run::step() {
  std::vector<JobBatches> batches;
  for (TrainingJob* job : running_) batches.push_back({job, &job->begin_step()});
  if (graphed_) {
    for (const Batch& batch : *batches.front().batches)
      if (batch.counted > 0) graphed_->run(batch);
  } else {
    run_passes(*model_.decoder, batches, limit_of_passes());
  }
  std::vector<StepMetrics> metrics;
  std::vector<TrainingJob*> rest;
  for (TrainingJob* job : running_) {
    try {
      metrics.push_back(job->end_step());
      rest.push_back(job);
    } catch (const Error& error) {
      if (single()) throw;
      stopped_early(*job, error);
    }
  }
  running_ = std::move(rest);
  ++steps_done_;
  return metrics;
}

void Run::stopped_early(const TrainingJob& job, const Error& error) {
  progress_->warn(fmt::format("job '{}' stopped: {}", job.options().output, error.what()));
  failed_.push_back(job.options().output);
}

void Run::report(const std::vector<StepMetrics>& metrics) {
  if (metrics.empty()) return;
  std::string figures;
  int64_t tokens = 0;
  double seconds = 0;
  for (size_t i = 0; i < metrics.size(); ++i) {
    const StepMetrics& m = metrics[i];
    figures += single() ? fmt::format("loss {:.4f}  lr {:.2e}", m.loss, m.lr)
                        : fmt::format("{}{} {:.4f}", i == 0 ? "" : "  ",
                                      running_[i]->options().output, m.loss);
    tokens += m.tokens;
    seconds = std::max(seconds, m.seconds);
  }
  const int64_t first = single() ? jobs_.front()->first_step() : 0;
  progress_->update(steps_done_, figures, static_cast<double>(tokens) / seconds,
                    seconds_since(training_since_) / static_cast<double>(steps_done_ - first));
}

// Checkpoint and held-out loss where they are due.
void Run::after_step(TrainingJob& job) {
  const FinetuneOptions& o = job.options();
  if (stop_signal != 0 || job.due(o.save_every)) job.save_checkpoint();
  if (stop_signal != 0 || !job.due(o.eval_every)) return;
  if (const auto loss = job.evaluate())
    progress_->note(fmt::format("{}step {}: held-out loss {:.4f}", single() ? "" : o.output + ": ",
                                job.finished_steps(), *loss));
}

void Run::train() {
  training_since_ = Clock::now();
  model_.decoder->train();
  while (!running_.empty() && stop_signal == 0) {
    report(step());
    for (TrainingJob* job : running_) after_step(*job);
    if (stop_signal != 0) break;
    for (TrainingJob* job : running_)
      if (job->done()) finish(*job);
    std::erase_if(running_, [](const TrainingJob* job) { return job->done(); });
  }
  for (TrainingJob* job : running_) finish(*job);  // broken off
}

void Run::finish(TrainingJob& job) {
  const auto run = job.finish(/*whole=*/stop_signal == 0);
  if (single())
    progress_.reset();
  else
    progress_->clear();
  if (o_.common.json) {
    std::cout << run.dump() << std::endl;
    return;
  }
  const auto &before = run["eval_loss_before"], &after = run["eval_loss_after"];
  if (before.is_number() && after.is_number())
    std::cout << fmt::format("held-out loss {:.4f} -> {:.4f}\n", before.get<double>(),
                             after.get<double>());
  if (run.contains("skipped_steps"))
    std::cout << fmt::format("{} of {} steps skipped, whose gradients overflowed in fp16\n",
                             run["skipped_steps"].get<int64_t>(), run["steps"].get<int64_t>());
  if (run.contains("sample_prompt")) {
    const std::string prompt = run["sample_prompt"];
    std::cout << "sample before: " << prompt << run["sample_before"].get<std::string>()
              << "\nsample after:  " << prompt << run["sample_after"].get<std::string>() << "\n";
  }
  std::cout << "adapter saved in " << job.options().output << std::endl;
}

PassLimit Run::limit_of_passes() const {
  return pass_limit(o_.jobs_per_pass, o_.common.device == "cpu");
}

// Of all jobs: a pass holds the activations of as many as share it, at worst the largest of those
// that may, since shorter jobs drop out.
MemoryUse Run::memory() const {
  const auto config = models::read_config(o_.common.model);
  const PassLimit limit = limit_of_passes();
  MemoryUse all;
  std::vector<std::pair<int64_t, int64_t>> passes;  // activations and tokens of each job
  for (const auto& job : jobs_) {
    const MemoryUse use = job->memory(config);
    all.weights = use.weights;
    all.adapter += use.adapter;
    all.optimiser += use.optimiser;
    passes.emplace_back(use.activations, job->options().batch_size * job->options().seq_len);
  }
  std::sort(passes.rbegin(), passes.rend());
  for (auto first = passes.begin(); first != passes.end(); ++first) {
    int64_t jobs = 0, tokens = 0, activations = 0;
    for (auto job = first; job != passes.end(); ++job) {
      if (!limit.has_room(jobs, tokens, job->second)) continue;
      ++jobs;
      tokens += job->second;
      activations += job->first;
    }
    all.activations = std::max(all.activations, activations);
  }
  return all;
}

int Run::execute() {
  try {
    return run();
  } catch (const std::exception& error) {
    const auto request = out_of_memory(error);
    if (!request) throw;
    // What was saved stays as it is: checkpoints are written beside their place and renamed.
    fail("memory", concat("the run must fit the memory of ", o_.common.device, "; got no room for ",
                          *request, " (predicted: ", describe(memory()),
                          "; less with a smaller batch-size or seq-len, gradient-checkpointing)"));
  }
}

int Run::run() {
  prepare();
  if (!o_.common.quiet || o_.dry_run) print_plans();
  if (o_.dry_run) return 0;
  start();
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  train();
  progress_.reset();
  if (o_.common.verbose) std::cerr << ops::describe_device_paths();
  std::string failed;
  for (const auto& output : failed_) failed += (failed.empty() ? "'" : ", '") + output + "'";
  GRAFT_CHECK(failed_.empty(), "jobs", "every job must end; got ", failed_.size(), " of ",
              jobs_.size(), " stopped: ", failed);
  return stop_signal == 0 ? 0 : 128 + stop_signal;
}

}  // namespace

int run_finetune(const FinetuneOptions& options) {
  return Run(options).execute();
}

}  // namespace graft::trainer
