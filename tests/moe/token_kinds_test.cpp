// Mixtures that hear of which kind a token is: MM-LoRA and LoRA-Mixer.
#include <graft/adapters/lora.h>
#include <graft/moe/lora_mixer.h>
#include <graft/moe/mm_lora.h>
#include <graft/moe/token_scope.h>

#include <cmath>
#include <thread>

#include "tests/moe/mixture_tests.h"
#include "tests/support/adapter_kit.h"

namespace {

using namespace graft::moe;
using graft::attach;
using graft::attach_from;
using graft::nn::FrozenLinear;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::testing::make_random;
using graft::testing::random;
using graft::testing::randomise;
using graft::testing::some_input;
using graft::testing::some_linear;
using graft::testing::some_tokens;
using graft::testing::uneven_sum;

const MmLoraOptions kMmLora{.ranks = {1, 3}, .scale = 2.0};
const LoraMixerOptions kMixer{.rank = 2, .alpha = 3.0, .experts = 4, .top_k = 2};

at::Tensor some_kinds() {
  return at::tensor({0, 1, 1, 0, 1, 1, 1, 0, 0, 1}, at::kLong).view({2, 5});
}

}  // namespace

TEST_CASE("MM-LoRA keeps the promises of adapters", "[moe][mm_lora]") {
  graft::testing::MethodCase method;
  method.method = "mm-lora";
  // The rank of both kinds; all tokens are of the second one's, so that the first learns nothing.
  method.recipe = [](int64_t rank) {
    return graft::adapters::make_recipe(MmLoraOptions{.ranks = {rank, rank}, .scale = 1.5});
  };
  method.count = [](const graft::nn::FrozenLayer& layer, int64_t rank) {
    const at::Tensor& weight = graft::nn::weight_of(layer);
    return 2 * rank * (weight.size(0) + weight.size(1));
  };
  method.zero_at_first = [](const std::string&) { return std::vector<std::string>{"lora_A"}; };
  method.unfit = {"Embedding", "Conv"};
  method.unmergeable = {"Linear"};  // I3: which expert works depends on the token
  graft::testing::run_adapter_kit(method);
}

TEST_CASE("LoRA-Mixer keeps the promises of adapters", "[moe][lora_mixer]") {
  graft::testing::MethodCase method;
  method.method = "lora-mixer";
  method.recipe = [](int64_t rank) { return graft::testing::recipe_of_rank(kMixer, rank); };
  method.count = [](const graft::nn::FrozenLayer& layer, int64_t rank) {
    const at::Tensor& weight = graft::nn::weight_of(layer);
    return 4 * rank * (weight.size(0) + weight.size(1)) + 4 * weight.size(1);
  };
  method.zero_at_first = [](const std::string&) {
    return std::vector<std::string>{"lora_A", "weight"};
  };
  method.unfit = {"Embedding", "Conv"};
  method.unmergeable = {"Linear"};  // I3: gates depend on the input
  graft::testing::run_adapter_kit(method);
}

TEST_CASE("T22 MM-LoRA gives every token its kind's expert, of its own rank", "[moe][mm_lora]") {
  const FrozenLinear base = some_linear();
  auto method = make_random<MmLoraImpl>(base, kMmLora);
  const at::Tensor x = some_input();
  const TokenScope scope({.kinds = some_kinds()});
  const at::Tensor y = method.forward(base, x);
  for (int64_t t = 0; t < 10; ++t) {
    const auto lora = method.extract_expert(some_kinds().view({-1})[t].item<int64_t>());
    CHECK(lora.scale == 2.0);
    const at::Tensor token = x.view({10, 4})[t];
    CHECK(distance(y.view({10, 6})[t],
                   at::linear(token, base.weight + 2 * lora.B.mm(lora.A), base.bias)) < 1e-13);
  }
  // Mask and experts swapped together.
  auto swapped = make_random<MmLoraImpl>(base, MmLoraOptions{.ranks = {3, 1}});
  {
    const at::NoGradGuard no_grad;
    for (int64_t e = 0; e < 2; ++e) {
      const auto [A, B] = swapped.experts.expert(e);
      const auto lora = method.extract_expert(1 - e);
      at::Tensor(A).copy_(lora.A);
      at::Tensor(B).copy_(lora.B);
    }
  }
  const TokenScope other({.kinds = 1 - some_kinds()});
  CHECK(distance(swapped.forward(base, x), y) < 1e-14);
}

TEST_CASE("T22 MM-LoRA on text alone is plain LoRA, and the visual gradient is exactly 0",
          "[moe][mm_lora]") {
  const FrozenLinear base = some_linear();
  auto method = make_random<MmLoraImpl>(base, kMmLora);
  graft::adapters::LoraImpl lora(base, {.rank = 3, .alpha = 6.0}, {"q_proj", 1});
  const auto language = method.extract_expert(1);
  {
    const at::NoGradGuard no_grad;
    lora.lora_A.copy_(language.A);
    lora.lora_B.copy_(language.B);
  }
  const at::Tensor x = some_input();
  const at::Tensor y = method.forward(base, x);  // no kinds: all language
  CHECK(distance(y, lora.forward(base, x)) < 1e-13);
  {
    const TokenScope scope({.kinds = at::ones({2, 5}, at::kLong)});
    CHECK(at::equal(method.forward(base, x), y));
  }
  uneven_sum(y).backward();
  const at::Tensor dA = method.experts.A.grad(), dB = method.experts.B.grad();
  CHECK(dA.narrow(0, 0, 1).count_nonzero().item<int64_t>() == 0);
  CHECK(dB.narrow(1, 0, 1).count_nonzero().item<int64_t>() == 0);
  CHECK(dA.narrow(0, 1, 3).count_nonzero().item<int64_t>() == 12);
  uneven_sum(lora.forward(base, x)).backward();
  CHECK(distance(dA.narrow(0, 1, 3), lora.lora_A.grad()) < 1e-13);
}

TEST_CASE("scopes of tokens nest, and are those of their thread", "[moe][mm_lora]") {
  const TokenScope outer({.kinds = some_kinds()});
  {
    const TokenScope inner({.sequence_types = at::zeros({2}, at::kLong)});
    CHECK_FALSE(TokenScope::current().kinds.defined());
  }
  CHECK(TokenScope::current().kinds.defined());
  bool seen = true;
  std::thread([&] { seen = TokenScope::current().kinds.defined(); }).join();
  CHECK_FALSE(seen);
  CHECK(
      contains(error_of([] { TokenScope({.kinds = at::zeros({2})}); }), "[tokens] kinds must be"));
  CHECK(contains(error_of([] { TokenScope({.sequence_types = at::zeros({2})}); }),
                 "[tokens] sequence_types must be Long"));
}

TEST_CASE("MM-LoRA refuses kinds that are not there", "[moe][mm_lora]") {
  const FrozenLinear base = some_linear();
  auto method = make_random<MmLoraImpl>(base, kMmLora);
  const auto with = [&](const at::Tensor& kinds) {
    const TokenScope scope({.kinds = kinds});
    return error_of([&] { method.forward(base, some_input()); });
  };
  CHECK(contains(with(some_kinds() * 2), "must be in [0, 2); got 0 to 2 (layer 'q_proj')"));
  CHECK(contains(with(at::ones({3}, at::kLong)), "one kind a token, 10; got kinds of [3]"));
  CHECK(contains(error_of([] { MmLoraOptions{.ranks = {}}.validate(); }), "at least one kind"));
  CHECK(contains(error_of([] { MmLoraOptions{.default_kind = 2}.validate(); }),
                 "default_kind must be one of the 2 kinds; got 2"));
  CHECK(contains(error_of([] { MmLoraOptions{.scale = 0}.validate(); }), "finite and not 0"));
  GraftDecoder model;
  CHECK(contains(error_of([&] {
                   attach(model, kMmLora, {.targets = {"q_proj"}, .rank_pattern = {{"q_proj", 2}}});
                 }),
                 "this method has no rank"));
}

TEST_CASE("LoRA-Mixer goes from labels to the router while it trains", "[moe][lora_mixer]") {
  LoraMixerOptions options = kMixer;
  options.hard_steps = 4;
  const FrozenLinear base = some_linear();
  auto method = make_random<LoraMixerImpl>(base, options);
  const at::Tensor x = some_input(), kinds = some_kinds() * 3;
  const at::Tensor p = at::softmax(at::linear(x.view({10, 4}), method.router->weight), -1),
                   hard = at::one_hot(kinds.view({-1}), 4).to(at::kDouble);
  CHECK(distance(method.gates(x), p) < 1e-14);  // no labels
  const TokenScope scope({.kinds = kinds});
  for (const int64_t step : {0, 1, 3, 4, 9}) {
    LoraMixerImpl::begin_step({&method}, {.step = step});
    const double a = std::min(static_cast<double>(step) / 4, 1.0);
    CHECK(distance(method.gates(x), (1 - a) * hard + a * p) < 1e-14);
  }
  {
    at::Tensor valid = at::ones({2, 5}, at::kBool);
    valid[1][2] = false;
    const TokenScope padded({.valid = valid, .kinds = kinds});
    LoraMixerImpl::begin_step({&method}, {.step = 1});
    CHECK(method.gates(x)[7].count_nonzero().item<int64_t>() == 0);
  }
  // Labels alone are MM-LoRA.
  LoraMixerImpl::begin_step({&method}, {.step = 0});
  CHECK(at::equal(method.gates(x), hard));
  const TokenScope wrong({.kinds = kinds + 1});
  CHECK(contains(error_of([&] { method.gates(x); }), "must be in [0, 4); got 1 to 4"));
}

TEST_CASE("LoRA-Mixer's balance loss is the mean over layers of the first choices'",
          "[moe][lora_mixer]") {
  const Routing even = route({.experts = 2, .top_k = 2}, at::zeros({4, 2}, at::kDouble)),
                one = route({.experts = 2, .top_k = 2},
                            at::tensor({9.0, 0.0, 9.0, 0.0}, at::kDouble).view({2, 2}));
  const double p = 1 / (1 + std::exp(-9.0));
  CHECK(std::abs(LoraMixerImpl::balance({even, one}, kMixer).item<double>() - (1 + 2 * p) / 2) <
        1e-12);
}

TEST_CASE("LoRA-Mixer's best k work when training is over", "[moe][lora_mixer]") {
  auto method = make_random<LoraMixerImpl>(some_linear(), kMixer);
  method.eval();
  const at::Tensor x = some_input();
  const at::Tensor l = at::linear(x.view({10, 4}), method.router->weight);
  const auto [values, indices] = l.topk(2);
  CHECK(distance(method.gates(x), at::zeros_like(l).scatter(1, indices, at::softmax(values, -1))) <
        1e-14);
}

TEST_CASE("MM-LoRA and LoRA-Mixer read back from their folders",
          "[moe][mm_lora][lora_mixer][files]") {
  const auto check = [](const auto& options) {
    const graft::testing::TempFolder saved;
    GraftDecoder model;
    auto adapter = attach(model, options, {.targets = {"q_proj", "v_proj"}});
    graft::testing::check_reads_back(model, adapter, saved.path());
    CHECK(contains(error_of([&] { adapter.merge(); }), "a mixture cannot be merged"));
  };
  check(MmLoraOptions{
      .ranks = {1, 3, 2}, .scale = 1.5, .dropout = 0.1, .init = "gaussian", .default_kind = 2});
  check(
      LoraMixerOptions{.rank = 2, .experts = 3, .top_k = 2, .hard_steps = 7, .balance_loss = 0.5});
}
