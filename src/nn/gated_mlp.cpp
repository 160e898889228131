#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/nn/adapter_slot.h>
#include <graft/nn/batch_rows.h>
#include <graft/nn/gated_mlp.h>
#include <graft/ops/swiglu.h>

namespace graft::nn {
namespace {

constexpr const char* kChildName = "mixture";

void check_no_adapter(const Linear& layer, const char* name) {
  GRAFT_CHECK(!layer->slot || !layer->slot->engaged(), "nn",
              "a block with a mixture takes no adapter on its layers; got one on ", name);
}

}  // namespace

GatedMlpImpl::GatedMlpImpl(int64_t hidden, int64_t intermediate, bool bias)
    : torch::nn::Module("GatedMlp") {
  const auto layer = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, Linear(torch::nn::LinearOptions(in, out).bias(bias)));
  };
  gate_proj = layer("gate_proj", hidden, intermediate);
  up_proj = layer("up_proj", hidden, intermediate);
  down_proj = layer("down_proj", intermediate, hidden);
}

at::Tensor GatedMlpImpl::forward(const at::Tensor& x, const at::Tensor& valid) {
  if (!mixture_) return down_proj->forward(ops::swiglu(gate_proj->forward(x), up_proj->forward(x)));
  GRAFT_CHECK(
      !BatchRows::current(), "nn",
      "a mixture works on all rows of a batch alike; got a batch in parts of several adapters");
  check_no_adapter(gate_proj, "gate_proj");
  check_no_adapter(up_proj, "up_proj");
  check_no_adapter(down_proj, "down_proj");
  return mixture_->apply(frozen(), x, valid);
}

void GatedMlpImpl::set_mixture(std::shared_ptr<MlpMixture> mixture) {
  GRAFT_CHECK(mixture != nullptr && mixture_ == nullptr, "nn", "a block takes one mixture; got ",
              mixture_ ? "a second one" : "none");
  mixture->train(is_training());
  mixture_ = register_module(kChildName, std::move(mixture));
}

void GatedMlpImpl::remove_mixture() {
  if (!mixture_) return;
  unregister_module(kChildName);
  mixture_.reset();
}

FrozenGatedMlp GatedMlpImpl::frozen() const {
  const auto layer = [](const Linear& linear) {
    return FrozenLinear{linear->weight, linear->bias};
  };
  return {layer(gate_proj), layer(up_proj), layer(down_proj)};
}

}  // namespace graft::nn
