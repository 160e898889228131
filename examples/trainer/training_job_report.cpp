// What a training job says about itself: the plan before, run.json after.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <graft/ops/frozen_product.h>

#include <map>
#include <nlohmann/json.hpp>

#include "examples/trainer/initialisation.h"
#include "examples/trainer/training_job.h"

namespace graft::trainer {

using nlohmann::ordered_json;

// The base's and this adapter's, whatever else sits in the model.
int64_t TrainingJob::total_parameters() const {
  int64_t total = base_parameters_;
  for (const auto& layer : adapter_->layers())
    for (const auto& parameter : layer.adapter->parameters()) total += parameter.numel();
  return total;
}

MemoryUse TrainingJob::memory(const models::DecoderConfig& config) const {
  const at::ScalarType type = compute_dtype(o_.common);
  const int64_t parameters = adapter_ ? adapter_->parameter_count() * 4 : 0;  // fp32
  return {weight_bytes(config, type), parameters, 3 * parameters,
          activation_bytes(config, {.rows = o_.batch_size,
                                    .tokens = o_.seq_len,
                                    .rank = plan_.recipe->start_plan().rank,
                                    .segments = o_.may_pack(),
                                    .recompute = o_.gradient_checkpointing,
                                    .type = type})};
}

std::string TrainingJob::plan() const {
  const int64_t trainable = adapter_->parameter_count(), total = total_parameters();
  std::map<std::string, std::pair<int64_t, int64_t>> kinds;  // last name -> layers, parameters
  for (const auto& layer : adapter_->layers()) {
    auto& [count, numbers] = kinds[layer.name.substr(layer.name.rfind('.') + 1)];
    ++count;
    for (const auto& parameter : layer.adapter->parameters()) numbers += parameter.numel();
  }
  std::string text =
      fmt::format("method      {} ({})\n", plan_.recipe->method(), plan_.recipe->describe());
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
  return text + fmt::format("steps       {} of {} x {} rows\nmemory      {} (predicted)\n",
                            schedule_.total_steps, o_.grad_accum, o_.batch_size,
                            describe(memory(model_->decoder->config)));
}

ordered_json TrainingJob::plan_json() const {
  const MemoryUse use = memory(model_->decoder->config);
  return {{"trainable_parameters", adapter_->parameter_count()},
          {"total_parameters", total_parameters()},
          {"layers", adapter_->layers().size()},
          {"steps", schedule_.total_steps},
          {"bytes", adapter_->parameter_count() * 4},
          {"predicted_memory",
           {{"weights", use.weights},
            {"adapter", use.adapter},
            {"optimiser", use.optimiser},
            {"activations", use.activations}}}};
}

ordered_json TrainingJob::results() const {
  const auto or_null = [](const std::optional<double>& value) {
    return value ? ordered_json(*value) : ordered_json(nullptr);
  };
  ordered_json run = {{"method", o_.method},
                      {"model", o_.common.model},
                      {"trainable_parameters", adapter_->parameter_count()},
                      {"total_parameters", total_parameters()},
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
  if (scaler_) {
    run["loss_scale"] = scaler_->scale();
    run["skipped_steps"] = scaler_->skipped();
  }
  nlohmann::json fields;
  plan_.recipe->write_config(fields);
  for (const auto& [key, value] : fields.items()) run["options"][key] = value;
  if (const auto use = adapter_->expert_use(); !use.empty()) run["expert_use"] = use;
  if (!adapter_->start_reports().empty()) run["initialisation"] = start_report(*adapter_);
  if (!o_.sample.empty()) {
    run["sample_prompt"] = o_.sample;
    run["sample_before"] = sample_before_;
    run["sample_after"] = sample_after_;
  }
  return run;
}

}  // namespace graft::trainer
