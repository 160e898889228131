#include <ATen/ATen.h>
#include <c10/core/StorageImpl.h>
#include <graft/moe/llava_mole.h>

#include <array>
#include <cmath>
#include <map>
#include <set>

#include "expert_fields.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = LlavaMoleImpl::kName;
constexpr std::array<std::string_view, 4> kCombines = {"one", "prob", "straight_through", "dense"};

std::shared_ptr<const adapters::Recipe> read_config(nlohmann::json& config) {
  LlavaMoleOptions options;
  read_routed_fields(kArea, config, options);
  adapters::ConfigFields fields(config, kArea);
  options.combine =
      parse_combine(fields.text("combine", std::string(combine_name(options.combine))));
  return adapters::make_recipe(options);
}

// "model.layers.3.mlp" of "model.layers.3.mlp.up_proj".
std::string parent_of(const std::string& name) {
  const size_t dot = name.rfind('.');
  return dot == std::string::npos ? "" : name.substr(0, dot);
}

// The loss is of the first choices, whatever works on a token.
Routing first_choices(Routing routing) {
  routing.chosen = routing.chosen.narrow(1, 0, 1);
  return routing;
}

at::Tensor balance(const std::vector<Routing>& blocks) {
  std::vector<Routing> first;
  for (const Routing& block : blocks) first.push_back(first_choices(block));
  return balance_loss(first, balance_of("llava_mole"));
}

}  // namespace

// The input of a pass is known again by its storage, without being kept alive.
struct LlavaMoleImpl::Block {
  Block(Router r, int64_t size) : router(std::move(r)), features(size) {}

  // Whether the last routing is that of this input, with the graph that a pass in this mode has,
  // and the layer has not used it yet (then a new pass has begun).
  bool is_of(const at::Tensor& x, const void* layer) const {
    return routing.logits.defined() && storage == x.storage().getWeakStorageImpl() &&
           offset == x.storage_offset() && numel == x.numel() && version == version_of(x) &&
           with_graph == at::GradMode::is_enabled() && users.count(layer) == 0;
  }

  void route(const at::Tensor& x) {
    routing = route_tokens(*router, x);
    storage = x.storage().getWeakStorageImpl();
    offset = x.storage_offset();
    numel = x.numel();
    version = version_of(x);
    with_graph = at::GradMode::is_enabled();
    users.clear();
  }

  static uint32_t version_of(const at::Tensor& x) { return x.is_inference() ? 0 : x._version(); }

  Router router;
  const int64_t features;
  Routing routing;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage{at::zeros({0}).storage().getWeakStorageImpl()};
  int64_t offset = 0, numel = 0;
  uint32_t version = 0;
  bool with_graph = false;
  std::set<const void*> users;
};

struct LlavaMoleImpl::Blocks {
  struct Place {
    std::shared_ptr<Block> block;
    bool is_first = false;
  };
  std::map<std::string, Place> of_layer;
};

std::string_view combine_name(Combine combine) {
  return kCombines[static_cast<size_t>(combine)];
}

Combine parse_combine(std::string_view name) {
  std::string known;
  for (size_t i = 0; i < kCombines.size(); ++i) {
    if (kCombines[i] == name) return static_cast<Combine>(i);
    known += (known.empty() ? "" : ", ") + std::string(kCombines[i]);
  }
  fail(kArea, concat("combine must be one of ", known, "; got '", name, "'"));
}

double LlavaMoleOptions::scale() const {
  return adapters::lora_scale(alpha, rank, rslora);
}

RouterOptions LlavaMoleOptions::router() const {
  RouterOptions router{.selection = Selection::softmax_top_k, .experts = experts, .top_k = 1};
  if (combine == Combine::prob) router.renormalise = false;
  if (combine == Combine::dense) router.selection = Selection::dense;
  router.linear_start = true;
  router.offset = true;
  return router;
}

void LlavaMoleOptions::validate() const {
  check_routed_options(kArea, *this);
  router().validate();
}

LlavaMoleImpl::LlavaMoleImpl(const nn::FrozenLayer& base, const LlavaMoleOptions& options_in,
                             const adapters::LayerContext& context_in)
    : LinearMixture(options_in, context_in) {
  check_supports(base, context.name);
  options.validate();
  const auto blocks = context.shared ? std::static_pointer_cast<Blocks>(context.shared)
                                     : make_shared_part(options, {{context.name, base}}, context);
  const Blocks::Place& place = blocks->of_layer.at(context.name);
  block_ = place.block;
  owns_router_ = place.is_first;
  experts = make_experts(kArea, base,
                         std::vector<int64_t>(static_cast<size_t>(options.experts), options.rank),
                         options.scale(), options.init, context);
  register_parameter("lora_A", experts.A);
  register_parameter("lora_B", experts.B);
  if (owns_router_) register_module("router", block_->router);
}

std::shared_ptr<LlavaMoleImpl::Blocks> LlavaMoleImpl::make_shared_part(
    const LlavaMoleOptions& options,
    const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers,
    const adapters::LayerContext& context) {
  const auto blocks = std::make_shared<Blocks>();
  std::map<std::string, std::shared_ptr<Block>> by_parent;
  for (const auto& [name, layer] : layers) {
    check_supports(layer, name);
    const std::string parent = parent_of(name);
    auto& block = by_parent[parent];
    const bool is_first = block == nullptr;
    if (is_first) {
      adapters::LayerContext own = context;
      own.name = parent;
      block = std::make_shared<Block>(make_router(layer, options.router(), own),
                                      adapters::dense_sizes(layer).second);
    }
    blocks->of_layer.emplace(name, Blocks::Place{block, is_first});
  }
  return blocks;
}

const RouterImpl& LlavaMoleImpl::router() const {
  return *block_->router;
}

const Routing& LlavaMoleImpl::routing() const {
  return block_->routing;
}

at::Tensor LlavaMoleImpl::gates(const at::Tensor& x) {
  Block& block = *block_;
  const int64_t tokens = x.size(-1) == 0 ? 0 : x.numel() / x.size(-1);
  if (x.size(-1) == block.features && !block.is_of(x, this)) block.route(x);
  GRAFT_CHECK(block.routing.logits.defined() && block.routing.tokens() == tokens, kArea,
              "a layer follows the routing of its block's input, which must have been there with "
              "as many tokens; got ",
              tokens, " tokens for ", block.routing.logits.defined() ? block.routing.tokens() : 0,
              " routed (layer '", context.name, "')");
  block.users.insert(this);
  const at::Tensor gates = gates_of(block.routing);
  if (options.combine != Combine::straight_through) return gates;
  const at::Tensor& p = block.routing.probabilities;  // without a gradient where padding is
  return gates.detach() + (p - p.detach());
}

std::vector<nn::Adapter::FileTensor> LlavaMoleImpl::file_tensors() const {
  std::vector<FileTensor> tensors;
  if (owns_router_) tensors = router_tensors(*block_->router);
  for (auto& tensor : experts.file_tensors()) tensors.push_back(std::move(tensor));
  return tensors;
}

at::Tensor LlavaMoleImpl::penalty(const std::vector<LlavaMoleImpl*>& layers) {
  if (layers.empty() || layers.front()->options.balance_loss == 0.0) return {};
  std::vector<Routing> routings;
  for (const LlavaMoleImpl* layer : layers) {
    if (!layer->owns_router_) continue;
    check_has_graph(kArea, layer->routing(), layer->context.name);
    routings.push_back(layer->routing());
  }
  return balance(routings) * layers.front()->options.balance_loss;
}

void LlavaMoleImpl::end_step(const std::vector<LlavaMoleImpl*>& layers, const adapters::StepInfo&) {
  for (const LlavaMoleImpl* layer : layers)
    if (layer->owns_router_) layer->block_->routing = detached(layer->routing());
}

adapters::Figures LlavaMoleImpl::figures(const std::vector<LlavaMoleImpl*>& layers) {
  const at::NoGradGuard no_grad;
  std::vector<Routing> routings;
  for (const LlavaMoleImpl* layer : layers)
    if (layer->owns_router_ && layer->routing().logits.defined())
      routings.push_back(layer->routing());
  if (routings.empty()) return {};
  return mixture_figures(routings, balance(routings));
}

void LlavaMoleImpl::write_config(const LlavaMoleOptions& options, nlohmann::json& config) {
  write_routed_fields(options, config);
  config["combine"] = combine_name(options.combine);
}

std::string LlavaMoleImpl::describe(const LlavaMoleOptions& options) {
  return concat(options.experts, " experts, combined by ", combine_name(options.combine), ", ",
                describe_routed(options));
}

adapters::MethodEntry llava_mole_entry() {
  adapters::MethodEntry entry{
      kArea,
      "LLAVA_MOLE",
      "one LoRA expert a token, one router for a feed-forward block's layers",
      {},
      read_config};
  entry.keys = routed_keys(/*top_k=*/false);
  entry.tensor_prefix = "experts.";
  return entry;
}

}  // namespace graft::moe
