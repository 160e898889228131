#include "examples/trainer/finetune_options.h"

#include <graft/adapters/lora.h>
#include <graft/core/error.h>
#include <graft/init/initialiser.h>
#include <graft/io/adapter_config.h>
#include <graft/moe/router.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

namespace graft::trainer {
namespace {

using nlohmann::json;

// The value of --set: JSON where it is JSON, else text.
json parse_value(const std::string& text) {
  const json value = json::parse(text, nullptr, /*allow_exceptions=*/false);
  return value.is_discarded() ? json(text) : value;
}

TrainedBias parse_bias(const std::string& text) {
  return text == "none"  ? TrainedBias::none
         : text == "all" ? TrainedBias::all
                         : TrainedBias::adapted_layers;
}

// A name that no method knows is wrong usage; what the chosen method makes of it is its affair.
template <class Parse>
std::string refusal_of(const std::string& name, Parse&& parse) {
  try {
    parse(name);
    return {};
  } catch (const Error& error) {
    return error.what();
  }
}

std::string unknown_init(const std::string& name) {
  static const std::vector<std::string> kOfNlora = {"slora", "block", "pinv", "cur"};
  const bool known = std::find(kOfNlora.begin(), kOfNlora.end(), name) != kOfNlora.end();
  return known ? std::string() : refusal_of(name, init::find_kind);
}

std::string unknown_router(const std::string& name) {
  return refusal_of(name, moe::parse_selection);
}

// The defaults of the command line, which differ from PEFT's in alpha. A method that names its
// options in its own way keeps its own defaults.
json default_config(const adapters::MethodEntry& method) {
  json config = {{"peft_type", method.peft_type}};
  const adapters::OptionKeys usual;
  if (method.keys.rank == usual.rank && method.keys.alpha == usual.alpha) {
    config[usual.rank] = 8;
    config[usual.alpha] = 16;
  }
  return config;
}

void apply_flags(const FinetuneOptions& options, const adapters::MethodEntry& method,
                 json& config) {
  const auto set = [&](const char* flag, const std::string& key, const auto& value) {
    if (!value) return;
    if (key.empty()) throw UsageError(concat("[usage] the method ", method.name, " has no ", flag));
    config[key] = *value;
  };
  set("--rank", method.keys.rank, options.rank);
  set("--alpha", method.keys.alpha, options.alpha);
  set("--dropout", method.keys.dropout, options.dropout);
  set("--rslora", method.keys.rslora, options.rslora ? std::optional(true) : std::nullopt);
  set("--init", method.keys.init, options.init);
  set("--experts", method.keys.experts, options.experts);
  set("--top-k", method.keys.top_k, options.top_k);
  set("--router", method.keys.router, options.router);
  set("--balance-loss", method.keys.balance_loss, options.balance_loss);
}

}  // namespace

void FinetuneOptions::validate() const {
  const auto positive = [](const char* name, int64_t value) {
    GRAFT_CHECK(value >= 1, "finetune", name, " must be at least 1; got ", value);
  };
  positive("batch-size", batch_size);
  positive("grad-accum", grad_accum);
  positive("log-every", log_every);
  positive("init-batches", init_batches);
  if (steps) positive("steps", *steps);
  GRAFT_CHECK(seq_len >= 2, "finetune", "seq-len must be at least 2; got ", seq_len);
  GRAFT_CHECK(save_every >= 0 && eval_every >= 0, "finetune",
              "save-every and eval-every must not be negative; got ", save_every, " and ",
              eval_every);
  GRAFT_CHECK(epochs > 0 && std::isfinite(epochs), "finetune", "epochs must be positive; got ",
              epochs);
  GRAFT_CHECK(lr > 0 && std::isfinite(lr), "finetune", "lr must be positive and finite; got ", lr);
  GRAFT_CHECK(weight_decay >= 0 && std::isfinite(weight_decay), "finetune",
              "weight-decay must be >= 0; got ", weight_decay);
  GRAFT_CHECK(max_grad_norm >= 0, "finetune", "max-grad-norm must be >= 0 (0: no clipping); got ",
              max_grad_norm);
  GRAFT_CHECK(eval_fraction >= 0 && eval_fraction < 1, "finetune",
              "eval-fraction must be in [0, 1); got ", eval_fraction);
}

void add_finetune_flags(CLI::App& app, FinetuneOptions& o) {
  add_common_flags(app, o.common, /*adapter=*/false);
  const auto add = [&](const char* group, const char* name, auto& value, const char* text) {
    return app.add_option(name, value, text)->group(group);
  };
  add("Data", "--data", o.data,
      "what to train on: a text (.txt), or examples (.jsonl) with text, prompt and completion, or "
      "messages");
  add("Data", "--eval-data", o.eval_data, "held-out text; replaces --eval-fraction");
  add("Data", "--eval-fraction", o.eval_fraction,
      "last part of the text that is held out, in whole chunks; 0: none")
      ->capture_default_str();
  add("Data", "--seq-len", o.seq_len, "tokens a row")->capture_default_str();
  add("Data", "--batch-size", o.batch_size, "rows a micro-batch")->capture_default_str();
  add("Data", "--grad-accum", o.grad_accum, "micro-batches a step")->capture_default_str();
  app.add_flag("--shuffle,!--no-shuffle", o.shuffle, "shuffle the rows in every epoch [on]")
      ->group("Data");
  app.add_flag("--packing,!--no-packing", o.packing,
               "several short examples a row, attention kept inside each [on]")
      ->group("Data");

  std::string methods;
  for (const auto& name : adapters::method_names()) methods += (methods.empty() ? "" : ", ") + name;
  add("Method", "--method", o.method, ("one of: " + methods).c_str())
      ->check(CLI::IsMember(adapters::method_names()))
      ->capture_default_str();
  add("Method", "--rank", o.rank, "rank r [8, or the default of a method with options of its own]");
  add("Method", "--alpha", o.alpha,
      "numerator of the scale alpha / r [16, or the method's own default]");
  add("Method", "--dropout", o.dropout, "dropout on the adapter's input [0]");
  app.add_flag("--rslora", o.rslora, "scale alpha / sqrt(r)")->group("Method");
  add("Method", "--bias", o.bias, "the model's biases to train: none, all, lora_only [none]")
      ->check(CLI::IsMember({"none", "all", "lora_only"}));
  add("Method", "--target-modules", o.targets,
      "all-linear, suffixes with commas, or /regular expression/ [all-linear]");
  std::string starts;
  for (const auto& name : init::names()) starts += (starts.empty() ? "" : ", ") + name;
  add("Method", "--init", o.init,
      ("start values: " + starts + "; nlora: slora, block, pinv, cur [kaiming]").c_str())
      ->check(unknown_init);
  add("Method", "--init-batches", o.init_batches,
      "batches of the training data that lora_ga, lora_sb, corda or eva may read")
      ->capture_default_str();
  add("Method", "--experts", o.experts, "experts of a mixture [8]");
  add("Method", "--top-k", o.top_k, "experts that work on a token [2]");
  add("Method", "--router", o.router,
      "who works on a token: top-k, top-k-softmax, dense, top-p, switch-top-1, threshold, biased "
      "[top-k]")
      ->check(unknown_router);
  add("Method", "--balance-loss", o.balance_loss,
      "coefficient of the loss that keeps experts evenly used [0.01]");
  add("Method", "--adapter-config", o.adapter_config,
      "a PEFT adapter_config.json; flags given as well win");
  add("Method", "--init-adapter", o.init_adapter, "start from this adapter folder's values");
  add("Method", "--set", o.settings,
      "KEY=VALUE: any option of the method by its PEFT name; may be repeated")
      ->allow_extra_args(false);

  auto* steps = add("Training", "--steps", o.steps, "optimiser steps; replaces --epochs");
  add("Training", "--epochs", o.epochs, "passes over the text")
      ->capture_default_str()
      ->excludes(steps);
  add("Training", "--lr", o.lr, "learning rate of AdamW")->capture_default_str();
  add("Training", "--schedule", o.schedule, "constant, linear or cosine")
      ->check(CLI::IsMember({"constant", "linear", "cosine"}))
      ->capture_default_str();
  add("Training", "--warmup-steps", o.warmup_steps, "steps of linear warm-up")
      ->capture_default_str();
  add("Training", "--weight-decay", o.weight_decay, "decoupled weight decay")
      ->capture_default_str();
  add("Training", "--max-grad-norm", o.max_grad_norm, "clip the gradient's norm; 0: do not")
      ->capture_default_str();
  app.add_flag("--gradient-checkpointing", o.gradient_checkpointing,
               "recompute the blocks in backward")
      ->group("Training");
  app.add_flag("--cuda-graph", o.cuda_graph,
               "with --device cuda: forward and backward pass as one launch, for small models")
      ->group("Training");

  add("Output", "--output", o.output, "folder for the adapter, metrics.jsonl and run.json");
  add("Output", "--save-every", o.save_every, "steps between checkpoints; 0: none")
      ->capture_default_str();
  add("Output", "--eval-every", o.eval_every,
      "steps between held-out losses; 0: only before and after")
      ->capture_default_str();
  add("Output", "--log-every", o.log_every, "steps between progress lines off a terminal")
      ->capture_default_str();
  add("Output", "--resume", o.resume, "go on from this checkpoint folder, bit for bit");
  add("Output", "--sample", o.sample, "continue this prompt before and after training");
  app.add_flag("--dry-run", o.dry_run, "print what would be trained and stop")->group("Output");

  auto* jobs = add(
      "Several adapters", "--jobs", o.jobs,
      "train several adapters over one frozen model: a .json or .jsonl file, an object a job with "
      "data, output and any other flag; the flags given here hold for all");
  add("Several adapters", "--jobs-per-pass", o.jobs_per_pass,
      "jobs whose rows share a forward and backward pass; 1 needs the least memory; 0: all on a "
      "GPU, up to 256 tokens on the CPU")
      ->check(CLI::NonNegativeNumber)
      ->needs(jobs)
      ->capture_default_str();
}

nn::Selector parse_targets(const std::string& text) {
  if (text == "all-linear") return nn::Selector::all_linear();
  if (text.size() >= 2 && text.front() == '/' && text.back() == '/')
    return nn::Selector::regex(text.substr(1, text.size() - 2));
  std::vector<std::string> names;
  std::stringstream stream(text);
  for (std::string name; std::getline(stream, name, ',');)
    if (!name.empty()) names.push_back(name);
  return nn::Selector(std::move(names));
}

AdapterPlan make_plan(const FinetuneOptions& options) {
  AdapterPlan plan;
  const auto& method = adapters::find_method(options.method);
  json config = default_config(method);
  const std::string& base =
      options.init_adapter.empty() ? options.adapter_config : options.init_adapter;
  if (!base.empty()) {
    const io::AdapterConfig given = io::read_adapter_config(base);
    // LoRA-FA saves plain LoRA folders and starts from them.
    const bool plain = given.recipe->method() == "lora" && method.name == "lora-fa";
    GRAFT_CHECK(plain || given.recipe->method() == method.name, "finetune",
                "the adapter config must be of the method ", method.name, "; got ",
                given.recipe->method(), " (", base, ")");
    plan.attach = given.attach;
    config = {{"peft_type", method.peft_type}};
    given.recipe->write_config(config);
  }
  apply_flags(options, method, config);
  for (const auto& setting : options.settings) {
    const size_t equals = setting.find('=');
    if (equals == std::string::npos || equals == 0)
      throw UsageError("[usage] --set takes KEY=VALUE; got '" + setting + "'");
    config[setting.substr(0, equals)] = parse_value(setting.substr(equals + 1));
  }
  json rest = config;
  plan.recipe = method.read_config(rest);
  for (const auto& setting : options.settings) {
    const std::string key = setting.substr(0, setting.find('='));
    if (rest.contains(key) || key == "peft_type")
      throw UsageError("[usage] --set: the method " + method.name + " has no option '" + key + "'");
  }
  plan.recipe->validate();
  if (!options.init_adapter.empty()) plan.recipe = adapters::found_again_as_peft(plan.recipe);
  // X-LoRA sits where its adapters do.
  if (const auto layers = rest.find("target_modules"); base.empty() && layers != rest.end())
    plan.attach.targets = nn::Selector(layers->get<std::vector<std::string>>());
  if (options.targets) plan.attach.targets = parse_targets(*options.targets);
  if (options.bias) plan.attach.bias = parse_bias(*options.bias);
  plan.attach.seed = options.common.seed;
  return plan;
}

std::string options_json(const FinetuneOptions& o) {
  json j = {{"data", o.data},
            {"eval_data", o.eval_data},
            {"eval_fraction", o.eval_fraction},
            {"adapter_config", o.adapter_config},
            {"init_adapter", o.init_adapter},
            {"set", o.settings},
            {"seq_len", o.seq_len},
            {"batch_size", o.batch_size},
            {"grad_accum", o.grad_accum},
            {"lr", o.lr},
            {"schedule", o.schedule},
            {"warmup_steps", o.warmup_steps},
            {"weight_decay", o.weight_decay},
            {"max_grad_norm", o.max_grad_norm},
            {"shuffle", o.shuffle},
            {"packing", o.packing},
            {"gradient_checkpointing", o.gradient_checkpointing},
            {"seed", o.common.seed},
            {"dtype", o.common.dtype},
            {"device", o.common.device},
            {"threads", o.common.threads},
            {"target_modules", o.targets.value_or("")},
            {"epochs", o.epochs},
            {"init_batches", o.init_batches}};
  if (o.cuda_graph) j["cuda_graph"] = true;
  return j.dump();
}

}  // namespace graft::trainer
