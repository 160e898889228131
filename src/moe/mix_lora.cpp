#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/moe/mix_lora.h>
#include <graft/nn/adapter_slot.h>
#include <graft/ops/swiglu.h>

#include <algorithm>

namespace graft::moe {
namespace {

constexpr const char* kArea = "mixlora";

adapters::LayerContext part_of(const adapters::LayerContext& context, const char* part) {
  adapters::LayerContext result = context;
  result.name = context.name.empty() ? part : context.name + "." + part;
  return result;
}

// Whether it is known without a look that all slots of a routing are used.
bool fills_every_slot(const RouterOptions& options, const at::Tensor& valid) {
  switch (options.selection) {
    case Selection::top_p:
    case Selection::switch_top_1:
    case Selection::threshold:
      return false;
    default:
      return !valid.defined();
  }
}

}  // namespace

ForwardPath MixLoraOptions::resolved_path() const {
  if (path != ForwardPath::automatic) return path;
  return experts.dora ? ForwardPath::shared : ForwardPath::combined;
}

int64_t MixLoraOptions::parameter_count(int64_t hidden, int64_t intermediate) const {
  const int64_t E = router.experts, magnitudes = experts.dora ? 2 * intermediate + hidden : 0;
  const int64_t head = router.selection == Selection::threshold ? hidden + 1 : 0;
  return E * hidden + head + E * (3 * experts.rank * (hidden + intermediate) + magnitudes);
}

void MixLoraOptions::validate() const {
  router.validate();
  experts.validate();
  GRAFT_CHECK(!experts.dora || path != ForwardPath::combined, kArea,
              "DoRA experts scale the down projection each in its own way, so their outputs cannot "
              "be combined before it; got path=combined with dora=true");
}

MixLoraImpl::MixLoraImpl(const nn::FrozenGatedMlp& base, const MixLoraOptions& options_in,
                         const adapters::LayerContext& context)
    : AdapterModule(options_in, context) {
  options.validate();
  const auto projection = [&](const char* name, const nn::FrozenLinear& layer) {
    return register_module(name, ExpertProjection(layer, options.router.experts, options.experts,
                                                  part_of(context, name)));
  };
  const auto type = base.gate.weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  router = register_module(
      "router", Router(base.gate.weight.size(1), type, options.router, part_of(context, "router")));
  gate_proj = projection("gate_proj", base.gate);
  up_proj = projection("up_proj", base.up);
  down_proj = projection("down_proj", base.down);
  router->to(base.gate.weight.device());
  trained_tokens = at::zeros({options.router.experts},
                             at::TensorOptions(at::kLong).device(base.gate.weight.device()));
  step_tokens = trained_tokens.clone();
  evaluated_tokens = trained_tokens.clone();
}

at::Tensor MixLoraImpl::forward(const nn::FrozenGatedMlp& base, const at::Tensor& x_in) {
  GRAFT_CHECK(x_in.dim() >= 1 && x_in.size(-1) == base.gate.weight.size(1), kArea,
              "the input must be [..., ", base.gate.weight.size(1), "]; got ", x_in.sizes());
  routing_ = router->forward(x_in.dim() == 1 ? x_in.unsqueeze(0) : x_in, base.valid);
  count(routing_);
  const DispatchPlan plan = dispatch(routing_, fills_every_slot(options.router, base.valid));
  const at::Tensor row_weights = plan.row_weights(routing_.weights);
  const at::Tensor x = x_in.reshape({-1, x_in.size(-1)});

  // One row a token and weights that sum to 1: the weights are 1 and have no gradient, and the
  // block is one with LoRA on its layers.
  const bool one_expert = plan.weights_sum_to_one && plan.rows.only_expert() >= 0;
  const ForwardPath path = options.resolved_path();
  at::Tensor y;
  if (path == ForwardPath::combined && !one_expert) {
    const ops::ExpertMlp block{gate_proj->layer(base.gate), up_proj->layer(base.up),
                               down_proj->layer(base.down)};
    y = ops::expert_mlp(x, row_weights, block, plan.rows, plan.weights_sum_to_one);
  } else {
    const bool literal = path == ForwardPath::literal;
    const at::Tensor in = literal ? ops::gather_tokens(x, plan.rows) : x;
    const at::Tensor z = ops::swiglu(gate_proj->rows(base.gate, in, plan, literal),
                                     up_proj->rows(base.up, in, plan, literal));
    y = down_proj->rows(base.down, z, plan, /*by_row=*/true);
    if (!one_expert) y = ops::combine_rows(y.to(row_weights.scalar_type()), row_weights, plan.rows);
  }
  return y.to(x_in.scalar_type()).reshape(x_in.sizes());
}

void MixLoraImpl::count(const Routing& routing) {
  if (random::is_playing_back()) return;
  const at::Tensor counts = expert_counts(routing);
  if (!is_training()) {
    evaluated_tokens.add_(counts);
    return;
  }
  trained_tokens.add_(counts);
  step_tokens.add_(counts);
}

nn::Adapter::Merged MixLoraImpl::merge(const nn::FrozenLayer&) const {
  fail(kArea, concat("a mixture cannot be merged: which experts work, and with which weights, "
                     "depends on the input (layer '",
                     context.name, "')"));
}

std::vector<nn::Adapter::FileTensor> MixLoraImpl::file_tensors() const {
  std::vector<FileTensor> tensors = {{"moe_gate.weight", router->weight.detach()}};
  if (router->threshold_weight.defined()) {
    tensors.push_back({"moe_gate.threshold.weight", router->threshold_weight.detach()});
    tensors.push_back({"moe_gate.threshold.bias", router->threshold_bias.detach()});
  }
  if (router->bias.defined()) tensors.push_back({"moe_gate.bias", router->bias});
  for (const auto& layer : named_children()) {
    const auto* terms = layer.value()->as<ExpertProjectionImpl>();
    if (terms == nullptr) continue;
    for (int64_t e = 0; e < options.router.experts; ++e) {
      const std::string expert = concat(layer.key(), ".experts.", e, ".");
      tensors.push_back({expert + "lora_A.weight", terms->lora_A.detach()[e]});
      tensors.push_back({expert + "lora_B.weight", terms->lora_B.detach()[e]});
      if (terms->lora_magnitude_vector.defined())
        tensors.push_back(
            {expert + "lora_magnitude_vector", terms->lora_magnitude_vector.detach()[e]});
    }
  }
  return tensors;
}

std::vector<int64_t> MixLoraImpl::counters() const {
  std::vector<int64_t> values = {gate_proj->mask_counter, up_proj->mask_counter,
                                 down_proj->mask_counter, router->jitter_counter};
  const at::Tensor tokens = trained_tokens.cpu();
  const int64_t* first = tokens.const_data_ptr<int64_t>();
  values.insert(values.end(), first, first + tokens.numel());
  return values;
}

void MixLoraImpl::set_counters(const std::vector<int64_t>& values) {
  GRAFT_CHECK(static_cast<int64_t>(values.size()) == 4 + trained_tokens.numel(), kArea,
              "a state has four counters and one an expert; got ", values.size(), " (layer '",
              context.name, "')");
  gate_proj->mask_counter = static_cast<uint32_t>(values[0]);
  up_proj->mask_counter = static_cast<uint32_t>(values[1]);
  down_proj->mask_counter = static_cast<uint32_t>(values[2]);
  router->jitter_counter = static_cast<uint32_t>(values[3]);
  trained_tokens.copy_(at::tensor(at::IntArrayRef(values).slice(4), at::kLong));
}

const Routing& MixLoraImpl::routing() const {
  GRAFT_CHECK(routing_.logits.defined(), kArea, "no forward pass has run yet; got no routing");
  return routing_;
}

MixLora add_mixture(nn::GatedMlpImpl& block, const MixLoraOptions& options,
                    const adapters::LayerContext& context) {
  const MixLora mixture(block.frozen(), options, context);
  const auto slot = nn::AdapterSlot::ensure(block);
  slot->add("default", mixture.ptr());
  slot->set_active({"default"});
  for (const nn::Linear& layer : {block.gate_proj, block.up_proj, block.down_proj})
    for (at::Tensor parameter : layer->parameters(/*recurse=*/false))
      parameter.requires_grad_(false);
  return mixture;
}

}  // namespace graft::moe
