#include <graft/adapters/lora.h>

#include "tests/support/adapter_kit.h"

namespace {

using graft::adapters::LoraOptions;
using graft::testing::MethodCase;

// r (in + out) with the kernel's elements counted as inputs; each of `groups` parts of B sees
// r / groups.
int64_t lora_count(const graft::nn::FrozenLayer& layer, int64_t rank) {
  const at::Tensor& weight = graft::nn::weight_of(layer);
  const auto* conv = std::get_if<graft::nn::FrozenConv>(&layer);
  const int64_t groups = conv == nullptr ? 1 : conv->groups;
  return rank * (weight.numel() / weight.size(0) * groups) + weight.size(0) * (rank / groups);
}

MethodCase lora_case(LoraOptions options) {
  MethodCase lora;
  lora.method = "lora";
  lora.recipe = [options](int64_t rank) mutable {
    options.rank = rank;
    return graft::adapters::make_recipe(options);
  };
  lora.count = [options](const graft::nn::FrozenLayer& layer, int64_t rank) {
    return lora_count(layer, rank) +
           (options.bias ? graft::nn::weight_of(layer).size(0) : int64_t{0});
  };
  // The factor that starts at zero learns first; its partner's gradient is a product with it.
  lora.zero_at_first = [](const std::string& kind) {
    return std::vector<std::string>{kind == "Embedding" ? "lora_B" : "lora_A"};
  };
  return lora;
}

}  // namespace

TEST_CASE("LoRA keeps the promises of adapters on every kind of layer", "[adapters][lora]") {
  graft::testing::run_adapter_kit(lora_case({.alpha = 3.0}));
}

TEST_CASE("LoRA with rsLoRA's scale, a bias and Gaussian A keeps them too", "[adapters][lora]") {
  MethodCase lora = lora_case({.alpha = 3.0, .rslora = true, .bias = true, .init = "gaussian"});
  lora.unfit = {"Embedding"};               // takes no lora bias
  lora.unmergeable = {"Linear", "Conv2d"};  // some of their cases have no bias to add to
  graft::testing::run_adapter_kit(lora);
}

TEST_CASE("LoRA that starts from the weight's own part keeps them too", "[adapters][lora][init]") {
  for (const std::string init : {"pissa", "pissa_niter_4", "olora", "nystrom"}) {
    INFO(init);
    MethodCase lora = lora_case({.alpha = 3.0, .init = init});
    lora.starts_to_rounding = true;
    lora.zero_at_first = [](const std::string&) { return std::vector<std::string>{}; };
    lora.reads_back = false;  // as the plain LoRA of twice the rank
    lora.unfit_layers = {"groups"};
    if (init == "nystrom") lora.training_lr = 0.002;  // W's rows and columns may be nearly parallel
    graft::testing::run_adapter_kit(lora);
  }
}
