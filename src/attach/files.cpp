// Adapter folders: adapter_config.json and adapter_model.safetensors, as Hugging Face PEFT writes
// and reads them.
#include <ATen/ATen.h>
#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>
#include <graft/core/error.h>
#include <graft/io/adapter_config.h>
#include <graft/io/adapter_tensors.h>
#include <graft/io/atomic_file.h>
#include <graft/io/safetensors.h>
#include <graft/nn/checks_file_tensors.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "file_options.h"
#include "state.h"

namespace graft {

namespace {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

constexpr const char* kPrefix = "base_model.model.";
constexpr const char* kWeights = "adapter_model.safetensors";

// A layer's path in the keys of the method's files.
std::string path_of(const AttachedAdapter::State& state, const AdaptedLayer& layer) {
  return io::file_path(adapters::find_method(state.recipe->method()), layer.name);
}

// What a file says of the layers, one entry a layer.
using LayerTensors = std::vector<std::vector<nn::Adapter::FileTensor>>;

LayerTensors layer_tensors(const AttachedAdapter::State& state, bool trained_only = false) {
  LayerTensors tensors;
  for (const auto& layer : state.layers)
    tensors.push_back(trained_only ? layer.adapter->trained_file_tensors()
                                   : layer.adapter->file_tensors());
  return tensors;
}

// Every layer's tensors, and the model's own that the adapter trains, under their keys in a file.
NamedTensors own_tensors(const AttachedAdapter::State& state, const LayerTensors& of_layers) {
  NamedTensors tensors;
  for (size_t i = 0; i < state.layers.size(); ++i)
    for (const auto& [suffix, tensor] : of_layers[i])
      tensors.emplace_back(path_of(state, state.layers[i]) + "." + suffix, tensor);
  for (const auto& parameter : state.model_parameters)
    tensors.emplace_back(kPrefix + parameter.file_key, parameter.values());
  return tensors;
}

// What a file stores once for all layers.
NamedTensors shared_tensors(const AttachedAdapter::State& state) {
  NamedTensors tensors;
  for (const auto& [key, tensor] : state.layers.front().adapter->shared_file_tensors())
    tensors.emplace_back(key, tensor);
  return tensors;
}

// Whether files hold the shared tensors; PEFT's option leaves them out where they follow from a
// seed.
bool stores_shared(const adapters::Recipe& recipe) {
  nlohmann::json fields = nlohmann::json::object();
  recipe.write_config(fields);
  return fields.value("save_projection", true);
}

std::string shape_text(at::IntArrayRef shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// At most a dozen names, and how many more there are.
void list(std::string& report, const char* what, const std::vector<std::string>& names) {
  if (names.empty()) return;
  report += concat(report.empty() ? "" : "; ", names.size(), " ", what, ": ");
  for (size_t i = 0; i < names.size() && i < 12; ++i) report += (i ? ", " : "") + names[i];
  if (names.size() > 12) report += ", ...";
}

// What a file holds for the tensors that layers share.
struct SharedInFile {
  // Each tensor's name in the file: its own key, or a copy of it in one of the layers, where some
  // writers put it.
  std::map<std::string, std::string> names;
  std::set<std::string> copies;  // all of those copies
};

SharedInFile find_shared(const AttachedAdapter::State& state, const NamedTensors& shared,
                         const io::AdapterTensors& file) {
  SharedInFile found;
  for (const auto& [key, tensor] : shared) {
    if (file.contains(key)) found.names[key] = key;
    const std::string suffix = key.substr(key.find('.') + 1);  // behind "base_model."
    for (const auto& layer : state.layers) {
      const std::string copy = path_of(state, layer) + "." + suffix;
      if (!file.contains(copy)) continue;
      found.copies.insert(copy);
      const std::string& first = found.names.try_emplace(key, copy).first->second;
      GRAFT_CHECK(at::equal(file.tensor(copy), file.tensor(first)), "adapter",
                  "the layers' copies of a shared tensor must be equal; got another ", copy,
                  " than ", first, " (file '", file.path().string(), "')");
    }
  }
  return found;
}

// Finds each wanted tensor in the file; every disagreement is reported in one line.
NamedTensors match_file(const NamedTensors& wanted, const SharedInFile& shared,
                        const io::AdapterTensors& file) {
  const std::vector<std::string> all = file.names();
  std::set<std::string> rest(all.begin(), all.end());
  for (const auto& name : shared.copies) rest.erase(name);
  std::vector<std::string> missing, shapes;
  NamedTensors found;
  for (const auto& [key, target] : wanted) {
    const auto elsewhere = shared.names.find(key);
    // A magnitude or scale vector may carry ".weight" in files of other writers.
    const std::string name = elsewhere != shared.names.end() ? elsewhere->second
                             : rest.count(key) > 0           ? key
                                                             : key + ".weight";
    if (rest.erase(name) == 0 && elsewhere == shared.names.end()) {
      missing.push_back(key);
      continue;
    }
    const at::IntArrayRef shape = file.tensor(name).sizes();
    if (shape != target.sizes())
      shapes.push_back(key + " " + shape_text(shape) + " for " + shape_text(target.sizes()));
    else
      found.emplace_back(name, target);
  }
  // PEFT may store an adapted embedding's base weight beside the adapter; it is not the adapter's.
  std::vector<std::string> unexpected;
  for (const auto& name : rest)
    if (!name.ends_with(".base_layer.weight")) unexpected.push_back(name);
  std::string report;
  list(report, "missing", missing);
  list(report, "unexpected", unexpected);
  list(report, "mis-shaped", shapes);
  GRAFT_CHECK(report.empty(), "adapter", "the file must hold exactly the adapter's tensors; got ",
              report, " (file '", file.path().string(), "')");
  return found;
}

io::AdapterTensors open_weights(const std::filesystem::path& folder,
                                const adapters::Recipe& recipe) {
  return io::AdapterTensors::open(folder, adapters::find_method(recipe.method()));
}

// Where an adapter's own files leave the shared tensors out, its seed stands for them: a file may
// hold them, and then the very same ones.
void check_follows_from_seed(const at::Tensor& in_file, const at::Tensor& ours,
                             const std::string& name, const io::AdapterTensors& file) {
  GRAFT_CHECK(at::equal(in_file.to(ours.options()), ours), "adapter",
              "with save_projection=false shared tensors must be those of projection_prng_key; got "
              "others in ",
              name, " (file '", file.path().string(), "')");
}

// What a method demands of its own tensors in the file, beyond their shapes.
void check_by_methods(const AttachedAdapter::State& state, const io::AdapterTensors& file) {
  for (const auto& layer : state.layers) {
    const auto* checks = dynamic_cast<const nn::ChecksFileTensors*>(layer.adapter.get());
    if (checks == nullptr) continue;
    for (const auto& [suffix, tensor] : layer.adapter->file_tensors()) {
      const std::string key = path_of(state, layer) + "." + suffix;
      if (file.contains(key)) checks->check_file_tensor(suffix, file.tensor(key));
    }
  }
}

// `trained_only`: the folder leaves out what is found again from the base weight.
void load_values(AttachedAdapter::State& state, const adapters::Recipe& theirs,
                 const std::filesystem::path& folder, bool trained_only) {
  const at::NoGradGuard no_grad;
  const io::AdapterTensors file = open_weights(folder, theirs);
  const NamedTensors shared = shared_tensors(state);
  const SharedInFile in_file = find_shared(state, shared, file);
  const LayerTensors of_layers = layer_tensors(state, trained_only);
  NamedTensors wanted = own_tensors(state, of_layers);
  if (stores_shared(theirs) || !in_file.names.empty())
    wanted.insert(wanted.end(), shared.begin(), shared.end());
  else if (!shared.empty())  // they follow from the options
    check_same_options(theirs, *state.recipe, folder);
  const NamedTensors found = match_file(wanted, in_file, file);
  const bool seed_rules = !stores_shared(*state.recipe);
  std::set<const void*> is_shared;
  for (const auto& item : shared) is_shared.insert(item.second.unsafeGetTensorImpl());
  const auto fixed = [&](const at::Tensor& target) {
    return seed_rules && is_shared.count(target.unsafeGetTensorImpl()) > 0;
  };
  for (const auto& [name, target] : found) {
    const at::Tensor values = file.tensor(name);
    GRAFT_CHECK((at::isFloatingType(values.scalar_type()) ||
                 values.scalar_type() == target.scalar_type()) &&
                    at::isfinite(values.to(at::kFloat)).all().item<bool>(),
                "adapter", "every tensor must hold finite numbers; got ", name, " of type ",
                values.scalar_type(), " (file '", file.path().string(), "')");
    if (fixed(target)) check_follows_from_seed(values, target, name, file);
  }
  check_by_methods(state, file);
  for (const auto& [name, target] : found)
    if (!fixed(target)) at::Tensor(target).copy_(file.tensor(name));
  if (!trained_only)
    for (size_t i = 0; i < state.layers.size(); ++i)
      state.layers[i].adapter->take_file_tensors(of_layers[i]);
  state.remember_versions();
}

}  // namespace

void AttachedAdapter::save(const std::filesystem::path& folder,
                           const std::string& base_model) const {
  const auto& state = *state_;
  GRAFT_CHECK(!state.detached, "attach", "a detached adapter cannot be saved; got '", name(), "'");
  const bool some_ran = std::any_of(state.slots.begin(), state.slots.end(),
                                    [](const auto& s) { return s->runs > 0; });
  if (some_ran || state.changed_since_remembered()) check_used();

  NamedTensors tensors = own_tensors(state, layer_tensors(state));
  if (stores_shared(*state.recipe))
    for (auto& item : shared_tensors(state)) tensors.push_back(std::move(item));
  for (auto& [key, tensor] : tensors) {
    GRAFT_CHECK(at::isfinite(tensor).all().item<bool>(), "adapter",
                "a saved tensor must be finite; got NaN or infinity in ", key);
    tensor = tensor.detach();
  }
  io::AdapterConfig config{state.recipe, state.options, base_model, "CAUSAL_LM"};
  if (subtracts(*state.recipe)) {
    config = io::plain_lora_config(config, plain_layers(config, state));
  } else {
    config.attach.rank_pattern = order_free(state.options.rank_pattern, state.layers);
    config.attach.alpha_pattern = order_free(state.options.alpha_pattern, state.layers);
  }
  if (state.options.targets.kind != nn::Selector::Kind::pattern)
    config.attach.targets = nn::Selector(target_list(state));
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  GRAFT_CHECK(!error, "adapter", "the output folder must be writable; got '", folder.string(),
              "': ", error.message());
  io::write_safetensors(folder / kWeights, tensors);
  io::write_text_file(folder / "adapter_config.json", io::write_adapter_config(config));
}

void AttachedAdapter::load(const std::filesystem::path& folder, bool same_options) {
  GRAFT_CHECK(!is_merged(), "attach",
              "values cannot be loaded into merged adapters; unmerge first");
  const io::AdapterConfig config = io::read_adapter_config(folder);
  // A folder of another writer that names such a start holds A and B alone.
  const bool trained_only = subtracts(*config.recipe);
  GRAFT_CHECK(!trained_only ||
                  config.recipe->start_plan().kind.name == state_->recipe->start_plan().kind.name,
              "adapter", "a folder that starts from ", config.recipe->start_plan().kind.name,
              " fits an adapter that does so too; got ", state_->recipe->start_plan().kind.name,
              " (folder '", folder.string(), "')");
  const bool plain = !trained_only && subtracts(*state_->recipe);
  if (same_options && plain)
    check_same_scale(config, *state_, folder);
  else if (same_options)
    check_same_options(*config.recipe, *state_->recipe, folder);
  load_values(*state_, *config.recipe, folder, trained_only);
}

AttachedAdapter attach_from(torch::nn::Module& model, const std::filesystem::path& folder,
                            const std::string& name, uint64_t seed) {
  io::AdapterConfig config = io::read_adapter_config(folder);
  open_weights(folder, *config.recipe);
  config.attach.name = name;
  config.attach.seed = seed;
  // Values are about to be loaded; only what they were made from has to be found again.
  const init::Kind start = config.recipe->start_plan().kind;
  GRAFT_CHECK(!start.subtracts || start.is_reproducible(), "adapter", "a start by ", start.name,
              " cannot be found again from the base weight; convert the folder with its values "
              "before training: adapter convert --start FOLDER (folder '",
              folder.string(), "')");
  config.attach.initialise = start.subtracts;
  config.recipe = adapters::found_again_as_peft(config.recipe);
  AttachedAdapter adapter = attach(model, config.recipe, config.attach);
  try {
    adapter.load(folder);
  } catch (...) {
    adapter.detach();
    throw;
  }
  return adapter;
}

}  // namespace graft
