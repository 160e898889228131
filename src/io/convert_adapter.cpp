#include <ATen/ATen.h>
#include <graft/adapters/lora.h>
#include <graft/core/error.h>
#include <graft/io/adapter_config.h>
#include <graft/io/adapter_tensors.h>
#include <graft/io/atomic_file.h>
#include <graft/io/convert_adapter.h>
#include <graft/io/safetensors.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

namespace graft::io {
namespace {

namespace fs = std::filesystem;
using adapters::MethodEntry;
using adapters::PlainLora;
using adapters::StoredLayer;

constexpr const char* kPrefix = "base_model.model.";
constexpr const char* kWeights = "adapter_model.safetensors";

// The tensors of a folder by layer; what belongs to no adapted layer stays apart.
struct Stored {
  std::map<std::string, StoredLayer> layers;
  StoredLayer shared;                                    // once for all layers, whole keys
  std::vector<std::pair<std::string, at::Tensor>> rest;  // biases, modules_to_save
};

Stored read_layers(const AdapterTensors& file, const std::string& prefix) {
  Stored stored;
  for (const auto& key : file.names()) {
    const at::Tensor tensor = file.tensor(key);
    if (!key.starts_with(kPrefix)) {
      stored.shared[key] = tensor;
      continue;
    }
    const std::string name = key.substr(std::string(kPrefix).size());
    const size_t at = name.find("." + prefix);
    if (at == std::string::npos)
      stored.rest.emplace_back(key, tensor);
    else
      stored.layers[name.substr(0, at)][name.substr(at + 1)] = tensor;
  }
  for (auto& [name, layer] : stored.layers)
    for (const auto& [key, tensor] : stored.shared) layer[key] = tensor;
  return stored;
}

void add_base(const Checkpoint& base, bool weights, Stored& stored) {
  for (auto& [name, layer] : stored.layers) {
    const auto& shape = base.info(name + ".weight").shape;
    GRAFT_CHECK(shape.size() >= 2, "convert", "an adapted layer's weight must be a matrix; got ",
                shape.size(), " dimensions (layer '", name, "')");
    layer["in_features"] = at::scalar_tensor(shape[1], at::kLong);
    if (weights) layer["base_weight"] = base.tensor(name + ".weight");
  }
}

// The factors before training, as "start_A" and "start_B".
void add_starts(const fs::path& folder, const MethodEntry& entry, Stored& stored) {
  const Stored before = read_layers(AdapterTensors::open(folder, entry), entry.tensor_prefix);
  for (auto& [name, layer] : stored.layers) {
    const auto it = before.layers.find(name);
    GRAFT_CHECK(it != before.layers.end(), "convert",
                "the folder of values before training must hold every layer; got none for '", name,
                "' (folder '", folder.string(), "')");
    for (const auto& [suffix, tensor] : it->second) layer["start:" + suffix] = tensor;
  }
}

// The recipe with this layer's own rank and alpha.
std::shared_ptr<const adapters::Recipe> recipe_of(const AdapterConfig& config,
                                                  const MethodEntry& entry,
                                                  const std::string& layer) {
  const auto rank = nn::find_pattern(config.attach.rank_pattern, layer);
  const auto alpha = nn::find_pattern(config.attach.alpha_pattern, layer);
  if (!rank && !alpha) return config.recipe;
  nlohmann::json fields = nlohmann::json::object();
  config.recipe->write_config(fields);
  if (rank) fields[entry.keys.rank] = *rank;
  if (alpha) fields[entry.keys.alpha] = *alpha;
  return entry.read_config(fields);
}

}  // namespace

PlainLora plain_lora(const AdapterConfig& config, const std::string& name,
                     const StoredLayer& stored, int64_t rank) {
  const MethodEntry& entry = adapters::find_method(config.recipe->method());
  GRAFT_CHECK(entry.to_lora != nullptr, "convert", "the method must have a plain LoRA form; got ",
              entry.name);
  try {
    return entry.to_lora(*recipe_of(config, entry, name), stored, rank);
  } catch (const std::out_of_range&) {
    fail("convert", concat("the file must hold all tensors of a layer; got some missing (layer '",
                           name, "')"));
  }
}

AdapterConfig plain_lora_config(const AdapterConfig& config,
                                const std::map<std::string, PlainLora>& layers) {
  std::map<std::pair<int64_t, double>, int64_t> counts;
  const auto shape_of = [](const PlainLora& lora) {
    const int64_t rank = lora.A.size(0);
    return std::pair(rank, lora.scale * static_cast<double>(rank));
  };
  for (const auto& [name, lora] : layers) ++counts[shape_of(lora)];
  auto common = counts.begin();
  for (auto it = counts.begin(); it != counts.end(); ++it)
    if (it->second > common->second) common = it;
  const auto [rank, alpha] = common->first;

  AdapterConfig out = config;
  out.recipe = adapters::make_recipe(adapters::LoraOptions{.rank = rank, .alpha = alpha});
  out.attach.rank_pattern.clear();
  out.attach.alpha_pattern.clear();
  std::vector<std::string> names;
  for (const auto& [name, lora] : layers) {
    names.push_back(name);
    const auto [own_rank, own_alpha] = shape_of(lora);
    const std::string key = nn::exact_pattern_key(name);
    if (own_rank != rank) out.attach.rank_pattern.emplace_back(key, own_rank);
    if (own_alpha != alpha) out.attach.alpha_pattern.emplace_back(key, own_alpha);
  }
  out.attach.targets = nn::Selector(std::move(names));
  return out;
}

std::map<std::string, PlainLora> read_plain_lora(const fs::path& folder) {
  const AdapterConfig config = read_adapter_config(folder);
  const MethodEntry& entry = adapters::find_method(config.recipe->method());
  const Stored stored = read_layers(AdapterTensors::open(folder, entry), entry.tensor_prefix);
  GRAFT_CHECK(stored.rest.empty(), "convert",
              "a folder must train nothing besides the adapted layers; got ",
              stored.rest.front().first, " (folder '", folder.string(), "')");
  std::map<std::string, PlainLora> layers;
  for (const auto& [name, layer] : stored.layers)
    layers.emplace(name, plain_lora(config, name, layer));
  return layers;
}

Conversion convert_to_lora(const fs::path& folder, const fs::path& output,
                           const ConvertOptions& options) {
  const int64_t rank = options.rank;
  const AdapterConfig config = read_adapter_config(folder);
  const MethodEntry& entry = adapters::find_method(config.recipe->method());
  GRAFT_CHECK(entry.to_lora != nullptr, "convert", "the method must have a plain LoRA form; got ",
              entry.name, " (folder '", folder.string(), "')");
  const bool subtracts = config.recipe->start_plan().kind.subtracts;
  GRAFT_CHECK(subtracts || entry.name != "lora", "convert",
              "the folder is plain LoRA already; got '", folder.string(), "'");
  GRAFT_CHECK(rank >= 0, "convert", "rank must be at least 1; got ", rank);
  GRAFT_CHECK(rank == 0 || entry.ranks_nest, "convert",
              "only a method whose ranks nest (dylora) can be cut to a rank; got ", entry.name,
              " (folder '", folder.string(), "')");
  std::error_code error;
  GRAFT_CHECK(!fs::equivalent(folder, output, error), "convert",
              "the output folder must be another than the input; got '", output.string(), "'");

  const AdapterTensors file = AdapterTensors::open(folder, entry);
  Stored stored = read_layers(file, entry.tensor_prefix);
  if (!options.base.empty()) add_base(Checkpoint::open(options.base), subtracts, stored);
  if (!options.start.empty()) add_starts(options.start, entry, stored);
  std::map<std::string, PlainLora> layers;
  Conversion done;
  for (const auto& [name, layer] : stored.layers) {
    PlainLora lora = plain_lora(config, name, layer, rank);
    if (lora.A.size(0) == 0) {
      ++done.dropped;
      continue;
    }
    done.largest_rank = std::max(done.largest_rank, lora.A.size(0));
    done.parameters += lora.A.numel() + lora.B.numel();
    layers.emplace(name, std::move(lora));
  }
  GRAFT_CHECK(!layers.empty(), "convert", "some layer must have an update left; got none of ",
              stored.layers.size(), " (folder '", folder.string(), "')");
  done.layers = static_cast<int64_t>(layers.size());

  auto tensors = stored.rest;
  for (const auto& [name, lora] : layers) {
    const bool embedding = stored.layers.at(name).count("lora_embedding_A") > 0;
    const std::string key = kPrefix + name + (embedding ? ".lora_embedding_" : ".lora_"),
                      end = embedding ? "" : ".weight";
    tensors.emplace_back(key + "A" + end, lora.A.contiguous());
    tensors.emplace_back(key + "B" + end, lora.B.contiguous());
  }
  fs::create_directories(output, error);
  GRAFT_CHECK(!error, "convert", "the output folder must be writable; got '", output.string(),
              "': ", error.message());
  write_safetensors(output / kWeights, tensors);
  write_text_file(output / "adapter_config.json",
                  write_adapter_config(plain_lora_config(config, layers)));
  return done;
}

}  // namespace graft::io
