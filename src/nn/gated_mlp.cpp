#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/nn/adapter_slot.h>
#include <graft/nn/batch_rows.h>
#include <graft/nn/gated_mlp.h>
#include <graft/ops/swiglu.h>

#include <utility>

namespace graft::nn {
namespace {

Linear make_layer(int64_t in, int64_t out, bool bias) {
  return Linear(torch::nn::LinearOptions(in, out).bias(bias));
}

void check_no_adapter(const Linear& layer, const char* name) {
  GRAFT_CHECK(!layer->slot || !layer->slot->engaged(), "nn",
              "a block with a mixture takes no adapter on its layers; got one on ", name);
}

}  // namespace

GatedMlpImpl::GatedMlpImpl(int64_t hidden, int64_t intermediate, bool bias)
    : GatedMlpImpl(make_layer(hidden, intermediate, bias), make_layer(hidden, intermediate, bias),
                   make_layer(intermediate, hidden, bias)) {}

GatedMlpImpl::GatedMlpImpl(Linear gate, Linear up, Linear down) : torch::nn::Module("GatedMlp") {
  gate_proj = register_module("gate_proj", std::move(gate));
  up_proj = register_module("up_proj", std::move(up));
  down_proj = register_module("down_proj", std::move(down));
}

at::Tensor GatedMlpImpl::forward(const at::Tensor& x, const at::Tensor& valid) {
  if (!slot || !slot->engaged()) {
    const auto inner = forward_together({gate_proj, up_proj}, x);
    return down_proj->forward(ops::swiglu(inner[0], inner[1]));
  }
  GRAFT_CHECK(
      !BatchRows::current(), "nn",
      "a mixture works on all rows of a batch alike; got a batch in parts of several adapters");
  check_no_adapter(gate_proj, "gate_proj");
  check_no_adapter(up_proj, "up_proj");
  check_no_adapter(down_proj, "down_proj");
  FrozenGatedMlp block = frozen();
  block.valid = valid;
  return slot->apply(block, x);
}

FrozenGatedMlp GatedMlpImpl::frozen() const {
  const auto layer = [](const Linear& linear) {
    return FrozenLinear{linear->weight, linear->bias};
  };
  return {layer(gate_proj), layer(up_proj), layer(down_proj)};
}

}  // namespace graft::nn
