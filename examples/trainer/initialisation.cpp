#include "examples/trainer/initialisation.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <graft/io/adapter_config.h>
#include <graft/nn/adapter_slot.h>

#include <iostream>
#include <nlohmann/json.hpp>

namespace graft::trainer {

using nlohmann::ordered_json;

namespace {

// Blocks are recomputed in backward while this lives.
class RecomputedBlocks {
 public:
  explicit RecomputedBlocks(models::DecoderImpl& model)
      : model_(model), before_(model.gradient_checkpointing) {
    model_.gradient_checkpointing = true;
  }
  ~RecomputedBlocks() { model_.gradient_checkpointing = before_; }

 private:
  models::DecoderImpl& model_;
  bool before_;
};

bool output_is_adapted(const models::DecoderImpl& model) {
  return model.lm_head->slot != nullptr && model.lm_head->slot->engaged();
}

}  // namespace

InitData init_data(models::DecoderImpl& model, const TokenData& rows, RowOrder& order,
                   int64_t batches, bool quiet) {
  InitData data;
  data.batches = batches;
  data.loss = [&model, &rows, &order](int64_t i) {
    const Batch batch = rows.batch(order.batch(i));
    // An initialiser that wants no gradient wants the layers' inputs, which need no logits.
    if (!at::GradMode::is_enabled() && !output_is_adapted(model))
      return model.hidden(batch.inputs, nullptr, batch.segments, batch.valid).mean();
    // Gradients of all layers come to be: no room for all activations besides.
    const RecomputedBlocks recomputed(model);
    return model.loss(batch.inputs, batch.targets, std::nullopt, batch.segments, batch.valid);
  };
  const at::Device device = model.model->embed_tokens->weight.device();
  data.mask = [&rows, &order, device](int64_t i) {
    return (rows.batch(order.batch(i)).targets != -100).to(device);
  };
  if (!quiet)
    data.progress = [](int64_t done, int64_t of) {
      std::cerr << fmt::format("initialisation: batch {} of at most {}\n", done, of);
    };
  return data;
}

AttachOptions resumed(AttachOptions options, const adapters::Recipe& recipe,
                      const std::filesystem::path& checkpoint) {
  options.initialise = false;
  if (recipe.start_plan().kind.name != "eva") return options;
  const AttachOptions stored = io::read_adapter_config(checkpoint).attach;
  options.targets = stored.targets;
  options.rank_pattern = stored.rank_pattern;
  options.alpha_pattern = stored.alpha_pattern;
  return options;
}

ordered_json start_report(const AttachedAdapter& adapter) {
  ordered_json layers = ordered_json::array();
  for (const auto& report : adapter.start_reports()) {
    std::vector<double> leading;
    if (report.singular_values.defined()) {
      const int64_t count = std::min(report.rank, report.singular_values.size(0));
      const at::Tensor values =
          report.singular_values.narrow(0, 0, count).to(at::kDouble).contiguous();
      leading.assign(values.data_ptr<double>(), values.data_ptr<double>() + count);
    }
    layers.push_back({{"layer", report.layer},
                      {"rank", report.rank},
                      {"explained", report.explained},
                      {"singular_values", leading}});
  }
  return layers;
}

}  // namespace graft::trainer
