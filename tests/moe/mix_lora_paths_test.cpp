// The three ways to compute a mixture, held to the formula and to each other.
#include <ATen/ATen.h>
#include <graft/moe/mix_lora.h>

#include "tests/moe/mix_lora_cases.h"

namespace {

using namespace graft::moe;
using namespace graft::testing;

// Output and every gradient: of x and of the mixture's parameters.
struct Result {
  at::Tensor y;
  NamedTensors gradients;
};

Result result_of(const at::Tensor& y, const at::Tensor& x, const NamedTensors& leaves) {
  std::vector<at::Tensor> tensors = {x};
  for (const auto& leaf : leaves) tensors.push_back(leaf.second);
  const auto found =
      torch::autograd::grad({uneven_sum(y)}, tensors, {}, /*retain_graph=*/true, false,
                            /*allow_unused=*/true);
  Result result{y.detach(), {{"x", found[0]}}};
  for (size_t i = 0; i < leaves.size(); ++i)
    result.gradients.emplace_back(
        leaves[i].first, found[i + 1].defined() ? found[i + 1] : at::zeros_like(leaves[i].second));
  return result;
}

void check_same(const Result& found, const Result& expected, double tolerance) {
  CHECK(distance(found.y, expected.y) < tolerance);
  for (size_t i = 0; i < expected.gradients.size(); ++i) {
    INFO("gradient of " << expected.gradients[i].first);
    CHECK(distance(found.gradients[i].second, expected.gradients[i].second) < tolerance);
  }
}

// Every legal path of these options, and the formula, on some tokens.
void check_paths(MixLoraOptions options, bool bias, const at::Tensor& x_in,
                 const at::Tensor& valid = {}, double tolerance = 1e-11) {
  std::vector<ForwardPath> paths = {ForwardPath::literal, ForwardPath::shared};
  if (!options.experts.dora) paths.push_back(ForwardPath::combined);
  for (const ForwardPath path : paths) {
    INFO("path " << static_cast<int>(path));
    options.path = path;
    MixtureBlock m(options, bias);
    const at::Tensor x = x_in.clone().set_requires_grad(true);
    const at::Tensor y = m.block->forward(x, valid);
    if (valid.defined())
      CHECK(at::equal((m.mixture->routing().experts >= 0).any(-1), valid.reshape({-1})));
    std::vector<graft::random::MaskKey> keys;
    if (options.experts.dropout > 0)
      for (const char* name : {"gate_proj", "up_proj", "down_proj"})
        keys.push_back({5, static_cast<uint32_t>(graft::random::hash_name(name)), 0});
    const at::Tensor plain =
        plain_mixture(m, x.reshape({-1, kHidden}), m.mixture->routing(), keys).view(x.sizes());
    const Result found = result_of(y, x, m.leaves());
    check_same(found, result_of(plain, x, m.leaves()), tolerance);
  }
}

at::Tensor tokens(int64_t count = 9) {
  at::manual_seed(12);
  return at::randn({count, kHidden}, at::kDouble);
}

MixLoraOptions options_of(int64_t experts, int64_t k, double dropout = 0.0) {
  return {.router = {.experts = experts, .top_k = k},
          .experts = {.rank = 2, .alpha = 3.0, .dropout = dropout}};
}

}  // namespace

TEST_CASE("T9 literal, shared and combined equal the formula, K from 1 to E", "[moe][mixlora]") {
  for (const int64_t k : {1, 2, 3, 4})
    for (const bool bias : {false, true})
      for (const double dropout : {0.0, 0.3}) {
        INFO("K " << k << ", bias " << bias << ", p " << dropout);
        check_paths(options_of(4, k, dropout), bias, tokens());
      }
}

TEST_CASE("T9 every selection, with weights that do not sum to 1 and biases", "[moe][mixlora]") {
  for (const Selection selection : {Selection::dense, Selection::top_p, Selection::switch_top_1,
                                    Selection::threshold, Selection::biased}) {
    INFO(selection_name(selection));
    MixLoraOptions options = options_of(4, 2, 0.2);
    options.router.selection = selection;
    options.router.capacity = 2;
    options.router.scale = selection == Selection::biased ? 2.5 : 1.0;
    check_paths(options, true, tokens().view({3, 3, kHidden}));
  }
  MixLoraOptions plain = options_of(4, 2);
  plain.router.renormalise = false;
  check_paths(plain, true, tokens());
}

TEST_CASE("T9 padding, one token, no token, all tokens on one expert", "[moe][mixlora]") {
  const at::Tensor valid = at::tensor({1, 1, 0, 1, 0, 1, 1, 0, 1}).to(at::kBool);
  check_paths(options_of(4, 2, 0.3), true, tokens(), valid);
  check_paths(options_of(4, 2), true, tokens(1));
  check_paths(options_of(4, 1, 0.3), true, tokens(0));
  // The router is random, the token is one: five times the same choice, four experts without work.
  check_paths(options_of(5, 1, 0.3), true, tokens(1).expand({5, kHidden}).contiguous());
  check_paths(options_of(5, 2, 0.3), false, tokens(1).expand({5, kHidden}).contiguous());
  // One expert alone at work whose weight is not 1.
  MixLoraOptions weighted = options_of(5, 1, 0.3);
  weighted.router.renormalise = false;
  check_paths(weighted, true, tokens(1).expand({5, kHidden}).contiguous());
  // One expert of several slots: its masks are still those of the pairs.
  MixLoraOptions one = options_of(4, 2, 0.3);
  one.router.selection = Selection::top_p;
  one.router.top_p = 0.01;
  check_paths(one, true, tokens(1).expand({5, kHidden}).contiguous());
}

TEST_CASE("T9 DoRA experts: literal and shared equal the formula, norm held constant",
          "[moe][mixlora]") {
  for (const bool bias : {false, true})
    for (const double dropout : {0.0, 0.3}) {
      MixLoraOptions options = options_of(4, 2, dropout);
      options.experts.dora = true;
      check_paths(options, bias, tokens());
      // Padding is the plain base's: no expert's magnitude scales it.
      const at::Tensor valid = at::tensor({1, 1, 0, 1, 0, 1, 1, 0, 1}).to(at::kBool);
      check_paths(options, bias, tokens(), valid);
    }
}

TEST_CASE("T10 DoRA experts are not combined before the down projection", "[moe][mixlora]") {
  MixLoraOptions options = options_of(4, 2);
  options.experts.dora = true;
  CHECK(options.resolved_path() == ForwardPath::shared);
  CHECK(options_of(4, 2).resolved_path() == ForwardPath::combined);
  options.path = ForwardPath::combined;
  CHECK(contains(error_of([&] { options.validate(); }), "got path=combined with dora=true"));
  options.path = ForwardPath::automatic;
  MixtureBlock m(options, false);
  CHECK(contains(error_of([&] { m.mixture->down_proj->layer(m.block->frozen().down); }),
                 "[mixlora] DoRA experts cannot be combined before the down projection"));
}

TEST_CASE("the mixture's gradients are those of central differences", "[moe][mixlora]") {
  for (const bool dora : {false, true}) {
    MixLoraOptions options = options_of(3, 2);
    options.experts.dora = dora;
    MixtureBlock m(options, true);
    const at::Tensor x = tokens(4).set_requires_grad(true);
    NamedTensors leaves = {{"x", x}};
    for (const auto& leaf : m.leaves())
      // The norm is a constant to DoRA's gradients, not to differences.
      if (!dora || leaf.first.find("lora_A") == std::string::npos)
        if (!dora || leaf.first.find("lora_B") == std::string::npos) leaves.push_back(leaf);
    check_leaf_gradients([&] { return m.block->forward(x); }, leaves);
  }
}

TEST_CASE("the mixture gives the same bits whatever the number of threads", "[moe][mixlora]") {
  const int before = at::get_num_threads();
  std::vector<Result> results;
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    MixtureBlock m(options_of(4, 2, 0.3), true, at::kFloat);
    const at::Tensor x = tokens(200).to(at::kFloat).set_requires_grad(true);
    results.push_back(result_of(m.block->forward(x), x, m.leaves()));
  }
  at::set_num_threads(before);
  for (const Result& result : {results[1], results[2]}) {
    CHECK(at::equal(result.y, results[0].y));
    for (size_t i = 0; i < result.gradients.size(); ++i)
      CHECK(at::equal(result.gradients[i].second, results[0].gradients[i].second));
  }
}
