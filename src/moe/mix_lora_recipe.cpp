#include <ATen/ATen.h>
#include <graft/adapters/dora.h>
#include <graft/adapters/lora.h>
#include <graft/core/error.h>
#include <graft/moe/mix_lora_recipe.h>

#include <algorithm>
#include <cmath>

namespace graft::moe {
namespace {

constexpr const char* kArea = "mixlora";

void check_coefficient(double value, const char* name) {
  GRAFT_CHECK(std::isfinite(value) && value >= 0, kArea, name, " must not be negative; got ",
              value);
}

}  // namespace

BalanceOptions BalancePenalty::resolved() const {
  BalanceOptions options = balance_of(of);
  options.reduction = reduction;
  return options;
}

AttentionOptions MixLoraAdapterOptions::resolved_attention() const {
  const ExpertOptions& experts = mixture.experts;
  return attention.value_or(AttentionOptions{experts.rank, experts.alpha, experts.dropout});
}

void MixLoraAdapterOptions::validate() const {
  mixture.validate();
  check_coefficient(balance.coefficient, "router_aux_loss_coef");
  check_coefficient(balance.z_coefficient, "router_z_loss_coef");
  balance_of(balance.of);
  ExpertOptions like = mixture.experts;
  std::tie(like.rank, like.alpha, like.dropout) = std::tuple(
      resolved_attention().rank, resolved_attention().alpha, resolved_attention().dropout);
  like.validate();
}

}  // namespace graft::moe

namespace graft::adapters {
namespace {

using moe::MixLoraImpl;

constexpr const char* kArea = "mixlora";

// The balance losses of the passes since a step began.
struct BalanceRecord {
  double sum = 0;
  int64_t passes = 0;
};

std::vector<MixLoraImpl*> mixtures(const AdapterList& adapters) {
  std::vector<MixLoraImpl*> found;
  for (const auto& adapter : adapters)
    if (auto* mixture = dynamic_cast<MixLoraImpl*>(adapter.get())) found.push_back(mixture);
  return found;
}

BalanceRecord& record_of(const std::vector<MixLoraImpl*>& blocks) {
  return *std::static_pointer_cast<BalanceRecord>(blocks.front()->context.shared);
}

// The last pass of every block.
std::vector<moe::Routing> routings(const std::vector<MixLoraImpl*>& blocks) {
  std::vector<moe::Routing> found;
  for (const MixLoraImpl* block : blocks) {
    found.push_back(block->routing());
    const bool learns = at::GradMode::is_enabled() && block->router->weight.requires_grad();
    GRAFT_CHECK(!learns || found.back().logits.requires_grad(), kArea,
                "the balance loss needs a forward pass that keeps its graph; got one without, as "
                "gradient checkpointing makes them (router_aux_loss_coef=0 trains without the "
                "loss)");
  }
  return found;
}

// LoRA of a Linear layer beside the mixtures, or DoRA.
template <class Method>
std::shared_ptr<nn::Adapter> make_attention(const moe::MixLoraAdapterOptions& options,
                                            const nn::FrozenLayer& layer,
                                            const LayerContext& context,
                                            const LayerOverride& override_) {
  const moe::AttentionOptions attention = options.resolved_attention();
  typename Method::Options own;
  own.rank = override_.rank.value_or(attention.rank);
  own.alpha = override_.alpha.value_or(attention.alpha);
  own.dropout = attention.dropout;
  own.rslora = options.mixture.experts.rslora;
  own.init = options.mixture.experts.init;
  own.validate();
  return std::make_shared<Method>(layer, own, context);
}

}  // namespace

using MixLoraRecipe = RecipeOf<MixLoraImpl>;

std::shared_ptr<nn::Adapter> MixLoraRecipe::make(const nn::FrozenLayer& layer,
                                                 const LayerContext& context,
                                                 const LayerOverride& override_) const {
  if (const auto* block = std::get_if<nn::FrozenGatedMlp>(&layer)) {
    moe::MixLoraOptions own = options_.mixture;
    own.experts.rank = override_.rank.value_or(own.experts.rank);
    own.experts.alpha = override_.alpha.value_or(own.experts.alpha);
    return std::make_shared<MixLoraImpl>(*block, own, context);
  }
  GRAFT_CHECK(std::holds_alternative<nn::FrozenLinear>(layer), kArea,
              "this method does not support ", nn::kind_name(layer), " (layer '", context.name,
              "')");
  return options_.mixture.experts.dora
             ? make_attention<DoraImpl>(options_, layer, context, override_)
             : make_attention<LoraImpl>(options_, layer, context, override_);
}

std::shared_ptr<void> MixLoraRecipe::make_shared_part(
    const std::vector<std::pair<std::string, nn::FrozenLayer>>&, const LayerContext&) const {
  return std::make_shared<BalanceRecord>();
}

void MixLoraRecipe::begin_step(const AdapterList& adapters, const StepInfo&) const {
  const auto blocks = mixtures(adapters);
  record_of(blocks) = {};
  for (MixLoraImpl* block : blocks) block->step_tokens.zero_();
}

at::Tensor MixLoraRecipe::penalty(const AdapterList& adapters) const {
  const auto blocks = mixtures(adapters);
  const moe::BalancePenalty& balance = options_.balance;
  const bool counts = balance.coefficient > 0 || balance.z_coefficient > 0;
  const at::AutoGradMode mode(counts && at::GradMode::is_enabled());
  const auto passes = routings(blocks);
  const at::Tensor loss = moe::balance_loss(passes, balance.resolved());
  BalanceRecord& record = record_of(blocks);
  record.sum += loss.item<double>();
  ++record.passes;
  if (!counts) return {};
  at::Tensor sum = loss * balance.coefficient;
  if (balance.z_coefficient > 0)
    sum = sum + moe::z_loss(passes, balance.reduction) * balance.z_coefficient;
  return sum;
}

void MixLoraRecipe::end_step(const AdapterList& adapters, const StepInfo&) const {
  for (MixLoraImpl* block : mixtures(adapters))
    if (block->router->bias.defined())
      moe::update_bias(block->router->bias, block->step_tokens, block->router->options.bias_rate);
}

Figures MixLoraRecipe::figures(const AdapterList& adapters) const {
  const auto blocks = mixtures(adapters);
  Figures figures;
  if (const BalanceRecord& record = record_of(blocks); record.passes > 0)
    figures.emplace_back("balance_loss", record.sum / static_cast<double>(record.passes));
  double largest = 0, smallest = 1;
  bool ran = false;
  for (const MixLoraImpl* block : blocks) {
    const auto tokens = static_cast<double>(block->step_tokens.sum().item<int64_t>());
    if (tokens == 0) continue;
    ran = true;
    const double most = block->step_tokens.max().item<double>() / tokens,
                 least = block->step_tokens.min().item<double>() / tokens;
    largest = std::max(largest, most);
    smallest = std::min(smallest, least);
  }
  if (!ran) return figures;
  figures.emplace_back("largest_expert_share", largest);
  figures.emplace_back("smallest_expert_share", smallest);
  return figures;
}

ExpertUse MixLoraRecipe::expert_use(const AdapterList& adapters, bool training) const {
  ExpertUse use;
  for (const MixLoraImpl* block : mixtures(adapters)) {
    const at::Tensor tokens = (training ? block->trained_tokens : block->evaluated_tokens).cpu();
    const int64_t* counts = tokens.const_data_ptr<int64_t>();
    use.emplace(block->context.name, std::vector<int64_t>(counts, counts + tokens.numel()));
  }
  return use;
}

StartPlan MixLoraRecipe::start_plan() const {
  StartPlan plan;
  plan.kind = init::find_kind(options_.mixture.experts.init);
  plan.rank = options_.mixture.experts.rank;
  plan.alpha = options_.mixture.experts.alpha;
  return plan;
}

std::string MixLoraRecipe::describe() const {
  const moe::MixLoraOptions& mixture = options_.mixture;
  const moe::ExpertOptions& experts = mixture.experts;
  const moe::AttentionOptions attention = options_.resolved_attention();
  std::string text =
      concat(mixture.router.experts, " experts, ", moe::selection_name(mixture.router.selection));
  if (mixture.router.slots() == mixture.router.top_k) text += concat(" ", mixture.router.top_k);
  text += concat(", rank ", experts.rank, ", alpha ", experts.alpha);
  if (experts.dropout > 0) text += concat(", dropout ", experts.dropout);
  if (experts.rslora) text += ", rsLoRA";
  if (experts.dora) text += ", DoRA";
  if (experts.init != "kaiming") text += ", init " + experts.init;
  if (attention.rank != experts.rank || attention.alpha != experts.alpha)
    text += concat("; attention rank ", attention.rank, ", alpha ", attention.alpha);
  if (options_.balance.coefficient > 0)
    text += concat("; balance loss ", options_.balance.coefficient, " ", options_.balance.of);
  return text;
}

}  // namespace graft::adapters
