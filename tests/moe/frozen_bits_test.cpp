// What a mixture does not train keeps its bits while the rest learns.
#include <graft/moe/llava_mole.h>
#include <graft/moe/lora_mixer.h>
#include <graft/moe/meteora.h>
#include <graft/moe/mix_lora_recipe.h>
#include <graft/moe/mm_lora.h>
#include <graft/moe/token_scope.h>
#include <graft/moe/xlora.h>
#include <graft/train/adamw.h>
#include <graft/train/parameter_groups.h>

#include "tests/moe/mixture_tests.h"
#include "tests/support/tiny_blocks.h"

namespace {

using namespace graft::moe;
using graft::adapters::PlainLora;
using graft::testing::BlockDecoder;
using graft::testing::GraftDecoder;
using graft::testing::random;
using graft::testing::randomise;
using graft::testing::some_tokens;

const std::vector<std::string> kLayers = {"model.layers.0.q_proj", "model.layers.1.q_proj"};

// Three stored adapters for the decoder's q_proj.
std::shared_ptr<const ExpertLibrary> stored_adapters() {
  at::manual_seed(31);
  std::vector<ExpertLibrary::Adapter> adapters(3);
  for (size_t e = 0; e < adapters.size(); ++e)
    for (const std::string& layer : kLayers)
      adapters[e].emplace(layer, PlainLora{random({2, GraftDecoder::kWidth}),
                                           random({GraftDecoder::kWidth, 2}), 1.0});
  return std::make_shared<ExpertLibrary>(std::move(adapters));
}

// Values that nobody may write to, and what they were.
struct Frozen {
  void add(const std::vector<at::Tensor>& tensors) {
    for (const at::Tensor& tensor : tensors) before.emplace_back(tensor, tensor.detach().clone());
  }
  bool same() const {
    return std::all_of(before.begin(), before.end(),
                       [](const auto& pair) { return at::equal(pair.first, pair.second); });
  }
  std::vector<std::pair<at::Tensor, at::Tensor>> before;
};

// Attaches, and takes five steps of AdamW with its decay: all that is trained moves, the loss
// falls, and the model's own values and stored adapters stay. `scope` is alive in a pass.
template <class Model, class Options, class Scope>
void check_five_steps(const Options& options, const graft::AttachOptions& where,
                      const Scope& scope) {
  Model model;
  Frozen frozen;
  frozen.add(model.parameters());
  auto adapter = graft::attach(model, options, where);
  INFO(adapter.recipe().method());
  randomise(adapter.parameters());
  if constexpr (requires { options.experts->count(); })  // stored adapters
    for (const auto& layer : adapter.layers()) {
      const auto& method = static_cast<typename Options::Method&>(*layer.adapter);
      frozen.add({method.experts.A, method.experts.B});
    }
  Frozen trained;
  trained.add(adapter.parameters());
  REQUIRE_FALSE(trained.before.empty());
  graft::train::AdamW optimizer(graft::train::parameter_groups(adapter, 0.1));
  double first = 0, last = 0;
  for (int64_t step = 0; step < 5; ++step, optimizer.zero_grad()) {
    adapter.begin_step({.step = step});
    [[maybe_unused]] const auto in_force = scope(adapter);
    at::Tensor loss = (model.forward(some_tokens()) - 1).square().mean();
    last = loss.template item<double>();
    if (step == 0) first = last;
    if (const at::Tensor penalty = adapter.penalty(); penalty.defined()) loss = loss + penalty;
    loss.backward();
    optimizer.step(0.01);
    adapter.end_step({.step = step});
  }
  CHECK(last < first);
  for (const auto& [now, then] : trained.before) CHECK_FALSE(at::equal(now, then));
  CHECK(frozen.same());
}

template <class Model, class Options>
void check_five_steps(const Options& options, const graft::AttachOptions& where = {}) {
  check_five_steps<Model>(options, where, [](const auto&) { return 0; });
}

}  // namespace

TEST_CASE("T26 what is frozen keeps its bits while experts and router learn", "[moe][mixture]") {
  const graft::AttachOptions attention{.targets = {"q_proj", "v_proj"}};
  graft::testing::for_each_method([&](auto options) {
    options.balance_loss = 0.01;
    check_five_steps<GraftDecoder>(options, attention);
  });
  check_five_steps<GraftDecoder>(LlavaMoleOptions{.rank = 2}, attention);
  check_five_steps<GraftDecoder>(LoraMixerOptions{.rank = 2, .experts = 4, .top_k = 2}, attention);
  check_five_steps<GraftDecoder>(MmLoraOptions{.ranks = {1, 2}}, attention, [](const auto&) {
    return std::make_unique<TokenScope>(
        TokenFacts{.kinds = at::arange(10).remainder(2).view({2, 5})});
  });
}

TEST_CASE("T26 MixLoRA's blocks keep their bits, and with DoRA their magnitudes learn",
          "[moe][mixlora]") {
  for (const bool dora : {false, true}) {
    MixLoraAdapterOptions options{
        .mixture = {.router = {.experts = 3, .top_k = 2}, .experts = {.rank = 2, .alpha = 4.0}}};
    options.mixture.experts.dora = dora;
    check_five_steps<BlockDecoder>(options);
  }
}

TEST_CASE("T26 stored adapters keep their bits while MeteoRA's gate or X-LoRA's classifier learns",
          "[moe][library]") {
  const auto experts = stored_adapters();
  const graft::AttachOptions where{.targets = graft::nn::Selector(kLayers)};
  check_five_steps<GraftDecoder>(MeteoraOptions{.experts = experts, .top_k = 2}, where);
  const at::Tensor hidden = random({2, 5, 6}).to(at::kFloat);
  check_five_steps<GraftDecoder>(XloraOptions{.experts = experts, .hidden_size = 6}, where,
                                 [&](auto& adapter) {
                                   auto& layer = xlora_of(*adapter.layers()[0].adapter);
                                   return std::make_unique<XloraScope>(layer, hidden);
                                 });
}
