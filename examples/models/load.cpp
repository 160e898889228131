#include "examples/models/load.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/io/atomic_file.h>
#include <graft/io/safetensors.h>

#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

namespace graft::models {
namespace {

namespace fs = std::filesystem;

constexpr const char* kArea = "model";

// Where a parameter of the decoder lies in a file, and what else the file may hold.
struct Source {
  std::string place;
  std::function<std::string(const std::string&)> file_name;  // of a parameter
  std::function<bool(const std::string&)> contains;
  std::function<std::vector<int64_t>(const std::string&)> shape;
  std::function<at::Tensor(const std::string&)> tensor;
  std::vector<std::string> names;
  std::set<std::string> ignored;  // names that are no parameters of ours and do no harm
};

std::string list(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < names.size() && i < 12; ++i) text += (i ? ", " : "") + names[i];
  return names.size() > 12 ? text + ", ..." : text;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return concat(at::IntArrayRef(shape));
}

// The shape a parameter must have; linear layers and the embedding say so in their options.
std::vector<int64_t> wanted_shape(const torch::nn::Module& owner, const std::string& name,
                                  const at::Tensor& value) {
  if (const auto* linear = owner.as<torch::nn::LinearImpl>())
    return name == "weight"
               ? std::vector<int64_t>{linear->options.out_features(), linear->options.in_features()}
               : std::vector<int64_t>{linear->options.out_features()};
  if (const auto* embedding = owner.as<torch::nn::EmbeddingImpl>())
    return {embedding->options.num_embeddings(), embedding->options.embedding_dim()};
  return value.sizes().vec();
}

struct Parameter {
  std::string name;
  at::Tensor handle;
  std::vector<int64_t> shape;
};

std::vector<Parameter> parameters_of(DecoderImpl& decoder) {
  std::vector<Parameter> found;
  for (const auto& module : decoder.named_modules("", false))
    for (const auto& item : module.value()->named_parameters(/*recurse=*/false))
      found.push_back({module.key() + "." + item.key(), item.value(),
                       wanted_shape(*module.value(), item.key(), item.value())});
  return found;
}

void fill(DecoderImpl& decoder, const Source& source, at::ScalarType dtype) {
  const bool tied = decoder.config.tied;
  std::vector<std::string> missing, shapes, unexpected;
  std::set<std::string> used = source.ignored;
  const auto parameters = parameters_of(decoder);
  for (const auto& parameter : parameters) {
    const std::string name = source.file_name(parameter.name);
    if (tied && parameter.name == "lm_head.weight") {
      used.insert(name);  // some writers store the shared weight twice
      continue;
    }
    used.insert(name);
    if (!source.contains(name))
      missing.push_back(name);
    else if (source.shape(name) != parameter.shape)
      shapes.push_back(name + " " + shape_text(source.shape(name)) + " for " +
                       shape_text(parameter.shape));
  }
  for (const auto& name : source.names)
    if (used.count(name) == 0 && !name.ends_with("rotary_emb.inv_freq")) unexpected.push_back(name);
  std::string report;
  const auto add = [&](const char* what, const std::vector<std::string>& names) {
    if (!names.empty())
      report += concat(report.empty() ? "" : "; ", names.size(), " ", what, ": ", list(names));
  };
  add("missing", missing);
  add("unexpected", unexpected);
  add("mis-shaped", shapes);
  GRAFT_CHECK(report.empty(), kArea, "the weights must be those the config describes; got ", report,
              " (", source.place, ")");

  const at::NoGradGuard no_grad;
  for (const auto& parameter : parameters) {
    if (tied && parameter.name == "lm_head.weight") continue;
    at::Tensor values = source.tensor(source.file_name(parameter.name));
    GRAFT_CHECK(at::isFloatingType(values.scalar_type()), kArea,
                "weights must be floating point; got ", values.scalar_type(), " in ",
                parameter.name, " (", source.place, ")");
    at::Tensor handle = parameter.handle;
    handle.set_requires_grad(false);
    values = values.to(dtype);
    GRAFT_CHECK(dtype != at::kHalf || at::isfinite(values).all().item<bool>(), kArea,
                "weights must be numbers of fp16, whose largest is 65504; got others in ",
                parameter.name, " (", source.place, ")");
    handle.set_data(values);
  }
  if (tied) {
    at::Tensor head = decoder.lm_head->weight;
    head.set_requires_grad(false);
    head.set_data(decoder.model->embed_tokens->weight.variable_data());
  }
}

// GGUF keeps the rows of q and k so that rotary pairs lie side by side; the decoder wants them half
// a head apart.
at::Tensor unpermute(const at::Tensor& rows, int64_t heads) {
  std::vector<int64_t> split = {heads, rows.size(0) / heads / 2, 2};
  for (int64_t i = 1; i < rows.dim(); ++i) split.push_back(rows.size(i));
  return rows.reshape(split).transpose(1, 2).reshape(rows.sizes()).contiguous();
}

std::string gguf_name(const std::string& parameter) {
  if (parameter == "model.embed_tokens.weight") return "token_embd.weight";
  if (parameter == "model.norm.weight") return "output_norm.weight";
  if (parameter == "lm_head.weight") return "output.weight";
  static const std::pair<const char*, const char*> parts[] = {
      {"self_attn.q_proj", "attn_q"},          {"self_attn.k_proj", "attn_k"},
      {"self_attn.v_proj", "attn_v"},          {"self_attn.o_proj", "attn_output"},
      {"mlp.gate_proj", "ffn_gate"},           {"mlp.up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"},           {"input_layernorm", "attn_norm"},
      {"post_attention_layernorm", "ffn_norm"}};
  const size_t begin = std::string("model.layers.").size(), dot = parameter.find('.', begin);
  const std::string rest = parameter.substr(dot + 1), suffix = rest.substr(rest.rfind('.'));
  for (const auto& [ours, theirs] : parts)
    if (rest == ours + suffix)
      return "blk." + parameter.substr(begin, dot - begin) + "." + theirs + suffix;
  fail(kArea, "no GGUF name for the parameter '" + parameter + "'");
}

Decoder load_gguf(const io::GgufFile& file, at::ScalarType dtype) {
  Decoder decoder(read_gguf_config(file));
  Source source;
  source.place = "file '" + file.path().string() + "'";
  source.file_name = gguf_name;
  source.contains = [&](const std::string& name) { return file.contains(name); };
  source.shape = [&](const std::string& name) { return file.info(name).shape; };
  source.tensor = [&](const std::string& name) {
    const at::Tensor values = file.tensor(name);
    if (name.find("attn_q.") != std::string::npos) return unpermute(values, decoder->config.heads);
    if (name.find("attn_k.") != std::string::npos)
      return unpermute(values, decoder->config.kv_heads);
    return values;
  };
  source.names = file.names();
  source.ignored = {"rope_freqs.weight"};
  fill(*decoder, source, dtype);
  if (file.contains("rope_freqs.weight"))
    decoder->rope_factors = file.tensor("rope_freqs.weight").to(at::kFloat);
  return decoder;
}

Decoder load_folder(const fs::path& folder, at::ScalarType dtype) {
  Decoder decoder(read_hf_config(folder / "config.json"));
  const io::Checkpoint checkpoint = io::Checkpoint::open(folder);
  Source source;
  source.place = "folder '" + folder.string() + "'";
  source.file_name = [](const std::string& name) { return name; };
  source.contains = [&](const std::string& name) { return checkpoint.contains(name); };
  source.shape = [&](const std::string& name) { return checkpoint.info(name).shape; };
  source.tensor = [&](const std::string& name) { return checkpoint.tensor(name); };
  source.names = checkpoint.names();
  fill(*decoder, source, dtype);
  return decoder;
}

text::GgufVocabulary vocabulary_of(const io::GgufFile& file) {
  text::GgufVocabulary v;
  const std::string prefix = "tokenizer.ggml.";
  const auto id = [&](const char* key) -> std::optional<int32_t> {
    const auto value = file.find_uint(prefix + key);
    return value ? std::optional(static_cast<int32_t>(*value)) : std::nullopt;
  };
  v.model = file.get_string(prefix + "model");
  v.pre = file.find_string(prefix + "pre").value_or("");
  v.tokens = file.get_string_array(prefix + "tokens");
  for (const double score :
       file.find_float_array(prefix + "scores").value_or(std::vector<double>{}))
    v.scores.push_back(static_cast<float>(score));
  for (const int64_t type :
       file.find_int_array(prefix + "token_type").value_or(std::vector<int64_t>{}))
    v.token_types.push_back(static_cast<int32_t>(type));
  v.merges = file.find_string_array(prefix + "merges").value_or(std::vector<std::string>{});
  v.bos_id = id("bos_token_id");
  v.eos_id = id("eos_token_id");
  v.unknown_id = id("unknown_token_id");
  v.padding_id = id("padding_token_id");
  v.add_bos_token = file.find_bool(prefix + "add_bos_token");
  v.add_eos_token = file.find_bool(prefix + "add_eos_token");
  v.add_space_prefix = file.find_bool(prefix + "add_space_prefix");
  v.chat_template = file.find_string("tokenizer.chat_template").value_or("");
  v.source = file.path().string();
  return v;
}

// One parameter after the other, so that no more than one is there twice.
void move(DecoderImpl& decoder, const at::Device& device) {
  if (device.is_cpu()) return;
  decoder.to(device);
  if (decoder.config.tied)  // `to` has made two of it
    decoder.lm_head->weight.set_data(decoder.model->embed_tokens->weight.variable_data());
}

bool is_gguf(const fs::path& path) {
  std::error_code ignored;
  GRAFT_CHECK(fs::exists(path, ignored), kArea,
              "the model must be a Hugging Face folder or a .gguf file; got '", path.string(),
              "', which does not exist");
  return !fs::is_directory(path, ignored);
}

}  // namespace

LoadedModel load(const fs::path& path, at::ScalarType dtype, const at::Device& device) {
  if (is_gguf(path)) {
    const io::GgufFile file = io::GgufFile::open(path);
    Decoder decoder = load_gguf(file, dtype);
    move(*decoder, device);
    return {std::move(decoder), text::Tokenizer::from_gguf(vocabulary_of(file))};
  }
  Decoder decoder = load_folder(path, dtype);
  move(*decoder, device);
  text::Tokenizer tokenizer = load_tokenizer(path);
  GRAFT_CHECK(tokenizer.vocabulary_size() <= decoder->config.vocab_size, kArea,
              "the tokenizer's vocabulary must not exceed the model's; got ",
              tokenizer.vocabulary_size(), " for ", decoder->config.vocab_size, " (folder '",
              path.string(), "')");
  return {std::move(decoder), std::move(tokenizer)};
}

DecoderConfig read_config(const fs::path& path) {
  return is_gguf(path) ? read_gguf_config(io::GgufFile::open(path))
                       : read_hf_config(path / "config.json");
}

text::Tokenizer load_tokenizer(const fs::path& path) {
  if (is_gguf(path)) return text::Tokenizer::from_gguf(vocabulary_of(io::GgufFile::open(path)));
  return text::Tokenizer::from_json_file((path / "tokenizer.json").string());
}

void save_hf_folder(DecoderImpl& decoder, const fs::path& source, const fs::path& output) {
  GRAFT_CHECK(!is_gguf(source), kArea,
              "a merged model is written from a Hugging Face folder; got a GGUF file '",
              source.string(), "'");
  std::error_code error;
  GRAFT_CHECK(!fs::equivalent(source, output, error), kArea,
              "the output folder must not be the model's own; got '", output.string(), "'");
  fs::create_directories(output, error);
  GRAFT_CHECK(!error, kArea, "the output folder must be writable; got '", output.string(),
              "': ", error.message());
  // Merging into one of two tied weights parts them: then both are written, and the config says so.
  const bool still_tied = decoder.config.tied && decoder.lm_head->weight.data_ptr() ==
                                                     decoder.model->embed_tokens->weight.data_ptr();
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& parameter : parameters_of(decoder)) {
    if (parameter.name.find(".adapters.") != std::string::npos) continue;
    if (still_tied && parameter.name == "lm_head.weight") continue;
    tensors.emplace_back(parameter.name, parameter.handle.detach());
  }
  io::write_safetensors(output / "model.safetensors", tensors);
  static const std::set<std::string> copied = {
      "config.json",           "generation_config.json",  "tokenizer.json",
      "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
      "tokenizer.model"};
  for (const auto& entry : fs::directory_iterator(source)) {
    const std::string name = entry.path().filename().string();
    if (copied.count(name) == 0 || !entry.is_regular_file()) continue;
    std::ifstream stream(entry.path(), std::ios::binary);
    std::stringstream bytes;
    bytes << stream.rdbuf();
    GRAFT_CHECK(stream.good() || stream.eof(), kArea, "the model's files must be readable; got '",
                entry.path().string(), "'");
    std::string text = bytes.str();
    if (name == "config.json" && decoder.config.tied && !still_tied) {
      auto config = nlohmann::ordered_json::parse(text);
      config["tie_word_embeddings"] = false;
      text = config.dump(2) + "\n";
    }
    io::write_text_file(output / name, text);
  }
}

}  // namespace graft::models
