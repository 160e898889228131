#include <graft/core/error.h>
#include <graft/io/adapter_config.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

namespace graft::io {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr const char* kArea = "adapter config";

// Takes fields out of a config; what is left at the end was not understood.
class Fields {
 public:
  Fields(json& config, std::string place) : config_(config), place_(std::move(place)) {}

  // The field's value, or null when it is missing; the field is gone afterwards.
  json take(const char* key) {
    const auto it = config_.find(key);
    if (it == config_.end()) return nullptr;
    json value = std::move(*it);
    config_.erase(it);
    return value;
  }

  std::string text(const char* key, std::string fallback = "") {
    const json value = take(key);
    if (value.is_null()) return fallback;
    if (!value.is_string()) refuse(key, "must be a string", value);
    return value.get<std::string>();
  }

  std::vector<std::string> texts(const char* key) { return texts_of(key, take(key)); }

  std::vector<std::string> texts_of(const char* key, const json& value) {
    if (value.is_null()) return {};
    if (value.is_string()) return {value.get<std::string>()};
    const bool strings =
        value.is_array() &&
        std::all_of(value.begin(), value.end(), [](const json& v) { return v.is_string(); });
    if (!strings) refuse(key, "must be a string or a list of strings", value);
    return value.get<std::vector<std::string>>();
  }

  std::vector<int64_t> numbers(const char* key) {
    const json value = take(key);
    if (value.is_null()) return {};
    if (value.is_number_integer()) return {value.get<int64_t>()};
    const bool integers =
        value.is_array() && std::all_of(value.begin(), value.end(),
                                        [](const json& v) { return v.is_number_integer(); });
    if (!integers) refuse(key, "must be a whole number or a list of them", value);
    return value.get<std::vector<int64_t>>();
  }

  [[noreturn]] void refuse(const char* key, const char* rule, const json& value) {
    fail(kArea, concat("field '", key, "' ", rule, "; got ", value.dump(), " (", place_, ")"));
  }

  const std::string& place() const { return place_; }

 private:
  json& config_;
  std::string place_;
};

// A pruned layer of an AdaLoRA folder: "layers.0.q_proj.lora_E" and which of its triplets are left.
bool is_pruned_layer(const std::string& key, const ordered_json& value) {
  return key.ends_with(".lora_E") && value.is_array() &&
         std::all_of(value.begin(), value.end(), [](const auto& v) { return v.is_boolean(); });
}

// Patterns keep the file's order: the first match wins.
template <class T>
nn::LayerPattern<T> read_pattern(const ordered_json& config, const char* key, Fields& fields) {
  nn::LayerPattern<T> pattern;
  const auto it = config.find(key);
  fields.take(key);
  if (it == config.end() || it->is_null()) return pattern;
  if (!it->is_object()) fields.refuse(key, "must be an object of numbers", json::parse(it->dump()));
  for (const auto& [name, value] : it->items()) {
    if (std::is_integral_v<T> && is_pruned_layer(name, value)) {
      pattern.emplace_back(nn::exact_pattern_key(name.substr(0, name.rfind('.'))),
                           std::count(value.begin(), value.end(), true));
      continue;
    }
    if (!value.is_number())
      fields.refuse(key, "must be an object of numbers", json::parse(it->dump()));
    pattern.emplace_back(name, value.template get<T>());
  }
  return pattern;
}

nn::Selector read_targets(Fields& fields) {
  nn::Selector selector;
  const json targets = fields.take("target_modules");
  if (targets.is_string()) {
    std::string text = targets.get<std::string>(), lower = text;
    std::transform(lower.begin(), lower.end(), lower.begin(),
                   [](unsigned char c) { return std::tolower(c); });
    selector = lower == "all-linear" ? nn::Selector::all_linear() : nn::Selector::regex(text);
  } else {
    selector.names = fields.texts_of("target_modules", targets);
    GRAFT_CHECK(!selector.names.empty(), kArea, "field 'target_modules' must name the layers; got ",
                targets.dump(), " (", fields.place(), ")");
  }
  const json exclude = fields.take("exclude_modules");
  if (exclude.is_string())
    selector.exclude_pattern = exclude.get<std::string>();
  else
    selector.exclude = fields.texts_of("exclude_modules", exclude);
  selector.layers = fields.numbers("layers_to_transform");
  selector.layers_pattern = fields.texts("layers_pattern");
  selector.every_name_must_match = false;
  return selector;
}

TrainedBias read_bias(Fields& fields) {
  const std::string bias = fields.text("bias", "none");
  if (bias == "none") return TrainedBias::none;
  if (bias == "all") return TrainedBias::all;
  // lora_only, vera_only, randlora_only: PEFT names the method.
  if (bias.ends_with("_only")) return TrainedBias::adapted_layers;
  fields.refuse("bias", "must be none, all or lora_only", bias);
}

std::string bias_name(TrainedBias bias, const std::string& peft_type) {
  if (bias == TrainedBias::none) return "none";
  if (bias == TrainedBias::all) return "all";
  return peft_type == "VERA"       ? "vera_only"
         : peft_type == "RANDLORA" ? "randlora_only"
                                   : "lora_only";
}

bool neutral(const json& value) {
  return value.is_null() || value == false ||
         ((value.is_object() || value.is_array()) && value.empty());
}

void refuse_unknown(const json& config, const std::string& place) {
  std::string unknown;
  for (const auto& [key, value] : config.items())
    if (!neutral(value)) unknown += (unknown.empty() ? "" : ", ") + key + "=" + value.dump();
  GRAFT_CHECK(unknown.empty(), kArea, "every option must be known or neutral; got ", unknown, " (",
              place, ")");
}

json pattern_json(const auto& pattern) {
  json object = json::object();
  for (const auto& [key, value] : pattern) object[key] = value;
  return object;
}

json list_or_null(const auto& list) {
  return list.empty() ? json(nullptr) : json(list);
}

}  // namespace

AdapterConfig read_adapter_config(const std::filesystem::path& file_or_folder) {
  std::filesystem::path path = file_or_folder;
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) path /= "adapter_config.json";
  const std::string place = "file '" + path.string() + "'";
  std::ifstream stream(path, std::ios::binary);
  GRAFT_CHECK(stream && std::filesystem::is_regular_file(path, ignored), kArea,
              "the file must exist and be readable; got ", path.string());
  std::stringstream text;
  text << stream.rdbuf();
  ordered_json ordered;
  try {
    ordered = ordered_json::parse(text.str());
  } catch (const json::exception& error) {
    fail(kArea, concat("the file must be JSON; got ", error.what(), " (", place, ")"));
  }
  GRAFT_CHECK(ordered.is_object(), kArea, "the file must hold an object; got ", ordered.type_name(),
              " (", place, ")");

  json config = json::parse(ordered.dump());
  const auto& method = adapters::method_of_config(config);
  if (method.modern_config) method.modern_config(config);
  Fields fields(config, place);
  AdapterConfig result;
  // First, since a method may know its layers from its own fields (X-LoRA, by its adapters).
  result.recipe = method.read_config(config);
  result.recipe->validate();
  result.attach.targets = read_targets(fields);
  result.attach.rank_pattern = read_pattern<int64_t>(ordered, "rank_pattern", fields);
  result.attach.alpha_pattern = read_pattern<double>(ordered, "alpha_pattern", fields);
  result.attach.modules_to_save = fields.texts("modules_to_save");
  result.attach.bias = read_bias(fields);
  result.base_model = fields.text("base_model_name_or_path");
  result.task_type = fields.text("task_type");
  for (const char* remark : {"peft_type", "peft_version", "auto_mapping", "revision",
                             "inference_mode", "runtime_config"})
    fields.take(remark);
  refuse_unknown(config, place);
  return result;
}

std::string write_adapter_config(const AdapterConfig& config) {
  const auto& attach = config.attach;
  const std::string& type = adapters::find_method(config.recipe->method()).peft_type;
  json out = {{"peft_type", type},
              {"base_model_name_or_path",
               config.base_model.empty() ? json(nullptr) : json(config.base_model)},
              {"task_type", config.task_type.empty() ? json(nullptr) : json(config.task_type)},
              {"auto_mapping", nullptr},
              {"revision", nullptr},
              {"inference_mode", true},
              {"bias", bias_name(attach.bias, type)},
              {"modules_to_save", list_or_null(attach.modules_to_save)},
              {"rank_pattern", pattern_json(attach.rank_pattern)},
              {"alpha_pattern", pattern_json(attach.alpha_pattern)},
              {"layers_to_transform", list_or_null(attach.targets.layers)},
              {"layers_pattern", list_or_null(attach.targets.layers_pattern)}};
  const auto& targets = attach.targets;
  if (targets.kind == nn::Selector::Kind::list)
    out["target_modules"] = targets.names;
  else
    out["target_modules"] =
        targets.kind == nn::Selector::Kind::pattern ? targets.pattern : "all-linear";
  out["exclude_modules"] = targets.exclude_pattern.empty() ? list_or_null(targets.exclude)
                                                           : json(targets.exclude_pattern);
  config.recipe->write_config(out);
  return out.dump(2) + "\n";
}

}  // namespace graft::io
