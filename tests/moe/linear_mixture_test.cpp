// What every mixture on a linear layer must do; the methods' own formulas have tests of their own.
#include <graft/adapters/lora.h>
#include <graft/io/safetensors.h>
#include <graft/moe/token_scope.h>

#include <nlohmann/json.hpp>

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
using graft::testing::for_each_method;
using graft::testing::GraftDecoder;
using graft::testing::kAdaMole;
using graft::testing::kLoraMoe;
using graft::testing::kMola;
using graft::testing::make_random;
using graft::testing::MethodOf;
using graft::testing::permute_experts;
using graft::testing::random;
using graft::testing::randomise;
using graft::testing::some_input;
using graft::testing::some_linear;
using graft::testing::some_tokens;
using graft::testing::sum_over_experts;

// Joins the kit: E experts of rank r, and `head` numbers an input for the gates and beside them.
template <class Options>
graft::testing::MethodCase mixture_case(Options options, int64_t experts, int64_t head_rows,
                                        int64_t head_offsets = 0) {
  graft::testing::MethodCase method;
  method.method = Options::Method::kName;
  method.recipe = [options](int64_t rank) { return graft::testing::recipe_of_rank(options, rank); };
  method.count = [=](const graft::nn::FrozenLayer& layer, int64_t rank) {
    const at::Tensor& weight = graft::nn::weight_of(layer);
    return experts * rank * (weight.size(0) + weight.size(1)) + head_rows * weight.size(1) +
           head_offsets;
  };
  // While B is 0 neither A nor the gates have a say.
  method.zero_at_first = [](const std::string&) {
    return std::vector<std::string>{"lora_A", "weight", "threshold_weight", "threshold_bias"};
  };
  method.unfit = {"Embedding", "Conv"};
  method.unmergeable = {"Linear"};  // I3: gates depend on the input; refused below
  return method;
}

}  // namespace

TEST_CASE("MoLA keeps the promises of adapters", "[moe][mola]") {
  graft::testing::run_adapter_kit(mixture_case(kMola, 4, 4));
}

TEST_CASE("LoRAMoE keeps the promises of adapters", "[moe][loramoe]") {
  graft::testing::run_adapter_kit(mixture_case(kLoraMoe, 4, 4));
}

TEST_CASE("AdaMoLE keeps the promises of adapters", "[moe][adamole]") {
  graft::testing::run_adapter_kit(mixture_case(kAdaMole, 4, 5, 1));
}

TEST_CASE("a mixture is the base and the weighted sum of its experts", "[moe][mixture]") {
  for_each_method([](auto options) {
    using Method = MethodOf<decltype(options)>;
    INFO(Method::kName);
    options.alpha = 5.0;
    options.rslora = true;
    const FrozenLinear base = some_linear();
    auto method = make_random<Method>(base, options);
    const at::Tensor x = some_input();
    const at::Tensor y = method.forward(base, x), g = method.gates(x);
    CHECK(distance(y, sum_over_experts(method, base, x, g)) < 1e-13);
    CHECK(distance(g.sum(1), at::ones({10}, at::kDouble)) < 1e-14);
    CHECK(std::abs(method.extract_expert(0).scale - 5.0 / std::sqrt(2.0)) < 1e-15);
  });
}

TEST_CASE("I2 equal experts are plain LoRA whatever the router says", "[moe][mixture]") {
  for_each_method([](auto options) {
    using Method = MethodOf<decltype(options)>;
    INFO(Method::kName);
    const FrozenLinear base = some_linear();
    auto method = make_random<Method>(base, options);
    graft::adapters::LoraImpl lora(base, {.rank = 2, .alpha = 3.0}, {"q_proj", 1});
    {
      const at::NoGradGuard no_grad;
      lora.lora_A.normal_();
      lora.lora_B.normal_();
      method.experts.A.copy_(lora.lora_A.repeat({4, 1}));
      method.experts.B.copy_(lora.lora_B.repeat({1, 4}));
    }
    CHECK(distance(method.forward(base, some_input()), lora.forward(base, some_input())) < 1e-13);
  });
}

TEST_CASE("I3 one expert is plain LoRA, bit for bit", "[moe][mixture]") {
  const FrozenLinear base = some_linear();
  graft::adapters::LoraImpl lora(base, {.rank = 2, .alpha = 3.0, .dropout = 0.3}, {"q_proj", 1});
  randomise(lora.parameters());
  const auto check = [&](auto options) {
    using Method = MethodOf<decltype(options)>;
    INFO(Method::kName);
    options.dropout = 0.3;
    auto method = make_random<Method>(base, options);
    const at::NoGradGuard no_grad;
    method.experts.A.copy_(lora.lora_A);
    method.experts.B.copy_(lora.lora_B);
    lora.set_counters({0});
    CHECK(at::equal(method.forward(base, some_input()), lora.forward(base, some_input())));
  };
  MolaOptions mola = kMola;
  mola.experts = {1};  // and top_k falls to 1
  check(mola);
  LoraMoeOptions loramoe = kLoraMoe;
  loramoe.experts = 1;
  check(loramoe);
  AdaMoleOptions adamole = kAdaMole;
  adamole.experts = 1;
  check(adamole);
}

TEST_CASE("T7 tokens and experts may change places", "[moe][mixture]") {
  for_each_method([](auto options) {
    using Method = MethodOf<decltype(options)>;
    INFO(Method::kName);
    const FrozenLinear base = some_linear();
    auto method = make_random<Method>(base, options);
    const at::Tensor x = some_input().view({10, 4});
    const at::Tensor y = method.forward(base, x);
    const at::Tensor loss = Method::balance({method.routing()}, options);
    const at::Tensor order = at::tensor({3, 9, 0, 1, 8, 2, 7, 5, 6, 4});
    CHECK(at::equal(method.forward(base, x.index_select(0, order)), y.index_select(0, order)));
    permute_experts(method, {2, 0, 3, 1});
    CHECK(distance(method.forward(base, x), y) < 1e-12);
    if (Method::kName != LoraMoeImpl::kName)  // whose first half is of another type
      CHECK(distance(Method::balance({method.routing()}, options), loss) < 1e-12);
  });
}

TEST_CASE("an extracted expert is the layer with that expert's gate at 1", "[moe][mixture]") {
  const FrozenLinear base = some_linear();
  auto method = make_random<LoraMoeImpl>(base, kLoraMoe);
  const at::Tensor x = random({3, 4}).abs();
  for (int64_t e = 0; e < 4; ++e) {
    const at::NoGradGuard no_grad;
    method.router->weight.fill_(-100);
    method.router->weight[e].fill_(100);
    const auto lora = method.extract_expert(e);
    CHECK(lora.A.sizes() == at::IntArrayRef({2, 4}));
    CHECK(lora.B.sizes() == at::IntArrayRef({6, 2}));
    CHECK(distance(method.forward(base, x),
                   at::linear(x, base.weight + lora.scale * lora.B.mm(lora.A), base.bias)) < 1e-13);
  }
  CHECK(contains(error_of([&] { method.extract_expert(4); }), "must be in [0, 4); got 4"));
  const auto copy = method.extract_expert(0);
  const at::NoGradGuard no_grad;
  method.experts.A.zero_();
  method.experts.B.zero_();
  CHECK(copy.A.count_nonzero().item<int64_t>() == 8);
  CHECK(copy.B.count_nonzero().item<int64_t>() == 12);
}

TEST_CASE("a mixture refuses to be merged and says why", "[moe][mixture]") {
  for_each_method([](auto options) {
    GraftDecoder model;
    if constexpr (requires { options.experts.size(); }) options.experts = {4};
    auto adapter = attach(model, options, {.targets = {"q_proj"}});
    const std::string error = error_of([&] { adapter.merge(); });
    INFO(error);
    CHECK(contains(error, "a mixture cannot be merged, its gates depend on the input"));
    CHECK(contains(error, "(layer 'model.layers."));
  });
}

TEST_CASE("experts start each by itself, the same whatever the order of attaching",
          "[moe][mixture]") {
  const FrozenLinear base{at::ones({64, 64}), {}};
  const LoraMoeImpl a(base, {.rank = 8, .experts = 3}, {"q", 3}),
      b(base, {.rank = 8, .experts = 2}, {"q", 3});
  const auto A = [](const LoraMoeImpl& m, int64_t e) { return m.experts.expert(e).first; };
  CHECK_FALSE(at::equal(A(a, 0), A(a, 1)));
  CHECK(at::equal(A(a, 1), A(b, 1)));
  CHECK(a.experts.B.count_nonzero().item<int64_t>() == 0);
  // Both A and G are uniform in 1 / sqrt(in).
  for (const at::Tensor& t : {a.experts.A, a.router->weight}) {
    CHECK(t.abs().max().item<double>() <= 0.125);
    CHECK(std::abs(t.std().item<double>() - 0.125 / std::sqrt(3.0)) < 0.01);
  }
  LoraMoeOptions options{.rank = 8, .experts = 3};
  options.init = "gaussian";  // of deviation 1 / r
  const LoraMoeImpl gaussian(base, options, {"q", 3});
  CHECK(std::abs(gaussian.experts.A.std().item<double>() - 0.125) < 0.01);
  options.delta = 1.0;
  CHECK(contains(error_of([&] {
                   const LoraMoeImpl refused(base, options, {"q", 3});
                 }),
                 "delta must be in [0, 1); got 1"));
  const LoraMoeImpl empty(base, {.rank = 8, .experts = 3},
                          {.name = "q", .seed = 3, .initialise = false});
  CHECK(empty.router->weight.count_nonzero().item<int64_t>() == 0);
  CHECK(empty.experts.A.count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("one mask of dropout serves all experts, in training alone", "[moe][mixture]") {
  const FrozenLinear base = some_linear();
  LoraMoeOptions options = kLoraMoe;
  options.dropout = 0.5;
  auto method = make_random<LoraMoeImpl>(base, options);
  const at::Tensor x = random({8, 4});
  const auto site = static_cast<uint32_t>(graft::random::hash_name("q_proj"));
  const at::Tensor g = method.gates(x);
  for (const uint32_t step : {0, 1}) {
    const at::Tensor dropped = graft::ops::apply_dropout(x, {0.5, {1, site, step}});
    const at::Tensor branch =
        sum_over_experts(method, base, dropped, g) - at::linear(dropped, base.weight, base.bias);
    CHECK(distance(method.forward(base, x), at::linear(x, base.weight, base.bias) + branch) <
          1e-13);
  }
  method.eval();
  CHECK(distance(method.forward(base, x), sum_over_experts(method, base, x, g)) < 1e-13);
}

TEST_CASE("padding goes to no expert and counts in no loss", "[moe][mixture]") {
  for_each_method([](auto options) {
    using Method = MethodOf<decltype(options)>;
    INFO(Method::kName);
    const FrozenLinear base = some_linear();
    auto method = make_random<Method>(base, options);
    const at::Tensor x = some_input(), short_x = x.narrow(1, 0, 3);
    const at::Tensor expected = method.forward(base, short_x);
    const at::Tensor loss = Method::balance({method.routing()}, options);
    at::Tensor valid = at::ones({2, 5}, at::kBool);
    valid.narrow(1, 3, 2).fill_(false);
    const TokenScope scope({.valid = valid});
    const at::Tensor y = method.forward(base, x);
    CHECK(distance(y.narrow(1, 0, 3), expected) < 1e-14);
    CHECK(distance(y.narrow(1, 3, 2), at::linear(x.narrow(1, 3, 2), base.weight, base.bias)) <
          1e-14);
    CHECK(distance(Method::balance({method.routing()}, options), loss) < 1e-14);
    // The same tokens in one row.
    CHECK(distance(method.forward(base, x.view({10, 4})), y.view({10, 6})) < 1e-14);
  });
  CHECK_FALSE(TokenScope::current().valid.defined());
  CHECK(contains(error_of([] { TokenScope({.valid = at::ones({2})}); }),
                 "[tokens] valid must be Bool; got CPUFloatType"));
}

TEST_CASE("a saved mixture reads back with its options and bits", "[moe][mixture][files]") {
  for_each_method([](auto options) {
    using Method = MethodOf<decltype(options)>;
    INFO(Method::kName);
    options.dropout = 0.25;
    options.balance_loss = 0.125;
    const graft::testing::TempFolder folder;
    GraftDecoder model;
    auto adapter = attach(model, options, {.targets = {"q_proj", "o_proj"}});
    graft::testing::check_reads_back(model, adapter, folder.path());
    const auto file = graft::io::SafetensorsFile::open(folder / "adapter_model.safetensors");
    const std::string layer = "base_model.model.model.layers.1.q_proj.";
    CHECK(file.tensor(layer + "moe_gate.weight").sizes() == at::IntArrayRef({4, 8}));
    CHECK(file.tensor(layer + "experts.3.lora_A.weight").sizes() == at::IntArrayRef({2, 8}));
    CHECK(file.tensor(layer + "experts.3.lora_B.weight").sizes() == at::IntArrayRef({8, 2}));
    for (const char* name : {"moe_gate.threshold.weight", "moe_gate.threshold.bias"})
      CHECK(file.contains(layer + name) == (Method::kName == AdaMoleImpl::kName));
    // Other options than the file's.
    options.alpha = 7.0;
    GraftDecoder third;
    auto mismatched = attach(third, options, {.targets = {"q_proj", "o_proj"}});
    CHECK(contains(error_of([&] { mismatched.load(folder.path()); }), "lora_alpha"));
  });
}

TEST_CASE("options of mixtures out of range are refused", "[moe][mixture]") {
  for_each_method([](auto options) {
    using Method = MethodOf<decltype(options)>;
    const auto with = [&](auto change) {
      auto changed = options;
      change(changed);
      return error_of([&] { changed.validate(); });
    };
    const std::string area = "[" + std::string(Method::kName) + "] ";
    CHECK(contains(with([](auto& o) { o.rank = 0; }), area + "rank must be in"));
    CHECK(contains(with([](auto& o) { o.alpha = 0; }), area + "alpha must be finite and not 0"));
    CHECK(contains(with([](auto& o) { o.dropout = 1; }), area + "dropout must be in"));
    CHECK(contains(with([](auto& o) { o.init = "pissa"; }), area + "experts start at random"));
    CHECK(contains(with([](auto& o) { o.balance_loss = -1; }),
                   area + "the balance loss's coefficient must not be negative; got -1"));
    CHECK(contains(with([](auto& o) { o.experts = {}; }), "experts must be"));
    const graft::nn::FrozenLayer narrow = FrozenLinear{at::ones({1, 4}), {}};
    CHECK(contains(
        error_of([&] {
          Method(narrow, options, {"q", 1});
        }),
        area + "rank must be in [1, min(in, out)]; got rank=2 for in=4, out=1 (layer 'q')"));
    const graft::nn::FrozenLayer table = graft::nn::FrozenEmbedding{at::ones({4, 4})};
    CHECK(contains(error_of([&] {
                     Method(table, options, {"q", 1});
                   }),
                   area + "this method does not support Embedding (layer 'q')"));
  });
}
