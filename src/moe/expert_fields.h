// The fields that configurations of mixtures have in common.
#pragma once

#include <graft/adapters/config_fields.h>
#include <graft/adapters/recipe.h>
#include <graft/core/error.h>
#include <nlohmann/json.hpp>

#include "../adapters/low_rank.h"

namespace graft::moe {

inline constexpr const char* kExperts = "num_experts";
inline constexpr const char* kTopK = "top_k";
inline constexpr const char* kBalanceLoss = "router_aux_loss_coef";

/// Factors of the experts; a missing field keeps the options' default.
template <class Options>
void read_factor_fields(const char* method, nlohmann::json& config, Options& options) {
  adapters::ConfigFields fields(config, method);
  options.rank = fields.integer("r", options.rank);
  options.alpha = fields.number("lora_alpha", options.alpha);
  options.dropout = fields.number("lora_dropout", options.dropout);
  options.rslora = fields.flag("use_rslora", options.rslora);
  if (config.contains("init_lora_weights"))
    options.init = adapters::init_from_config(method, config, "init_lora_weights");
}

/// The same, how many experts there are and what their balance costs.
template <class Options>
void read_routed_fields(const char* method, nlohmann::json& config, Options& options) {
  read_factor_fields(method, config, options);
  adapters::ConfigFields fields(config, method);
  options.experts = fields.integer(kExperts, options.experts);
  options.balance_loss = fields.number(kBalanceLoss, options.balance_loss);
}

template <class Options>
void write_routed_fields(const Options& options, nlohmann::json& config) {
  adapters::write_factor_fields(config, options.rank, options.alpha, options.dropout, options.init);
  config["use_rslora"] = options.rslora;
  config[kExperts] = options.experts;
  config[kBalanceLoss] = options.balance_loss;
}

template <class Options>
void check_routed_options(const char* method, const Options& options) {
  check_expert_options(method, options.rank, options.alpha, options.dropout, options.init);
  GRAFT_CHECK(std::isfinite(options.balance_loss) && options.balance_loss >= 0, method,
              "the balance loss's coefficient must not be negative; got ", options.balance_loss);
}

/// "rank 8, alpha 16", and what differs from the usual.
template <class Options>
std::string describe_factors(const Options& options) {
  std::string text = concat("rank ", options.rank, ", alpha ", options.alpha);
  if (options.rslora) text += ", rsLoRA";
  if (options.dropout > 0) text += concat(", dropout ", options.dropout);
  if (options.init != "kaiming") text += ", init " + options.init;
  return text;
}

template <class Options>
std::string describe_routed(const Options& options) {
  std::string text = describe_factors(options);
  if (options.balance_loss > 0) text += concat(", balance loss times ", options.balance_loss);
  return text;
}

/// The names under which the programs' flags reach the fields.
inline adapters::OptionKeys routed_keys(bool top_k) {
  adapters::OptionKeys keys;
  keys.experts = kExperts;
  if (top_k) keys.top_k = kTopK;
  keys.balance_loss = kBalanceLoss;
  return keys;
}

}  // namespace graft::moe
