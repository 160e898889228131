/// Every option of `finetune`, and how the method's part of them becomes a recipe.
#pragma once

#include <graft/adapters/attach_options.h>
#include <graft/adapters/recipe.h>
#include <graft/train/schedule.h>

#include <optional>
#include <string>
#include <vector>

#include "examples/trainer/program.h"

namespace graft::trainer {

/// The flags of `finetune`; a method's flag that was not given is empty and leaves the value to the
/// config or the default.
struct FinetuneOptions {
  CommonOptions common;
  std::string data, eval_data, output, init_adapter, adapter_config, resume, sample;
  double eval_fraction = 0.05;
  std::string method = "lora";
  std::optional<int64_t> rank;
  std::optional<double> alpha, dropout;
  bool rslora = false;  ///< off: as the config says
  std::optional<std::string> bias, targets, init;
  std::optional<int64_t> experts, top_k;
  std::optional<std::string> router;
  std::optional<double> balance_loss;
  int64_t init_batches = 8;
  std::vector<std::string> settings;  ///< KEY=VALUE of --set
  int64_t seq_len = 256, batch_size = 4, grad_accum = 1;
  std::optional<int64_t> steps;
  double epochs = 1.0;
  double lr = 2e-4, weight_decay = 0.0, max_grad_norm = 1.0;
  std::string schedule = "cosine";
  int64_t warmup_steps = 0;
  bool shuffle = true, packing = true;
  bool gradient_checkpointing = false, cuda_graph = false;
  int64_t save_every = 0, eval_every = 0, log_every = 10;
  bool dry_run = false;
  std::string jobs;           ///< a file of several jobs: jobs_file.h
  int64_t jobs_per_pass = 0;  ///< whose rows share a forward and backward pass; 0: see pass_limit

  /// Whether rows may hold several examples, each with attention of its own.
  bool may_pack() const { return packing && data.ends_with(".jsonl"); }
  /// Throws unless every number is in its range.
  void validate() const;
};

/// Adds all flags to the command line.
void add_finetune_flags(CLI::App& app, FinetuneOptions& options);

/// A method with its options and where it goes.
struct AdapterPlan {
  std::shared_ptr<const adapters::Recipe> recipe;
  AttachOptions attach;
};

/// Config file or initial adapter first, flags over them, `--set` last. Throws UsageError for a
/// setting that the method does not know.
AdapterPlan make_plan(const FinetuneOptions& options);

/// Targets as the command line writes them: all-linear, a list with commas, or /a regular
/// expression/.
nn::Selector parse_targets(const std::string& text);

/// Every option as JSON text, for run.json.
std::string options_json(const FinetuneOptions& options);

}  // namespace graft::trainer
