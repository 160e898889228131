// Mixtures on a device: plans, the operations on rows of experts, whole blocks and mixtures on
// linear layers, by kernels and by LibTorch's operators, against the CPU's loops in fp64.
#include <graft/moe/adamole.h>
#include <graft/moe/arrow.h>
#include <graft/moe/llava_mole.h>
#include <graft/moe/lora_mixer.h>
#include <graft/moe/loramoe.h>
#include <graft/moe/meteora.h>
#include <graft/moe/mix_lora.h>
#include <graft/moe/mm_lora.h>
#include <graft/moe/mola.h>
#include <graft/moe/token_scope.h>
#include <graft/moe/xlora.h>

#include "src/ops/device_kernels.h"
#include "tests/cuda_glue/both_ways.h"

namespace {

using namespace graft::moe;
using namespace graft::testing;
namespace ops = graft::ops;
namespace nn = graft::nn;

const ops::Dropout kDropout{0.3, {11, 12, 13}};
constexpr int64_t kExperts = 5, kSlots = 2;

// Expert 3 has no token; with `unused` some tokens have one expert, or none.
at::Tensor some_experts(int64_t tokens, bool unused) {
  const at::Tensor experts = at::empty({tokens, kSlots}, at::kLong);
  for (int64_t t = 0; t < tokens; ++t) {
    experts[t][0] = unused && t % 7 == 2 ? -1 : (t * t) % 3;
    experts[t][1] = unused && (t % 7 == 2 || t % 7 == 5) ? -1 : t % 2 == 0 ? 4 : (t * t + 1) % 3;
  }
  return experts;
}

DispatchPlan plan_of(const at::Tensor& experts, int64_t count, const at::Device& device,
                     bool every_slot) {
  Routing routing;
  routing.experts = experts.to(device);
  routing.logits = at::zeros({experts.size(0), count}, at::TensorOptions(device));
  return dispatch(routing, every_slot);
}

// Random numbers that bf16 has too.
at::Tensor numbers(at::IntArrayRef shape, double deviation) {
  return (at::randn(shape) * deviation).to(at::kBFloat16).to(at::kFloat);
}

void fill(const at::Tensor& tensor, double deviation) {
  const at::NoGradGuard no_grad;
  at::Tensor(tensor).copy_(numbers(tensor.sizes(), deviation));
}

// The output y, and the gradients of x and of all parameters (zeros where there is none).
Tensors results_of(const at::Tensor& y, const at::Tensor& x, const torch::nn::Module& module,
                   const at::Tensor& penalty = {}) {
  const at::Tensor seed = seed_like(y).to(at::kBFloat16).to(y.scalar_type()).to(y.device());
  at::Tensor sum = (y * seed).sum();
  if (penalty.defined()) sum = sum.to(penalty.scalar_type()) + penalty;
  sum.backward();
  Tensors results = {y.detach(), x.grad()};
  for (const at::Tensor& p : module.parameters())
    results.push_back(p.grad().defined() ? p.grad() : at::zeros_like(p));
  return results;
}

using Results = std::function<Tensors(at::ScalarType type, const at::Device& device)>;

// `all`: that no way but the kernels' was taken.
void check_results(const Results& f, bool all = true) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const Tensors wanted = f(at::kDouble, at::kCPU);
    for (const bool kernels : {true, false}) {
      INFO(at::toString(type) << (kernels ? ", kernels" : ", LibTorch"));
      const OnDevice device(kernels);
      ops::reset_device_paths();
      const Tensors got = f(type, test_device());
      REQUIRE(got.size() == wanted.size());
      for (size_t i = 0; i < got.size(); ++i) {
        INFO("result " << i << " (0: the value, 1: the input's gradient)");
        CHECK(relative_error(got[i], wanted[i]) < (type == at::kFloat ? 4e-6 : 1.2e-2));
      }
      for (const ops::DevicePath& path : ops::device_paths()) {
        INFO(path.operation << ": " << path.reason);
        if (all || !kernels) CHECK(path.reason.empty() == kernels);
      }
    }
  }
}

// A block with this mixture; the masters are fp32, or fp64 in the reference.
Results block_results(MixLoraOptions options, bool padding) {
  return [=](at::ScalarType type, const at::Device& device) {
    at::manual_seed(2);
    nn::GatedMlp block(24, 40, /*bias=*/true);
    for (const at::Tensor& p : block->parameters()) fill(p, 0.2);
    block->to(device, type);
    const MixLora mixture = add_mixture(*block, options, {.name = "", .seed = 5});
    for (const auto& p : mixture->named_parameters()) {
      fill(p.value(), 0.4);
      const at::NoGradGuard no_grad;
      if (contains(p.key(), "magnitude")) at::Tensor(p.value()).abs_().add_(0.5);
    }
    const at::Tensor x = numbers({2, 37, 24}, 1.0).to(device, type).set_requires_grad(true);
    at::Tensor valid;
    if (padding) {
      valid = at::ones({2, 37}, at::kBool);
      valid[1].slice(0, 30).fill_(false);
      valid = valid.to(device);
    }
    block->train();
    const Tensors results = results_of(block->forward(x, valid), x, *mixture);
    CHECK(mixture->trained_tokens.sum().item<int64_t>() > 0);
    return results;
  };
}

MixLoraOptions block_options(Selection selection, ForwardPath path, bool dora = false) {
  return {.router = {.selection = selection, .experts = 4, .top_p = 0.6, .capacity = 6},
          .experts = {.rank = 3, .alpha = 6.0, .dropout = 0.25, .dora = dora},
          .path = path};
}

// A mixture's layer of 24 to 21 features.
template <class Method, class Options>
Results layer_results(const Options& options) {
  return [=](at::ScalarType type, const at::Device& device) {
    at::manual_seed(3);
    const nn::FrozenLinear base{numbers({21, 24}, 0.2).to(device, type),
                                numbers({21}, 1.0).to(device, type)};
    const auto method = std::make_shared<Method>(
        base, options, graft::adapters::LayerContext{.name = "q_proj", .seed = 4});
    for (const at::Tensor& p : method->parameters()) fill(p, 0.3);
    const at::Tensor x = numbers({2, 35, 24}, 1.0).to(device, type).set_requires_grad(true);
    method->train();
    const at::Tensor y = method->forward(base, x);
    at::Tensor penalty;
    if constexpr (requires { Method::penalty(std::vector<Method*>{}); })
      penalty = Method::penalty({method.get()});
    return results_of(y, x, *method, penalty);
  };
}

std::shared_ptr<const ExpertLibrary> some_library() {
  at::manual_seed(31);
  std::vector<ExpertLibrary::Adapter> adapters;
  for (int64_t rank = 1; rank <= 3; ++rank)
    adapters.push_back(
        {{"q_proj", {numbers({rank, 24}, 0.3), numbers({21, rank}, 0.3), 0.5 * rank}}});
  return std::make_shared<ExpertLibrary>(std::move(adapters));
}

}  // namespace

TEST_CASE("mixtures on a device: the plan is the CPU's", "[cuda][glue][mixture]") {
  for (const int64_t tokens : {0, 1, 23, 300}) {
    for (const bool unused : {false, true}) {
      const at::Tensor experts = some_experts(tokens, unused);
      const DispatchPlan wanted = plan_of(experts, kExperts, at::kCPU, false);
      for (const bool kernels : {true, false}) {
        for (const bool every_slot : {false, true}) {
          if (every_slot && unused) continue;
          INFO(tokens << " tokens" << (unused ? ", unused slots" : "")
                      << (kernels ? ", kernels" : ", LibTorch"));
          const OnDevice device(kernels);
          const DispatchPlan got = plan_of(experts, kExperts, test_device(), every_slot);
          CHECK(at::equal(got.rows.offsets.cpu(), wanted.rows.offsets));
          CHECK(at::equal(got.rows.token.cpu(), wanted.rows.token));
          CHECK(at::equal(got.rows.pair.cpu(), wanted.rows.pair));
          CHECK(at::equal(got.rows.token_offsets.cpu(), wanted.rows.token_offsets));
          CHECK(at::equal(got.rows.token_rows.cpu(), wanted.rows.token_rows));
          CHECK(got.rows.slots == wanted.rows.slots);
          CHECK(got.rows.routed() == wanted.rows.routed());
          CHECK(at::equal(got.counts().cpu(), wanted.counts()));
        }
      }
    }
  }
}

TEST_CASE("mixtures on a device: operations on rows", "[cuda][glue][mixture]") {
  at::manual_seed(4);
  for (const bool unused : {false, true}) {
    for (const auto [in, out, rank] : {std::array<int64_t, 3>{24, 40, 4}, {13, 21, 3}}) {
      INFO(in << " to " << out << (unused ? ", unused slots" : ""));
      const int64_t tokens = 150;
      const at::Tensor experts = some_experts(tokens, unused);
      const auto rows = [&](const at::Tensor& x) {
        return plan_of(experts, kExperts, x.device(), !unused).rows;
      };
      const int64_t M = plan_of(experts, kExperts, at::kCPU, false).rows.rows();
      const at::Tensor W = at::randn({out, in}).to(at::kBFloat16) * 0.2,
                       b = at::randn({out}).to(at::kBFloat16);
      const auto layer = [&](const Tensors& t, bool by_token) {
        const auto op = by_token ? ops::expert_linear : ops::expert_row_linear;
        const auto base = t[0].options().requires_grad(false);
        return op(t[0], W.to(base), b.to(base), {t[1], t[2], 1.7, kDropout}, rows(t[0]));
      };
      const at::Tensor A = at::randn({kExperts, rank, in}) * 0.3,
                       B = at::randn({kExperts, out, rank}) * 0.3;
      check_both_ways(
          "experts", [&](const Tensors& t) { return layer(t, true); },
          {at::randn({tokens, in}), A, B}, 1);
      check_both_ways(
          "experts", [&](const Tensors& t) { return layer(t, false); }, {at::randn({M, in}), A, B},
          1);
      const auto there_and_back = [&](const Tensors& t) {
        const ops::ExpertRows plan = rows(t[0]);
        const at::Tensor gathered = ops::gather_tokens(t[0], plan);
        return ops::combine_rows(gathered.to(t[1].scalar_type()), t[1], plan);
      };
      check_both_ways("experts", there_and_back, {at::randn({tokens, in}), at::rand({M})}, 1);
    }
  }
}

TEST_CASE("mixtures on a device: a MixLoRA block by every path", "[cuda][glue][mixture]") {
  using S = Selection;
  using P = ForwardPath;
  for (const P path : {P::combined, P::shared, P::literal}) {
    for (const bool padding : {false, true}) {
      INFO("path " << static_cast<int>(path) << (padding ? ", padding" : ""));
      check_results(block_results(block_options(S::softmax_top_k, path), padding));
    }
  }
  // LibTorch weighs what these select.
  for (const S selection : {S::top_p, S::switch_top_1, S::threshold}) {
    INFO(selection_name(selection));
    check_results(block_results(block_options(selection, P::combined), false), false);
  }
  check_results(block_results(block_options(S::softmax_top_k, P::shared, /*dora=*/true), true),
                false);
  MixLoraOptions one = block_options(S::softmax_top_k, P::combined);
  one.router.experts = one.router.top_k = 1;
  check_results(block_results(one, false));
}

TEST_CASE("mixtures on a device: LibTorch takes ranks that kernels do not",
          "[cuda][glue][mixture]") {
  at::manual_seed(5);
  const at::Tensor experts = some_experts(20, true), W = at::randn({72, 70}) * 0.2;
  const auto f = [&](const Tensors& t) {
    const auto rows = plan_of(experts, kExperts, t[0].device(), false).rows;
    return ops::expert_linear(t[0], W.to(t[0].options().requires_grad(false)), {},
                              {t[1], t[2], 0.5, kDropout}, rows);
  };
  const Tensors in = {at::randn({20, 70}), at::randn({kExperts, 66, 70}) * 0.2,
                      at::randn({kExperts, 72, 66}) * 0.2};
  const Tensors wanted = run(f, to(in, at::kDouble));
  const OnDevice device;
  ops::reset_device_paths();
  const Tensors got = run(f, to(in, test_device()));
  for (size_t i = 0; i < got.size(); ++i) CHECK(relative_error(got[i], wanted[i]) < 3e-6);
  CHECK(contains(ops::describe_device_paths(), "by LibTorch: rank not in [1, 64]"));
}

TEST_CASE("mixtures on a device: on linear layers", "[cuda][glue][mixture]") {
  check_results(layer_results<MolaImpl>(MolaOptions{
      .rank = 2, .alpha = 3.0, .dropout = 0.25, .experts = {4}, .top_k = 2, .balance_loss = 0.5}));
  check_results(layer_results<LoraMoeImpl>(
      LoraMoeOptions{.rank = 3, .alpha = 3.0, .dropout = 0.25, .experts = 4, .balance_loss = 0.5}));
  check_results(layer_results<AdaMoleImpl>(AdaMoleOptions{
                    .rank = 2, .alpha = 3.0, .dropout = 0.25, .experts = 4, .balance_loss = 0.5}),
                false);
  check_results(layer_results<LlavaMoleImpl>(
                    LlavaMoleOptions{.rank = 2, .alpha = 3.0, .dropout = 0.25, .experts = 4}),
                false);
  check_results(layer_results<LoraMixerImpl>(
      LoraMixerOptions{.rank = 2, .alpha = 3.0, .experts = 4, .top_k = 2}));
  check_results(layer_results<MeteoraImpl>(MeteoraOptions{.experts = some_library(), .top_k = 2}));
  check_results(layer_results<ArrowImpl>(ArrowOptions{.experts = some_library(), .top_k = 2}));
  check_results(layer_results<XloraImpl>(
      XloraOptions{.experts = some_library(), .hidden_size = 8, .scaling_pass_value = 0.5}));
  const TokenScope scope({.kinds = at::arange(70).remainder(2).view({2, 35})});
  check_results(
      layer_results<MmLoraImpl>(MmLoraOptions{.ranks = {1, 3}, .scale = 2.0, .dropout = 0.25}));
}
