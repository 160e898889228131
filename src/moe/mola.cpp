#include <ATen/ATen.h>
#include <graft/moe/mola.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>
#include <set>
#include <sstream>

#include "expert_fields.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = MolaImpl::kName;

// "2,4,6,8": how the programs' flag gives several numbers.
std::vector<int64_t> numbers_of(const std::string& text) {
  std::vector<int64_t> numbers;
  std::stringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) {
    int64_t number = 0;
    const auto [end, error] = std::from_chars(item.data(), item.data() + item.size(), number);
    GRAFT_CHECK(error == std::errc() && end == item.data() + item.size(), kArea, kExperts,
                " must be whole numbers with commas; got '", text, "'");
    numbers.push_back(number);
  }
  return numbers;
}

std::vector<int64_t> read_experts(nlohmann::json& config) {
  const auto it = config.find(kExperts);
  if (it == config.end()) return MolaOptions().experts;
  const nlohmann::json value = std::move(*it);
  config.erase(it);
  if (value.is_number_integer()) return {value.get<int64_t>()};
  if (value.is_string()) return numbers_of(value.get<std::string>());
  const bool integers =
      value.is_array() &&
      std::all_of(value.begin(), value.end(), [](const auto& v) { return v.is_number_integer(); });
  GRAFT_CHECK(integers, kArea, kExperts, " must be a whole number or a list of them; got ",
              value.dump());
  return value.get<std::vector<int64_t>>();
}

std::shared_ptr<const adapters::Recipe> read_config(nlohmann::json& config) {
  MolaOptions options;
  read_factor_fields(kArea, config, options);
  options.experts = read_experts(config);
  adapters::ConfigFields fields(config, kArea);
  options.top_k = fields.integer(kTopK, options.top_k);
  options.balance_loss = fields.number(kBalanceLoss, options.balance_loss);
  return adapters::make_recipe(options);
}

// 3 of "model.layers.3.mlp.up_proj".
std::optional<int64_t> block_number(const std::string& name) {
  std::stringstream stream(name);
  for (std::string part; std::getline(stream, part, '.');) {
    int64_t number = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), number);
    if (error == std::errc() && end == part.data() + part.size()) return number;
  }
  return std::nullopt;
}

// How many experts this layer has, and how many of them work on a token.
RouterOptions router_of(const MolaOptions& options, const adapters::LayerContext& context,
                        const nn::FrozenLayer& base) {
  options.validate();
  const auto counts = context.shared
                          ? std::static_pointer_cast<MolaImpl::ExpertCounts>(context.shared)
                          : MolaImpl::make_shared_part(options, {{context.name, base}}, context);
  const int64_t experts = counts->at(context.name);
  return {.selection = Selection::softmax_top_k,
          .experts = experts,
          .top_k = std::min(options.top_k, experts),
          .linear_start = true};
}

}  // namespace

double MolaOptions::scale() const {
  return adapters::lora_scale(alpha, rank, rslora);
}

void MolaOptions::validate() const {
  check_routed_options(kArea, *this);
  GRAFT_CHECK(!experts.empty(), kArea, "experts must be one number or more; got none");
  for (const int64_t count : experts)
    GRAFT_CHECK(count >= 1, kArea, "experts must be at least 1 in every block; got ", count);
  GRAFT_CHECK(top_k >= 1, kArea, "top_k must be at least 1; got ", top_k);
}

MolaImpl::MolaImpl(const nn::FrozenLayer& base, const MolaOptions& options_in,
                   const adapters::LayerContext& context_in)
    : RoutedMixture(base, options_in, context_in, router_of(options_in, context_in, base)) {}

std::shared_ptr<MolaImpl::ExpertCounts> MolaImpl::make_shared_part(
    const MolaOptions& options, const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers,
    const adapters::LayerContext&) {
  const auto counts = std::make_shared<ExpertCounts>();
  const auto groups = static_cast<int64_t>(options.experts.size());
  if (groups == 1) {
    for (const auto& [name, layer] : layers) counts->emplace(name, options.experts[0]);
    return counts;
  }
  std::set<int64_t> numbers;
  for (const auto& [name, layer] : layers) {
    const auto number = block_number(name);
    GRAFT_CHECK(number.has_value(), kArea,
                "experts by block need a block's number in every layer's name; got none (layer '",
                name, "')");
    numbers.insert(*number);
  }
  const auto blocks = static_cast<int64_t>(numbers.size());
  GRAFT_CHECK(groups <= blocks, kArea,
              "there must be a block at least for each number of experts; got ", groups,
              " numbers for ", blocks, " blocks");
  for (const auto& [name, layer] : layers) {
    const auto place = std::distance(numbers.begin(), numbers.find(*block_number(name)));
    counts->emplace(name, options.experts[place * groups / blocks]);
  }
  return counts;
}

at::Tensor MolaImpl::balance(const std::vector<Routing>& layers, const MolaOptions&) {
  return balance_loss(layers, balance_of("mola"));
}

void MolaImpl::write_config(const MolaOptions& options, nlohmann::json& config) {
  write_routed_fields(options, config);
  config[kTopK] = options.top_k;
}

std::string MolaImpl::describe(const MolaOptions& options) {
  std::string text = concat("experts ", options.experts[0]);
  for (size_t i = 1; i < options.experts.size(); ++i) text += concat("-", options.experts[i]);
  return concat(text, ", top ", options.top_k, ", ", describe_routed(options));
}

adapters::MethodEntry mola_entry() {
  adapters::MethodEntry entry{
      kArea,
      "MOLA",
      "LoRA experts on every layer, their number by block, top-k by a router",
      {},
      read_config};
  entry.keys = routed_keys(/*top_k=*/true);
  entry.tensor_prefix = "experts.";
  return entry;
}

}  // namespace graft::moe
