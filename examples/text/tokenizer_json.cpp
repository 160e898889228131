#include <graft/core/error.h>

#include <filesystem>
#include <limits>
#include <utility>

#include "examples/text/json_node.h"
#include "examples/text/tokenizer.h"
#include "examples/text/tokenizer_parts.h"

namespace graft::text {
namespace {

int32_t read_id(const JsonNode& node) {
  const int64_t id = node.integer();
  if (id < 0 || id > std::numeric_limits<int32_t>::max())
    node.refuse("a token id must be in [0, 2^31)");
  return static_cast<int32_t>(id);
}

/// A merge is "left right" or, in newer files, ["left", "right"].
std::pair<std::string, std::string> read_merge(const JsonNode& node) {
  if (node.value().is_array()) {
    const auto parts = node.items();
    if (parts.size() != 2) node.refuse("a merge must have two parts");
    return {parts[0].string(), parts[1].string()};
  }
  const std::string& text = node.string();
  const size_t space = text.find(' ');
  if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
    node.refuse("a merge must have two parts with one space between");
  }
  return {text.substr(0, space), text.substr(space + 1)};
}

void refuse_unless_neutral(const JsonNode& node, std::string_view key) {
  const auto option = node.find(key);
  if (!option) return;
  const auto& value = option->value();
  const bool neutral = (value.is_string() && value.get_ref<const std::string&>().empty()) ||
                       (value.is_number() && value.get<double>() == 0);
  if (!neutral) option->refuse(concat("option '", key, "' is not supported"));
}

BpeOptions read_model(const JsonNode& node, const std::string& source) {
  if (node.string_or("type", "BPE") != "BPE") node.at("type").refuse("the model must be BPE");
  node.allow_only({"type", "dropout", "unk_token", "continuing_subword_prefix",
                   "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges", "vocab",
                   "merges"});
  for (const std::string_view key :
       {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    refuse_unless_neutral(node, key);
  }
  BpeOptions options;
  options.source = source;
  if (const auto unknown = node.find("unk_token")) options.unknown_token = unknown->string();
  options.fuse_unknown = node.boolean_or("fuse_unk", false);
  options.byte_fallback = node.boolean_or("byte_fallback", false);
  options.ignore_merges = node.boolean_or("ignore_merges", false);
  const JsonNode vocabulary = node.at("vocab");
  if (!vocabulary.value().is_object()) vocabulary.refuse("must be an object");
  for (const auto& [token, id] : vocabulary.value().items()) {
    options.vocabulary.emplace_back(token,
                                    read_id(JsonNode(id, concat(vocabulary.place(), ".", token))));
  }
  for (const JsonNode& merge : node.at("merges").items())
    options.merges.push_back(read_merge(merge));
  return options;
}

/// The ids of one entry of a TemplateProcessing's "special_tokens".
std::vector<int32_t> read_special_ids(const JsonNode& node) {
  std::vector<int32_t> ids;
  for (const JsonNode& id : node.at("ids").items()) ids.push_back(read_id(id));
  return ids;
}

PostProcessor read_template(const JsonNode& node) {
  node.allow_only({"type", "single", "pair", "special_tokens"});
  PostProcessor around;
  bool text_seen = false;
  for (const JsonNode& item : node.at("single").items()) {
    item.allow_only({"SpecialToken", "Sequence"});
    if (const auto special = item.find("SpecialToken")) {
      auto& side = text_seen ? around.after : around.before;
      const auto ids = read_special_ids(node.at("special_tokens").at(special->at("id").string()));
      side.insert(side.end(), ids.begin(), ids.end());
      continue;
    }
    const JsonNode sequence = item.at("Sequence").at("id");
    if (text_seen || sequence.string() != "A")
      sequence.refuse("a single template must hold sequence A once");
    text_seen = true;
  }
  if (!text_seen) node.at("single").refuse("a single template must hold sequence A once");
  return around;
}

/// The pair [token, id] of a RobertaProcessing or BertProcessing.
int32_t read_token_pair(const JsonNode& node) {
  const auto items = node.items();
  if (items.size() != 2) node.refuse("must be [token, id]");
  return read_id(items[1]);
}

/// The special tokens' names are strings, or objects that describe an added token.
std::optional<int32_t> read_special_token(const JsonNode& config, std::string_view key,
                                          const TokenizerParts& parts) {
  const auto node = config.find(key);
  if (!node) return std::nullopt;
  const JsonNode content = node->value().is_object() ? node->at("content") : *node;
  const auto id = parts.id_of(content.string());
  if (!id) content.refuse("a special token must be in the vocabulary");
  return id;
}

/// One template, or a list of named ones of which "default" counts.
std::string read_chat_template(const JsonNode& node) {
  if (node.value().is_string()) return node.string();
  for (const JsonNode& item : node.items()) {
    if (item.at("name").string() == "default") return item.at("template").string();
  }
  return "";
}

void apply_config(const JsonNode& config, TokenizerParts& parts) {
  parts.bos_id = read_special_token(config, "bos_token", parts);
  parts.eos_id = read_special_token(config, "eos_token", parts);
  parts.padding_id = read_special_token(config, "pad_token", parts);
  if (const auto node = config.find("chat_template"))
    parts.chat_template = read_chat_template(*node);
  // As in transformers, these two switches replace whatever the post-processor of tokenizer.json
  // does.
  if (!config.find("add_bos_token") && !config.find("add_eos_token")) return;
  parts.post_processor = {};
  if (config.boolean_or("add_bos_token", false) && parts.bos_id)
    parts.post_processor.before = {*parts.bos_id};
  if (config.boolean_or("add_eos_token", false) && parts.eos_id)
    parts.post_processor.after = {*parts.eos_id};
}

void check_ids(const PostProcessor& around, const TokenizerParts& parts) {
  for (const auto* ids : {&around.before, &around.after}) {
    for (const int32_t id : *ids) {
      GRAFT_CHECK(parts.model.token(id) != nullptr || parts.added.find(id) != nullptr, "tokenizer",
                  "the post-processor may only add tokens of the vocabulary; got id ", id, " (",
                  parts.source, ")");
    }
  }
}

}  // namespace

PostProcessor read_post_processor(const JsonNode& node) {
  const std::string& type = node.type();
  if (type == "TemplateProcessing") return read_template(node);
  if (type == "ByteLevel") {
    node.allow_only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    return {};  // changes offsets only, which are not kept here
  }
  if (type == "RobertaProcessing" || type == "BertProcessing") {
    node.allow_only({"type", "sep", "cls", "trim_offsets", "add_prefix_space"});
    return {{read_token_pair(node.at("cls"))}, {read_token_pair(node.at("sep"))}};
  }
  if (type == "Sequence") {
    node.allow_only({"type", "processors"});
    PostProcessor all;
    for (const JsonNode& item : node.at("processors").items()) {
      const PostProcessor outer = read_post_processor(item);
      all.before.insert(all.before.begin(), outer.before.begin(), outer.before.end());
      all.after.insert(all.after.end(), outer.after.begin(), outer.after.end());
    }
    return all;
  }
  node.at("type").refuse("unknown post-processor");
}

Tokenizer Tokenizer::from_json_file(const std::string& path) {
  const nlohmann::json document = read_json_file(path);
  const JsonNode root(document, path + ":");
  root.allow_only({"version", "truncation", "padding", "added_tokens", "normalizer",
                   "pre_tokenizer", "post_processor", "decoder", "model"});
  const auto parts = std::make_shared<TokenizerParts>(read_model(root.at("model"), path));
  if (const auto node = root.find("normalizer")) parts->normalizer = read_normalizer(*node);
  if (const auto node = root.find("pre_tokenizer")) parts->pretokenizer = read_pretokenizer(*node);
  if (const auto node = root.find("decoder")) parts->decoder = read_decoder(*node);
  if (const auto node = root.find("added_tokens")) {
    parts->added = AddedTokens(read_added_tokens(*node, parts->model), parts->normalizer.get());
  }
  if (const auto node = root.find("post_processor"))
    parts->post_processor = read_post_processor(*node);
  check_ids(parts->post_processor, *parts);

  const auto folder = std::filesystem::path(path).parent_path();
  const auto config_path = folder / "tokenizer_config.json";
  if (std::filesystem::exists(config_path)) {
    const nlohmann::json config = read_json_file(config_path.string());
    apply_config(JsonNode(config, config_path.string() + ":"), *parts);
  }
  const auto template_path = folder / "chat_template.jinja";
  if (std::filesystem::exists(template_path))
    parts->chat_template = read_text_file(template_path.string());
  return Tokenizer(parts);
}

}  // namespace graft::text
