// Looks into adapter folders, compares, converts and merges them.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <graft/core/error.h>
#include <graft/io/adapter_config.h>
#include <graft/io/adapter_tensors.h>
#include <graft/io/atomic_file.h>
#include <graft/io/convert_adapter.h>
#include <graft/io/pickled_tensors.h>

#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "examples/trainer/program.h"

namespace {

using namespace graft;
using nlohmann::ordered_json;
namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "base_model.model.";

// An adapter folder, read and checked but put on no model.
struct Folder {
  io::AdapterConfig config;
  io::AdapterTensors weights;
  nlohmann::json options;  // the method's fields

  explicit Folder(const std::string& path)
      : config(io::read_adapter_config(path)), weights(io::AdapterTensors::open(path, method())) {
    config.recipe->write_config(options);
    options["method"] = std::string(config.recipe->method());
  }

  const adapters::MethodEntry& method() const {
    return adapters::find_method(config.recipe->method());
  }

  // "model.layers.0.q_proj" of "base_model.model.model.layers.0.q_proj.lora_A.weight".
  std::string layer_of(std::string key) const {
    if (method().layer_of_key) return method().layer_of_key(key);
    if (key.starts_with(kPrefix)) key.erase(0, kPrefix.size());
    for (const std::string& part : {"." + method().tensor_prefix, std::string(".base_layer.")})
      if (const size_t at = key.find(part); at != std::string::npos) return key.substr(0, at);
    return key.substr(0, key.rfind('.'));
  }
};

int info(const std::string& path, bool json) {
  const Folder folder(path);
  int64_t parameters = 0, bytes = 0;
  std::map<std::string, int64_t> kinds;  // last component of a layer's name -> how many
  std::set<std::string> layers;
  for (const auto& name : folder.weights.names()) {
    const at::Tensor& tensor = folder.weights.tensor(name);
    parameters += tensor.numel();
    bytes += static_cast<int64_t>(tensor.nbytes());
    if (folder.method().layer_of_key || name.starts_with(kPrefix))
      layers.insert(folder.layer_of(name));
  }
  for (const auto& layer : layers) ++kinds[layer.substr(layer.rfind('.') + 1)];
  if (json) {
    std::cout << ordered_json{{"method", folder.config.recipe->method()},
                              {"layers", layers.size()},
                              {"parameters", parameters},
                              {"bytes", bytes},
                              {"base_model", folder.config.base_model},
                              {"options", folder.options}}
                     .dump()
              << std::endl;
    return 0;
  }
  std::cout << fmt::format("method      {} ({})\n", folder.config.recipe->method(),
                           folder.config.recipe->describe());
  if (!folder.config.base_model.empty())
    std::cout << "base model  " << folder.config.base_model << "\n";
  std::cout << fmt::format("layers      {}\n", layers.size());
  for (const auto& [name, count] : kinds) std::cout << fmt::format("  {:<12} {}\n", name, count);
  std::cout << fmt::format("parameters  {}\nbytes       {}\noptions\n", parameters, bytes);
  for (const auto& [key, value] : folder.options.items())
    std::cout << fmt::format("  {:<18} {}\n", key, value.dump());
  return 0;
}

int merge(const trainer::CommonOptions& common, const std::string& output) {
  trainer::apply_common(common);
  models::LoadedModel model = models::load(common.model, trainer::compute_dtype(common));
  auto adapter = trainer::attach_adapters(*model.decoder, common);
  adapter->merge();
  models::save_hf_folder(*model.decoder, common.model, output);
  if (common.json)
    std::cout << ordered_json{{"output", output}, {"layers", adapter->layers().size()}}.dump()
              << std::endl;
  else if (!common.quiet)
    std::cout << fmt::format("merged {} layers into {}", adapter->layers().size(), output)
              << std::endl;
  return 0;
}

// Largest absolute difference by layer, over the tensors that both have.
std::map<std::string, double> differences(const Folder& a, const Folder& b,
                                          std::vector<std::string>& shapes) {
  std::map<std::string, double> largest;
  for (const auto& name : a.weights.names()) {
    if (!b.weights.contains(name)) continue;
    if (a.weights.tensor(name).sizes() != b.weights.tensor(name).sizes()) {
      shapes.push_back(name);
      continue;
    }
    const at::Tensor x = a.weights.tensor(name).to(at::kDouble),
                     y = b.weights.tensor(name).to(at::kDouble);
    const double difference = x.numel() == 0 ? 0.0 : (x - y).abs().max().item<double>();
    double& entry = largest[a.layer_of(name)];
    entry = std::max(entry, difference);
  }
  return largest;
}

int diff(const std::string& path_a, const std::string& path_b, bool json) {
  const Folder a(path_a), b(path_b);
  ordered_json options = ordered_json::object();
  std::set<std::string> keys;
  for (const auto* folder : {&a, &b})
    for (const auto& [key, value] : folder->options.items()) keys.insert(key);
  for (const auto& key : keys) {
    const auto x = a.options.value(key, nlohmann::json()),
               y = b.options.value(key, nlohmann::json());
    if (x != y) options[key] = {x, y};
  }
  std::set<std::string> in_a, in_b;
  for (const auto& name : a.weights.names()) in_a.insert(a.layer_of(name));
  for (const auto& name : b.weights.names()) in_b.insert(b.layer_of(name));
  std::vector<std::string> missing, extra, shapes;
  std::set_difference(in_a.begin(), in_a.end(), in_b.begin(), in_b.end(),
                      std::back_inserter(missing));
  std::set_difference(in_b.begin(), in_b.end(), in_a.begin(), in_a.end(),
                      std::back_inserter(extra));
  const auto largest = differences(a, b, shapes);
  if (json) {
    std::cout << ordered_json{{"options", options},
                              {"missing_layers", missing},
                              {"extra_layers", extra},
                              {"shape_mismatches", shapes},
                              {"largest_difference", largest}}
                     .dump()
              << std::endl;
    return 0;
  }
  for (const auto& [key, values] : options.items())
    std::cout << fmt::format("option   {}: {} | {}\n", key, values[0].dump(), values[1].dump());
  for (const auto& name : missing) std::cout << "missing  " << name << "\n";
  for (const auto& name : extra) std::cout << "extra    " << name << "\n";
  for (const auto& name : shapes) std::cout << "shape    " << name << "\n";
  for (const auto& [name, value] : largest) std::cout << fmt::format("{:<10.3e} {}\n", value, name);
  std::cout << std::flush;
  return 0;
}

// The folder as the mixlora package and MoE-PEFT read it: a pickled dict beside the configuration.
int convert_to_moe_peft(const std::string& path, const std::string& output, bool json) {
  const Folder folder(path);
  GRAFT_CHECK(folder.method().peft_type == "MIXLORA", "convert",
              "MoE-PEFT's form holds mixtures (mixlora); got ", folder.method().name, " (folder '",
              path, "')");
  std::error_code error;
  GRAFT_CHECK(!fs::equivalent(path, output, error), "convert",
              "the output folder must be another than the input; got '", output, "'");
  fs::create_directories(output, error);
  GRAFT_CHECK(!error, "convert", "the output folder must be writable; got '", output,
              "': ", error.message());
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& name : folder.weights.names())
    tensors.emplace_back(name, folder.weights.tensor(name));
  io::write_pickled_tensors(fs::path(output) / "adapter_model.bin", tensors);
  io::write_text_file(fs::path(output) / "adapter_config.json",
                      io::write_adapter_config(folder.config));
  if (json)
    std::cout << ordered_json{{"output", output}, {"tensors", tensors.size()}}.dump() << std::endl;
  else
    std::cout << fmt::format("adapter_model.bin in {}: {} tensors", output, tensors.size())
              << std::endl;
  return 0;
}

int convert(const std::string& folder, const std::string& output, const io::ConvertOptions& options,
            bool json) {
  const io::Conversion done = io::convert_to_lora(folder, output, options);
  if (json)
    std::cout << ordered_json{{"output", output},
                              {"layers", done.layers},
                              {"dropped_layers", done.dropped},
                              {"largest_rank", done.largest_rank},
                              {"parameters", done.parameters}}
                     .dump()
              << std::endl;
  else
    std::cout << fmt::format(
                     "plain LoRA in {}: {} layers, ranks up to {}, {} parameters; {} layers had no "
                     "update left",
                     output, done.layers, done.largest_rank, done.parameters, done.dropped)
              << std::endl;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{
      "Looks into adapter folders, compares, converts and merges them.\n\n"
      "Example: adapter merge --model folder --adapter out --output merged",
      "adapter"};
  app.require_subcommand(1);
  bool json = false;
  std::string first, second, output;
  trainer::CommonOptions common;
  auto* info_command =
      app.add_subcommand("info", "method, layers, parameters, bytes and options of a folder");
  info_command->add_option("folder", first, "adapter folder")->required();
  info_command->add_flag("--json", json, "machine-readable result on stdout");
  auto* merge_command =
      app.add_subcommand("merge", "write the adapted model as a plain Hugging Face folder");
  trainer::add_common_flags(*merge_command, common, /*adapter=*/true);
  merge_command->get_option("--adapter")->required();
  merge_command->add_option("--output", output, "folder to write")->required();
  auto* diff_command =
      app.add_subcommand("diff", "options, missing and extra layers, largest difference by layer");
  diff_command->add_option("a", first, "adapter folder")->required();
  diff_command->add_option("b", second, "adapter folder")->required();
  diff_command->add_flag("--json", json, "machine-readable result on stdout");

  int64_t rank = 0;
  std::string to, base, start;
  const auto add_conversion = [&](const char* name, const char* text) {
    auto* command = app.add_subcommand(name, text);
    command->add_option("folder", first, "adapter folder")->required();
    command->add_option("output", output, "folder to write")->required();
    command->add_flag("--json", json, "machine-readable result on stdout");
    return command;
  };
  auto* convert_command = add_conversion(
      "convert", "write the plain LoRA folder with the same update, or mixlora's for MoE-PEFT");
  convert_command
      ->add_option("--to", to, "lora, or moe-peft: an adapter_model.bin of a mixlora folder")
      ->required()
      ->check(CLI::IsMember({"lora", "moe-peft"}));
  convert_command->add_option("--model", base,
                              "the model's folder, for VeRA (its files lack a layer's input size) "
                              "and for PEFT folders that start from the weight (pissa, olora)");
  convert_command->add_option("--start", start,
                              "the folder's values before training, for PEFT folders whose start "
                              "cannot be found again (lora_ga, corda, pissa_niter_N)");
  auto* truncate_command =
      add_conversion("truncate", "cut a DyLoRA adapter to a rank and write it as plain LoRA");
  truncate_command->add_option("--rank", rank, "the leading units to keep")
      ->required()
      ->check(CLI::PositiveNumber);
  auto* prune_command = add_conversion(
      "prune", "leave out the units that training switched off (SoRA, AdaLoRA); plain LoRA");

  return trainer::run_program(app, argc, argv, [&] {
    if (to == "moe-peft") return convert_to_moe_peft(first, output, json);
    for (const auto* command : {convert_command, truncate_command, prune_command})
      if (command->parsed()) return convert(first, output, {rank, base, start}, json);
    if (info_command->parsed()) return info(first, json);
    if (merge_command->parsed()) return merge(common, output);
    return diff(first, second, json);
  });
}
