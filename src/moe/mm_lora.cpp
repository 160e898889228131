#include <ATen/ATen.h>
#include <graft/moe/mm_lora.h>
#include <graft/moe/token_scope.h>

#include <cmath>

#include "expert_fields.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = MmLoraImpl::kName;

std::shared_ptr<const adapters::Recipe> read_config(nlohmann::json& config) {
  adapters::ConfigFields fields(config, kArea);
  MmLoraOptions options;
  if (config.contains("expert_ranks")) {
    options.ranks.clear();
    for (const double rank : fields.numbers("expert_ranks")) {
      GRAFT_CHECK(rank == std::floor(rank), kArea, "expert_ranks must be whole numbers; got ",
                  rank);
      options.ranks.push_back(static_cast<int64_t>(rank));
    }
  }
  options.scale = fields.number("scale", options.scale);
  options.dropout = fields.number("lora_dropout", options.dropout);
  if (config.contains("init_lora_weights"))
    options.init = adapters::init_from_config(kArea, config, "init_lora_weights");
  options.default_kind = fields.integer("default_kind", options.default_kind);
  return adapters::make_recipe(options);
}

}  // namespace

void MmLoraOptions::validate() const {
  GRAFT_CHECK(!ranks.empty(), kArea, "there must be at least one kind of tokens; got none");
  for (const int64_t rank : ranks) check_expert_options(kArea, rank, scale, dropout, init);
  GRAFT_CHECK(default_kind >= 0 && default_kind < static_cast<int64_t>(ranks.size()), kArea,
              "default_kind must be one of the ", ranks.size(), " kinds; got ", default_kind);
}

MmLoraImpl::MmLoraImpl(const nn::FrozenLayer& base, const MmLoraOptions& options_in,
                       const adapters::LayerContext& context_in)
    : LinearMixture(options_in, context_in) {
  check_supports(base, context.name);
  options.validate();
  experts = make_experts(kArea, base, options.ranks, options.scale, options.init, context);
  register_parameter("lora_A", experts.A);
  register_parameter("lora_B", experts.B);
}

at::Tensor MmLoraImpl::gates(const at::Tensor& x) {
  const at::Tensor kinds = TokenScope::current().kinds;
  const int64_t tokens = x.size(-1) == 0 ? 0 : x.numel() / x.size(-1), count = experts.count();
  at::Tensor gates = at::zeros({tokens, count}, experts.A.options().requires_grad(false));
  if (!kinds.defined()) {
    gates.select(1, options.default_kind).fill_(1);
    return gates;
  }
  GRAFT_CHECK(kinds.numel() == tokens, kArea, "there must be one kind a token, ", tokens,
              "; got kinds of ", kinds.sizes(), " (layer '", context.name, "')");
  GRAFT_CHECK(((kinds >= 0) & (kinds < count)).all().item<bool>(), kArea,
              "a token's kind must be in [0, ", count, "); got ", kinds.min().item<int64_t>(),
              " to ", kinds.max().item<int64_t>(), " (layer '", context.name, "')");
  return gates.scatter_(1, kinds.to(gates.device()).reshape({-1, 1}), 1.0);
}

void MmLoraImpl::write_config(const MmLoraOptions& options, nlohmann::json& config) {
  config["expert_ranks"] = options.ranks;
  config["scale"] = options.scale;
  config["lora_dropout"] = options.dropout;
  config["init_lora_weights"] = adapters::init_to_config(options.init);
  config["default_kind"] = options.default_kind;
}

std::string MmLoraImpl::describe(const MmLoraOptions& options) {
  std::string text = "ranks";
  for (const int64_t rank : options.ranks) text += concat(" ", rank);
  text += concat(" by the kind of token, scale ", options.scale);
  if (options.dropout > 0) text += concat(", dropout ", options.dropout);
  return text;
}

adapters::MethodEntry mm_lora_entry() {
  adapters::MethodEntry entry{kArea,
                              "MM_LORA",
                              "one LoRA expert for each kind of tokens, told by the caller",
                              {},
                              read_config};
  entry.keys = {.rank = "", .alpha = "", .rslora = ""};
  entry.tensor_prefix = "experts.";
  return entry;
}

}  // namespace graft::moe
