#include "examples/models/decoder_config.h"

#include <graft/core/error.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

namespace graft::models {
namespace {

using nlohmann::json;

constexpr const char* kArea = "model config";

// Typed access to one JSON object; every error names the field and the file.
class Reader {
 public:
  Reader(const json& object, std::string place) : object_(object), place_(std::move(place)) {}

  bool has(const char* key) const { return object_.contains(key) && !object_.at(key).is_null(); }

  int64_t integer(const char* key, std::optional<int64_t> fallback = std::nullopt) const {
    if (!has(key)) return require(key, fallback);
    if (!object_.at(key).is_number_integer()) refuse(key, "must be a whole number");
    return object_.at(key).get<int64_t>();
  }
  double number(const char* key, std::optional<double> fallback = std::nullopt) const {
    if (!has(key)) return require(key, fallback);
    if (!object_.at(key).is_number()) refuse(key, "must be a number");
    return object_.at(key).get<double>();
  }
  bool boolean(const char* key, bool fallback) const {
    if (!has(key)) return fallback;
    if (!object_.at(key).is_boolean()) refuse(key, "must be true or false");
    return object_.at(key).get<bool>();
  }
  std::string text(const char* key, std::optional<std::string> fallback = std::nullopt) const {
    if (!has(key)) return require(key, fallback);
    if (!object_.at(key).is_string()) refuse(key, "must be a string");
    return object_.at(key).get<std::string>();
  }
  const json* object(const char* key) const {
    if (!has(key)) return nullptr;
    if (!object_.at(key).is_object()) refuse(key, "must be an object");
    return &object_.at(key);
  }
  std::vector<int32_t> ids(const char* key) const {
    if (!has(key)) return {};
    const json& value = object_.at(key);
    std::vector<int32_t> found;
    for (const json& id : value.is_array() ? value : json::array({value})) {
      if (!id.is_number_integer()) refuse(key, "must be a token id or a list of them");
      found.push_back(id.get<int32_t>());
    }
    return found;
  }
  [[noreturn]] void refuse(const char* key, const char* rule) const {
    fail(kArea, concat("field '", key, "' ", rule, "; got ",
                       has(key) ? object_.at(key).dump() : "nothing", " (", place_, ")"));
  }

 private:
  template <class T>
  T require(const char* key, const std::optional<T>& fallback) const {
    if (!fallback) refuse(key, "must be given");
    return *fallback;
  }

  const json& object_;
  std::string place_;
};

// rope_theta and rope_scaling, or rope_parameters, which holds both in files of transformers 5.
ops::RopeOptions read_rope(const Reader& config, int64_t head_dim, const std::string& place) {
  ops::RopeOptions rope;
  rope.head_dim = head_dim;
  const json* section = config.object("rope_parameters");
  if (section == nullptr) section = config.object("rope_scaling");
  const json empty = json::object();
  const Reader scaling(section ? *section : empty, place);
  rope.theta = config.has("rope_theta") ? config.number("rope_theta")
                                        : scaling.number("rope_theta", 10000.0);
  rope.type =
      scaling.has("rope_type") ? scaling.text("rope_type") : scaling.text("type", "default");
  GRAFT_CHECK(rope.type == "default" || rope.type == "linear" || rope.type == "llama3", kArea,
              "rope type must be default, linear or llama3; got '", rope.type, "' (", place, ")");
  if (rope.type != "default") rope.factor = scaling.number("factor");
  if (rope.type == "llama3") {
    rope.low_freq_factor = scaling.number("low_freq_factor");
    rope.high_freq_factor = scaling.number("high_freq_factor");
    rope.original_max_position_embeddings = scaling.integer("original_max_position_embeddings");
  }
  return rope;
}

}  // namespace

void DecoderConfig::validate(const std::string& place) const {
  const std::pair<const char*, int64_t> sizes[] = {{"vocab_size", vocab_size},
                                                   {"hidden_size", hidden_size},
                                                   {"intermediate_size", intermediate_size},
                                                   {"layers", layers},
                                                   {"heads", heads},
                                                   {"kv_heads", kv_heads},
                                                   {"head_dim", head_dim},
                                                   {"max_positions", max_positions}};
  for (const auto& [name, value] : sizes)
    GRAFT_CHECK(value > 0 && value < (int64_t{1} << 31), kArea, "field '", name,
                "' must be positive; got ", value, " (", place, ")");
  GRAFT_CHECK(heads % kv_heads == 0, kArea, "the key heads must divide the query heads; got ",
              kv_heads, " for ", heads, " (", place, ")");
  GRAFT_CHECK(head_dim % 2 == 0, kArea, "head_dim must be even; got ", head_dim, " (", place, ")");
  GRAFT_CHECK(rms_norm_eps > 0, kArea, "rms_norm_eps must be positive; got ", rms_norm_eps, " (",
              place, ")");
  rope.validate();
}

DecoderConfig read_hf_config(const std::filesystem::path& file) {
  const std::string place = "file '" + file.string() + "'";
  std::ifstream stream(file, std::ios::binary);
  GRAFT_CHECK(static_cast<bool>(stream), kArea,
              "the model folder must hold a readable config.json; got ", file.string());
  std::stringstream text;
  text << stream.rdbuf();
  json object;
  try {
    object = json::parse(text.str());
  } catch (const json::exception& error) {
    fail(kArea, concat("config.json must be JSON; got ", error.what(), " (", place, ")"));
  }
  GRAFT_CHECK(object.is_object(), kArea, "config.json must hold an object; got ",
              object.type_name(), " (", place, ")");
  const Reader reader(object, place);
  const std::string type = reader.text("model_type");
  GRAFT_CHECK(type == "llama" || type == "mistral", kArea,
              "model_type must be llama or mistral; got '", type, "' (", place, ")");
  const std::string activation = reader.text("hidden_act", "silu");
  GRAFT_CHECK(activation == "silu", kArea, "hidden_act must be silu; got '", activation, "' (",
              place, ")");
  GRAFT_CHECK(reader.number("partial_rotary_factor", 1.0) == 1.0, kArea,
              "partial_rotary_factor must be 1 (", place, ")");

  DecoderConfig config;
  config.vocab_size = reader.integer("vocab_size");
  config.hidden_size = reader.integer("hidden_size");
  config.intermediate_size = reader.integer("intermediate_size");
  config.layers = reader.integer("num_hidden_layers");
  config.heads = reader.integer("num_attention_heads");
  GRAFT_CHECK(config.heads > 0, kArea, "field 'num_attention_heads' must be positive; got ",
              config.heads, " (", place, ")");
  config.kv_heads = reader.integer("num_key_value_heads", type == "mistral" ? 8 : config.heads);
  config.head_dim = reader.integer("head_dim", config.hidden_size / config.heads);
  config.rms_norm_eps = reader.number("rms_norm_eps", 1e-6);
  config.tied = reader.boolean("tie_word_embeddings", false);
  config.attention_bias = type == "llama" && reader.boolean("attention_bias", false);
  config.mlp_bias = type == "llama" && reader.boolean("mlp_bias", false);
  config.sliding_window = type == "mistral" ? reader.integer("sliding_window", 0) : 0;
  config.max_positions = reader.integer("max_position_embeddings", 2048);
  config.rope = read_rope(reader, config.head_dim, place);
  config.eos_ids = reader.ids("eos_token_id");
  config.validate(place);
  return config;
}

DecoderConfig read_gguf_config(const io::GgufFile& file) {
  const std::string place = "file '" + file.path().string() + "'";
  const std::string architecture = file.get_string("general.architecture");
  GRAFT_CHECK(architecture == "llama", kArea, "the architecture must be llama; got '", architecture,
              "' (", place, ")");
  const auto size = [&](const char* key) {
    return static_cast<int64_t>(file.get_uint(std::string("llama.") + key));
  };
  DecoderConfig config;
  config.hidden_size = size("embedding_length");
  config.intermediate_size = size("feed_forward_length");
  config.layers = size("block_count");
  config.heads = size("attention.head_count");
  GRAFT_CHECK(config.heads > 0, kArea, "llama.attention.head_count must be positive; got 0 (",
              place, ")");
  config.kv_heads = static_cast<int64_t>(file.find_uint("llama.attention.head_count_kv")
                                             .value_or(static_cast<uint64_t>(config.heads)));
  const int64_t even = config.hidden_size / config.heads;
  config.head_dim = static_cast<int64_t>(
      file.find_uint("llama.attention.key_length").value_or(static_cast<uint64_t>(even)));
  GRAFT_CHECK(static_cast<int64_t>(file.find_uint("llama.rope.dimension_count")
                                       .value_or(static_cast<uint64_t>(config.head_dim))) ==
                  config.head_dim,
              kArea, "llama.rope.dimension_count must be the head's size ", config.head_dim, " (",
              place, ")");
  config.rms_norm_eps = file.get_float("llama.attention.layer_norm_rms_epsilon");
  config.max_positions = size("context_length");
  config.tied = !file.contains("output.weight");
  GRAFT_CHECK(file.contains("token_embd.weight"), kArea, "the file must hold token_embd.weight (",
              place, ")");
  config.vocab_size = file.info("token_embd.weight").shape.at(0);
  config.attention_bias = file.contains("blk.0.attn_q.bias");
  config.mlp_bias = file.contains("blk.0.ffn_gate.bias");
  config.rope.head_dim = config.head_dim;
  config.rope.theta = file.find_float("llama.rope.freq_base").value_or(10000.0);
  const std::string scaling = file.find_string("llama.rope.scaling.type").value_or("none");
  GRAFT_CHECK(scaling == "none" || scaling == "linear", kArea,
              "rope scaling must be none or linear; got '", scaling, "' (", place, ")");
  if (scaling == "linear") {
    config.rope.type = "linear";
    config.rope.factor = file.get_float("llama.rope.scaling.factor");
  }
  if (const auto eos = file.find_uint("tokenizer.ggml.eos_token_id"))
    config.eos_ids = {static_cast<int32_t>(*eos)};
  config.validate(place);
  return config;
}

}  // namespace graft::models
