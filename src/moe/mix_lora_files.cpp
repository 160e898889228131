// MixLoRA's configuration and the names of its tensors, as MoE-PEFT and the mixlora package have
// them.
#include <ATen/ATen.h>
#include <graft/adapters/config_fields.h>
#include <graft/core/error.h>
#include <graft/moe/mix_lora_recipe.h>

#include <nlohmann/json.hpp>
#include <regex>

namespace graft::moe {
namespace {

using adapters::ConfigFields;
using adapters::number_field;
using nlohmann::json;

constexpr const char* kArea = "mixlora";
constexpr const char* kPrefix = "mixlora.";

// MoE-PEFT's name of a selection, or graft's where it has none.
std::string strategy_name(Selection selection) {
  switch (selection) {
    case Selection::softmax_top_k:
      return "mixlora";
    case Selection::top_p:
      return "mixlora-dynamic";
    case Selection::switch_top_1:
      return "mixlora-switch";
    default:
      return std::string(selection_name(selection));
  }
}

Selection parse_strategy(const std::string& name) {
  if (name == "mixlora" || name == "mixtral") return Selection::softmax_top_k;
  if (name == "mixlora-dynamic") return Selection::top_p;
  if (name == "mixlora-switch") return Selection::switch_top_1;
  return parse_selection(name);
}

Reduction parse_reduction(const std::string& name) {
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  GRAFT_CHECK(name == "pooled", kArea,
              "router_aux_loss_reduction must be mean, sum or pooled; got '", name, "'");
  return Reduction::pooled;
}

std::string reduction_name(Reduction reduction) {
  return reduction == Reduction::mean ? "mean" : reduction == Reduction::sum ? "sum" : "pooled";
}

// The field, which may only be there when the selection hears it.
template <class T, class Read>
void read_heard(const json& config, const char* key, bool heard, T& value, const Read& read) {
  const auto it = config.find(key);
  GRAFT_CHECK(heard || it == config.end() || it->is_null(), kArea, "the router does not hear ", key,
              "; got ", it == config.end() ? "" : it->dump(), " with routing_strategy ",
              config.value("routing_strategy", "mixlora"));
  value = read(key, value);
}

RouterOptions read_router(json& config, ConfigFields& fields) {
  RouterOptions router;
  json strategy = config.value("routing_strategy", json());
  GRAFT_CHECK(strategy.is_null() || strategy.is_string(), kArea,
              "routing_strategy must be a name; got ", strategy.dump());
  if (strategy.is_string()) router.selection = parse_strategy(strategy.get<std::string>());
  const auto whole = [&](const char* key, int64_t fallback) {
    return fields.integer(key, fallback);
  };
  const auto number = [&](const char* key, double fallback) {
    return fields.number(key, fallback);
  };
  const Selection selection = router.selection;
  const bool by_k = selection == Selection::softmax_top_k ||
                    selection == Selection::top_k_softmax || selection == Selection::biased;
  router.experts = fields.integer("num_experts", router.experts);
  read_heard(config, "top_k", by_k, router.top_k, whole);
  read_heard(config, "top_p", selection == Selection::top_p, router.top_p, number);
  read_heard(config, "expert_capacity", selection == Selection::switch_top_1, router.capacity,
             whole);
  const double temperature = fields.number("temperature", 0.0);
  GRAFT_CHECK(temperature == 0.0 || temperature == 1.0, kArea,
              "MoE-PEFT's temperature divides probabilities, which then do not sum to 1; use "
              "router_temperature; got temperature=",
              temperature);
  const int64_t step = fields.integer("sparse_step", 1);
  GRAFT_CHECK(step == 1, kArea, "every layer has a mixture; got sparse_step=", step);
  router.temperature = fields.number("router_temperature", 1.0);
  if (config.contains("router_renormalise"))
    router.renormalise = fields.flag("router_renormalise", true);
  if (config.contains("router_init_range"))
    router.init_range = fields.number("router_init_range", 0.02);
  router.jitter = fields.number("jitter_noise", 0.0);
  router.tau_max = fields.number("router_tau_max", 0.0);
  router.scale = fields.number("router_scale", 1.0);
  router.bias_rate = fields.number("router_bias_rate", router.bias_rate);
  fields.ignore({"routing_strategy"});
  return router;
}

// A block's or attention's rank, alpha and dropout, as far as they are given.
template <class Options>
void read_sizes(ConfigFields& fields, Options& options) {
  options.rank = fields.integer("r", options.rank);
  options.alpha = fields.number("lora_alpha", options.alpha);
  options.dropout = fields.number("lora_dropout", options.dropout);
}

std::string read_init(json& config, ConfigFields& fields) {
  const auto it = config.find("init_lora_weights");
  if (it != config.end() && it->is_boolean())
    return fields.flag("init_lora_weights", true) ? "kaiming" : "random";
  return fields.text("init_lora_weights", "kaiming");
}

ForwardPath read_path(ConfigFields& fields) {
  const std::string path = fields.text("forward_path", "automatic");
  if (path == "automatic") return ForwardPath::automatic;
  if (path == "literal") return ForwardPath::literal;
  if (path == "shared") return ForwardPath::shared;
  GRAFT_CHECK(path == "combined", kArea,
              "forward_path must be automatic, literal, shared or combined; got '", path, "'");
  return ForwardPath::combined;
}

BalancePenalty read_balance(ConfigFields& fields) {
  BalancePenalty balance;
  balance.coefficient = fields.number("router_aux_loss_coef", balance.coefficient);
  if (!fields.flag("router_loss", true)) balance.coefficient = 0.0;
  balance.of = fields.text("router_aux_loss", balance.of);
  balance.reduction = parse_reduction(fields.text("router_aux_loss_reduction", "mean"));
  balance.z_coefficient = fields.number("router_z_loss_coef", balance.z_coefficient);
  return balance;
}

std::shared_ptr<const adapters::Recipe> read_config(json& config) {
  ConfigFields fields(config, kArea);
  MixLoraAdapterOptions options;
  options.mixture.router = read_router(config, fields);
  ExpertOptions& experts = options.mixture.experts;
  read_sizes(fields, experts);
  experts.rslora = fields.flag("use_rslora", false);
  experts.dora = fields.flag("use_dora", false);
  experts.init = read_init(config, fields);
  json own = config.value("expert_lora", json());
  fields.ignore({"expert_lora"});
  GRAFT_CHECK(own.is_null() || own.is_object(), kArea, "expert_lora must be an object; got ",
              own.dump());
  if (own.is_object() && !own.empty()) {
    options.attention = options.resolved_attention();
    ConfigFields expert_fields(own, kArea);
    read_sizes(expert_fields, experts);
    GRAFT_CHECK(own.empty(), kArea, "expert_lora holds r, lora_alpha and lora_dropout; got ",
                own.dump());
  }
  options.mixture.path = read_path(fields);
  options.balance = read_balance(fields);
  const std::string activation = fields.text("act_fn", "silu");
  GRAFT_CHECK(activation == "silu" || activation == "swish", kArea,
              "the blocks' act_fn is silu; got '", activation, "'");
  return adapters::make_recipe(options);
}

void write_router(const RouterOptions& router, json& config) {
  const RouterOptions usual;
  config["routing_strategy"] = strategy_name(router.selection);
  config["num_experts"] = router.experts;
  switch (router.selection) {
    case Selection::softmax_top_k:
    case Selection::top_k_softmax:
    case Selection::biased:
      config["top_k"] = router.top_k;
      break;
    case Selection::top_p:
      config["top_p"] = router.top_p;
      config["temperature"] = 0.0;
      break;
    case Selection::switch_top_1:
      config["expert_capacity"] = router.capacity;
      config["sparse_step"] = 1;
      break;
    default:
      break;
  }
  const auto unusual = [&](const char* key, double value, double fallback) {
    if (value != fallback) config[key] = value;
  };
  unusual("router_temperature", router.temperature, usual.temperature);
  unusual("router_tau_max", router.tau_max, usual.tau_max);
  unusual("router_scale", router.scale, usual.scale);
  unusual("router_bias_rate", router.bias_rate, usual.bias_rate);
  config["jitter_noise"] = router.jitter;
  if (router.init_range) config["router_init_range"] = *router.init_range;
  if (router.renormalise) config["router_renormalise"] = *router.renormalise;
}

template <class Options>
void write_sizes(const Options& options, json& config) {
  config["r"] = options.rank;
  config["lora_alpha"] = number_field(options.alpha);
  config["lora_dropout"] = options.dropout;
}

// A dict of names, or the names of before, as the list of now.
void modern_config(json& config) {
  const auto targets = config.find("target_modules");
  if (targets != config.end() && targets->is_object()) {
    json names = json::array();
    for (const auto& [name, chosen] : targets->items())
      if (chosen == true) names.push_back(name);
    *targets = names;
  }
  if (targets != config.end() && targets->is_array())
    for (json& name : *targets)
      name = name == "w1_proj"   ? json("gate_proj")
             : name == "w2_proj" ? json("down_proj")
             : name == "w3_proj" ? json("up_proj")
                                 : name;
  if (const auto init = config.find("lora_init"); init != config.end()) {
    config["init_lora_weights"] = *init == "original" ? json(true) : *init;
    config.erase("lora_init");
  }
}

std::string modern_key(std::string key) {
  static const std::regex gate("(mixlora\\.layers\\.\\d+)\\.gate\\.weight");
  static const std::regex expert(
      "(mixlora\\.layers\\.\\d+)\\.experts\\.(\\d+)\\.(w[123])_proj\\.(.*)");
  std::smatch match;
  if (std::regex_match(key, match, gate)) return match[1].str() + ".mlp.moe_gate.weight";
  if (!std::regex_match(key, match, expert)) return key;
  const std::string old = match[3], name = old == "w1" ? "gate" : old == "w2" ? "down" : "up";
  return match[1].str() + ".mlp." + name + "_proj.experts." + match[2].str() + "." + match[4].str();
}

std::string file_path(const std::string& layer) {
  return kPrefix + (layer.starts_with("model.") ? layer.substr(6) : layer);
}

std::string layer_of_key(const std::string& key) {
  static const std::regex tail("\\.(moe_gate\\.|(gate|up|down)_proj\\.experts\\.|lora_).*");
  std::string layer = std::regex_replace(key, tail, "");
  if (layer.starts_with(kPrefix)) layer.replace(0, std::string(kPrefix).size(), "model.");
  return layer;
}

}  // namespace

adapters::MethodEntry mixlora_entry() {
  adapters::MethodEntry entry;
  entry.name = MixLoraImpl::kName;
  entry.peft_type = "MIXLORA";
  entry.summary = "feed-forward blocks as a mixture of LoRA experts, LoRA on attention";
  entry.read_config = read_config;
  entry.keys = {.experts = "num_experts",
                .top_k = "top_k",
                .router = "routing_strategy",
                .balance_loss = "router_aux_loss_coef"};
  entry.file_path = file_path;
  entry.layer_of_key = layer_of_key;
  entry.modern_key = modern_key;
  entry.modern_config = modern_config;
  return entry;
}

}  // namespace graft::moe

namespace graft::adapters {

void RecipeOf<moe::MixLoraImpl>::write_config(nlohmann::json& config) const {
  const moe::ExpertOptions& experts = options_.mixture.experts;
  moe::write_router(options_.mixture.router, config);
  moe::write_sizes(options_.resolved_attention(), config);
  if (options_.attention) moe::write_sizes(experts, config["expert_lora"]);
  config["use_rslora"] = experts.rslora;
  config["use_dora"] = experts.dora;
  config["init_lora_weights"] = experts.init == "kaiming"  ? nlohmann::json(true)
                                : experts.init == "random" ? nlohmann::json(false)
                                                           : nlohmann::json(experts.init);
  // The mixlora package fails without it, and MoE-PEFT leaves it out.
  config["act_fn"] = "silu";
  const moe::ForwardPath path = options_.mixture.path;
  if (path != moe::ForwardPath::automatic)
    config["forward_path"] = path == moe::ForwardPath::literal  ? "literal"
                             : path == moe::ForwardPath::shared ? "shared"
                                                                : "combined";
  config["router_aux_loss_coef"] = options_.balance.coefficient;
  config["router_aux_loss"] = options_.balance.of;
  config["router_aux_loss_reduction"] = moe::reduction_name(options_.balance.reduction);
  config["router_z_loss_coef"] = options_.balance.z_coefficient;
}

}  // namespace graft::adapters
