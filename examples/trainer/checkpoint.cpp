#include "examples/trainer/checkpoint.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/io/atomic_file.h>
#include <graft/io/safetensors.h>
#include <graft/nn/adapter_slot.h>
#include <graft/ops/frozen_product.h>

#include <nlohmann/json.hpp>

#include "examples/trainer/program.h"

namespace graft::trainer {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kOptimizer = "optimizer.safetensors";
constexpr const char* kState = "trainer_state.json";
constexpr const char* kMethodState = "method_state.safetensors";
constexpr const char* kStoredName = "default";
constexpr const char* kLossScale = "loss_scale";  // scale, finite steps, skipped steps

// What the method's layers report beside their tensors, as "layer.suffix"; shares their storage.
train::NamedTensors state_tensors(const AttachedAdapter& adapter) {
  train::NamedTensors tensors;
  for (const auto& layer : adapter.layers())
    for (const auto& [suffix, tensor] : layer.adapter->state_tensors())
      tensors.emplace_back(layer.name + "." + suffix, tensor);
  return tensors;
}

// Files speak of the adapter by the name that a single run gives it, so that a run of several jobs
// and one of its own go on from each other's checkpoints.
train::NamedTensors renamed(train::NamedTensors tensors, const std::string& from,
                            const std::string& to) {
  const std::string slot = std::string(".") + nn::AdapterSlot::kChildName + ".";
  for (auto& [name, tensor] : tensors)
    if (const size_t at = name.find(slot + from + "."); at != std::string::npos)
      name.replace(at + slot.size(), from.size(), to);
  return tensors;
}

void restore_scale(train::GradScaler& scaler, const json& state, const std::string& file) {
  const json stored = state.value(kLossScale, json());
  GRAFT_CHECK(stored.is_array() && stored.size() == 3 && stored[0].is_number() &&
                  stored[1].is_number_integer() && stored[2].is_number_integer(),
              "checkpoint", "the state of an fp16 run must hold its loss scale; got ",
              stored.dump(), " (file '", file, "')");
  scaler.restore(stored[0], stored[1], stored[2]);
}

}  // namespace

void save_checkpoint(const fs::path& folder, const AttachedAdapter& adapter,
                     const train::AdamW& optimizer, const std::optional<train::GradScaler>& scaler,
                     int64_t step, const std::string& settings, const std::string& base_model) {
  const fs::path temporary = folder.string() + ".partial";
  std::error_code error;
  fs::remove_all(temporary, error);
  try {
    adapter.save(temporary, base_model);
    io::write_safetensors(temporary / kOptimizer,
                          renamed(optimizer.state_dict(), adapter.name(), kStoredName));
    if (const auto tensors = state_tensors(adapter); !tensors.empty())
      io::write_safetensors(temporary / kMethodState, tensors);
    json counters = json::object();
    for (const auto& layer : adapter.layers()) counters[layer.name] = layer.adapter->counters();
    // The matrix library decides the last bits of every product, so a resumed run must use the same
    // one.
    json state = {{"step", step},
                  {"settings", json::parse(settings)},
                  {"counters", counters},
                  {"products", ops::product_library_name(ops::product_library())}};
    if (scaler) state[kLossScale] = {scaler->scale(), scaler->finite_steps(), scaler->skipped()};
    io::write_text_file(temporary / kState, state.dump(1) + "\n");
    fs::remove_all(folder, error);
    fs::rename(temporary, folder, error);
    GRAFT_CHECK(!error, "checkpoint", "the checkpoint folder must be writable; got '",
                folder.string(), "': ", error.message());
  } catch (...) {
    fs::remove_all(temporary, error);
    throw;
  }
}

int64_t load_checkpoint(const fs::path& folder, AttachedAdapter& adapter, train::AdamW& optimizer,
                        std::optional<train::GradScaler>& scaler, const std::string& settings) {
  const std::string file = (folder / kState).string();
  const json state =
      json::parse(read_file(file, "checkpoint"), nullptr, /*allow_exceptions=*/false);
  GRAFT_CHECK(state.is_object() && state.contains("step") && state.contains("settings") &&
                  state.contains("counters") && state.contains("products"),
              "checkpoint", "the state file must hold step, settings, counters and products; got '",
              file, "'");
  const json ours = json::parse(settings), &theirs = state.at("settings");
  std::string difference;
  for (const auto& [key, value] : ours.items())
    if (theirs.value(key, json()) != value)
      difference += concat(difference.empty() ? "" : ", ", key, "=", value.dump(), " for ",
                           theirs.value(key, json()).dump());
  GRAFT_CHECK(difference.empty(), "checkpoint", "a resumed run must repeat the options; got ",
              difference, " (folder '", folder.string(), "')");
  if (scaler) restore_scale(*scaler, state, file);
  ops::set_product_library(ops::parse_product_library(state.at("products").get<std::string>()));
  const io::SafetensorsFile tensors = io::SafetensorsFile::open(folder / kOptimizer);
  train::NamedTensors values;
  for (const auto& name : tensors.names()) values.emplace_back(name, tensors.tensor(name));
  adapter.load(folder);
  optimizer.load_state_dict(renamed(std::move(values), kStoredName, adapter.name()));
  if (auto wanted = state_tensors(adapter); !wanted.empty()) {
    const io::SafetensorsFile stored = io::SafetensorsFile::open(folder / kMethodState);
    for (auto& [name, tensor] : wanted) {
      GRAFT_CHECK(
          stored.contains(name) && at::IntArrayRef(stored.info(name).shape) == tensor.sizes(),
          "checkpoint", "the method's state must fit its layers; got no fitting ", name,
          " (folder '", folder.string(), "')");
      const at::NoGradGuard no_grad;  // it may be a parameter
      tensor.copy_(stored.tensor(name));
    }
  }
  for (const auto& layer : adapter.layers()) {
    GRAFT_CHECK(state.at("counters").contains(layer.name), "checkpoint",
                "the state must hold every layer's counters; got none for '", layer.name,
                "' (file '", file, "')");
    layer.adapter->set_counters(state.at("counters").at(layer.name).get<std::vector<int64_t>>());
  }
  return state.at("step").get<int64_t>();
}

}  // namespace graft::trainer
