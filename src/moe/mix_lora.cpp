#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/moe/mix_lora.h>
#include <graft/ops/swiglu.h>

namespace graft::moe {
namespace {

constexpr const char* kArea = "mixlora";

adapters::LayerContext part_of(const adapters::LayerContext& context, const char* part) {
  adapters::LayerContext result = context;
  result.name = context.name.empty() ? part : context.name + "." + part;
  return result;
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
  GRAFT_CHECK(!experts.dora || path != ForwardPath::combined, kArea,
              "DoRA experts scale the down projection each in its own way, so their outputs cannot "
              "be combined before it; got path=combined with dora=true");
}

MixLoraImpl::MixLoraImpl(const nn::FrozenGatedMlp& base, const MixLoraOptions& options_in,
                         const adapters::LayerContext& context)
    : nn::MlpMixture("MixLora"), options(options_in) {
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
}

at::Tensor MixLoraImpl::apply(const nn::FrozenGatedMlp& base, const at::Tensor& x_in,
                              const at::Tensor& valid) {
  GRAFT_CHECK(x_in.dim() >= 1 && x_in.size(-1) == base.gate.weight.size(1), kArea,
              "the input must be [..., ", base.gate.weight.size(1), "]; got ", x_in.sizes());
  routing_ = router->forward(x_in.dim() == 1 ? x_in.unsqueeze(0) : x_in, valid);
  const DispatchPlan plan = dispatch(routing_);
  const at::Tensor row_weights = plan.row_weights(routing_.weights);
  const at::Tensor x = x_in.reshape({-1, x_in.size(-1)});

  const ForwardPath path = options.resolved_path();
  const bool literal = path == ForwardPath::literal;
  const at::Tensor in = literal ? ops::gather_tokens(x, plan.rows) : x;
  const at::Tensor z = ops::swiglu(gate_proj->rows(base.gate, in, plan, literal),
                                   up_proj->rows(base.up, in, plan, literal));
  at::Tensor y;
  if (path == ForwardPath::combined) {
    y = down_proj->summed(base.down, z, row_weights, plan);
  } else {
    const at::Tensor outputs = down_proj->rows(base.down, z, plan, /*by_row=*/true);
    y = ops::combine_rows(outputs.to(row_weights.scalar_type()), row_weights, plan.rows);
  }
  return y.to(x_in.scalar_type()).reshape(x_in.sizes());
}

const Routing& MixLoraImpl::routing() const {
  GRAFT_CHECK(routing_.logits.defined(), kArea, "no forward pass has run yet; got no routing");
  return routing_;
}

MixLora add_mixture(nn::GatedMlpImpl& block, const MixLoraOptions& options,
                    const adapters::LayerContext& context) {
  const MixLora mixture(block.frozen(), options, context);
  block.set_mixture(mixture.ptr());
  for (const nn::Linear& layer : {block.gate_proj, block.up_proj, block.down_proj})
    for (at::Tensor parameter : layer->parameters(/*recurse=*/false))
      parameter.requires_grad_(false);
  return mixture;
}

}  // namespace graft::moe
