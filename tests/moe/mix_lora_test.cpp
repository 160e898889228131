#include <ATen/ATen.h>
#include <graft/adapters/dora.h>
#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>
#include <graft/moe/balance_loss.h>
#include <graft/moe/mix_lora.h>
#include <graft/nn/adapter_slot.h>

#include "tests/moe/mix_lora_cases.h"
#include "tests/support/gradcheck.h"

namespace {

using namespace graft::moe;
using namespace graft::testing;
using graft::nn::GatedMlp;

MixLoraOptions options_of(int64_t experts, int64_t k) {
  return {.router = {.experts = experts, .top_k = k}, .experts = {.rank = 2, .alpha = 3.0}};
}

at::Tensor tokens(int64_t count, at::ScalarType type = at::kDouble) {
  at::manual_seed(12);
  return at::randn({count, kHidden}, at::kDouble).to(type);
}

// A block with an adapter on each of its layers.
template <class Options>
struct AdaptedBlock {
  AdaptedBlock(const Options& options, const MixtureBlock& like, bool bias, at::ScalarType type)
      : block(kHidden, kIntermediate, bias) {
    block->to(type);
    const at::NoGradGuard no_grad;
    const auto copy = [](const graft::nn::Linear& to, const graft::nn::Linear& from) {
      to->weight.copy_(from->weight);
      if (to->bias.defined()) to->bias.copy_(from->bias);
    };
    copy(block->gate_proj, like.block->gate_proj);
    copy(block->up_proj, like.block->up_proj);
    copy(block->down_proj, like.block->down_proj);
    adapter.emplace(graft::attach(*block, options,
                                  {.targets = {"gate_proj", "up_proj", "down_proj"}, .seed = 5}));
  }
  GatedMlp block;
  std::optional<graft::AttachedAdapter> adapter;
};

// The adapter's parameter of that layer in the mixture's layout.
at::Tensor of_mixture(const MixtureBlock& m, const std::string& name) {
  const std::string layer = name.substr(0, name.find('.')), last = name.substr(name.rfind('.') + 1);
  return m.mixture->named_parameters()[layer + "." + last];
}

template <class Options>
void check_one_expert(const Options& plain, bool dora, double tolerance) {
  for (const auto type : {at::kFloat, at::kDouble})
    for (const bool bias : {false, true}) {
      MixLoraOptions options = options_of(1, 1);
      options.experts.dropout = plain.dropout;
      options.experts.rslora = plain.rslora;
      options.experts.dora = dora;
      MixtureBlock m(options, bias, type);
      AdaptedBlock<Options> adapted(plain, m, bias, type);
      const at::NoGradGuard no_grad;
      for (auto [name, tensor] : adapted.adapter->named_parameters())
        tensor.copy_(of_mixture(m, name)[0]);
      const at::AutoGradMode with_grad(true);
      const at::Tensor x = tokens(40, type).set_requires_grad(true),
                       x2 = tokens(40, type).set_requires_grad(true);
      const at::Tensor y = m.block->forward(x), expected = adapted.block->forward(x2);
      const auto same = [&](const at::Tensor& a, const at::Tensor& b) {
        return tolerance == 0 ? at::equal(a, b) : distance(a, b) < tolerance;
      };
      CHECK(same(y, expected));
      uneven_sum(y).backward();
      uneven_sum(expected).backward();
      CHECK(same(x.grad(), x2.grad()));
      for (const auto& [name, tensor] : adapted.adapter->named_parameters()) {
        INFO(name);
        CHECK(same(of_mixture(m, name).grad()[0], tensor.grad()));
      }
    }
}

}  // namespace

TEST_CASE("T8 one expert is LoRA on the block bit for bit, gradients and dropout included",
          "[moe][mixlora]") {
  for (const double dropout : {0.0, 0.3})
    check_one_expert(
        graft::adapters::LoraOptions{
            .rank = 2, .alpha = 3.0, .dropout = dropout, .rslora = dropout > 0},
        /*dora=*/false, 0);
}

TEST_CASE("T8 one DoRA expert is DoRA on the block", "[moe][mixlora]") {
  for (const double dropout : {0.0, 0.3})
    check_one_expert(
        graft::adapters::DoraOptions{
            .rank = 2, .alpha = 3.0, .dropout = dropout, .rslora = dropout > 0},
        /*dora=*/true, 2e-5);
}

TEST_CASE("T8 one expert starts as LoRA starts", "[moe][mixlora]") {
  MixtureBlock like(options_of(1, 1), false, at::kFloat);
  for (const char* init : {"kaiming", "gaussian", "orthogonal", "random"}) {
    INFO(init);
    MixLoraOptions options = options_of(1, 1);
    options.experts.init = init;
    GatedMlp block(kHidden, kIntermediate);
    const MixLora mixture = add_mixture(*block, options, block_context());
    AdaptedBlock<graft::adapters::LoraOptions> adapted({.rank = 2, .init = init}, like, false,
                                                       at::kFloat);
    const auto started = mixture->named_parameters();
    for (const auto& [name, tensor] : adapted.adapter->named_parameters())
      CHECK(at::equal(
          tensor,
          started[name.substr(0, name.find('.')) + "." + name.substr(name.rfind('.') + 1)][0]));
  }
  // A mixture that a file will fill draws nothing.
  GatedMlp block(kHidden, kIntermediate);
  const MixLora empty = add_mixture(*block, options_of(4, 2), {.name = "mlp", .initialise = false});
  for (const at::Tensor& parameter : empty->parameters())
    CHECK(parameter.count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("T8 equal experts do not hear the router, zero experts are the base", "[moe][mixlora]") {
  for (const ForwardPath path :
       {ForwardPath::literal, ForwardPath::shared, ForwardPath::combined}) {
    MixLoraOptions options = options_of(4, 2);
    options.path = path;
    MixtureBlock m(options, true);
    const at::Tensor x = tokens(9);
    const at::NoGradGuard no_grad;
    for (const auto& leaf : m.leaves())
      if (leaf.first != "router.weight")
        at::Tensor(leaf.second).copy_(leaf.second[0].unsqueeze(0).expand_as(leaf.second));
    const at::Tensor before = m.block->forward(x);
    m.mixture->router->weight.neg_();
    CHECK(distance(m.block->forward(x), before) < 1e-12);

    for (const auto& leaf : m.leaves())
      if (leaf.first.ends_with("lora_B")) at::Tensor(leaf.second).zero_();
    const at::Tensor adapted = m.block->forward(x);
    graft::nn::AdapterSlot::remove(*m.block);
    CHECK(distance(adapted, m.block->forward(x)) < 1e-12);
  }
}

TEST_CASE("T8 at the start a mixture computes what the block did", "[moe][mixlora]") {
  for (const bool dora : {false, true}) {
    GatedMlp block(kHidden, kIntermediate, true);
    block->to(at::kDouble);
    const at::Tensor x = tokens(9), before = block->forward(x);
    MixLoraOptions options = options_of(4, 2);
    options.experts.dora = dora;
    add_mixture(*block, options, block_context());
    CHECK(distance(block->forward(x), before) < 1e-12);
  }
}

TEST_CASE("T7 permuting tokens permutes outputs, permuting experts changes nothing",
          "[moe][mixlora]") {
  MixtureBlock m(options_of(4, 2), true);
  const at::Tensor x = tokens(9), y = m.block->forward(x);
  const double loss = balance_loss({m.mixture->routing()}).item<double>();
  const at::Tensor order = at::randperm(9);
  CHECK(distance(m.block->forward(x.index({order})), y.index({order})) < 1e-12);
  const at::NoGradGuard no_grad;
  const at::Tensor names = at::tensor({2, 0, 3, 1});
  for (const auto& leaf : m.leaves())
    at::Tensor(leaf.second).copy_(leaf.second.index_select(0, names));
  CHECK(distance(m.block->forward(x), y) < 1e-12);
  CHECK(std::abs(balance_loss({m.mixture->routing()}).item<double>() - loss) < 1e-12);
}

TEST_CASE("T26 five steps leave the block's own weights as they were, and learn",
          "[moe][mixlora]") {
  for (const bool dora : {false, true}) {
    MixLoraOptions options = options_of(4, 2);
    options.experts.dora = dora;
    MixtureBlock m(options, true);
    std::vector<at::Tensor> base;
    const auto frozen = [&] {
      std::vector<at::Tensor> list;
      for (const auto& layer : {m.block->gate_proj, m.block->up_proj, m.block->down_proj})
        for (const at::Tensor& parameter : layer->parameters()) list.push_back(parameter);
      return list;
    };
    for (const at::Tensor& parameter : frozen()) {
      CHECK_FALSE(parameter.requires_grad());
      base.push_back(parameter.clone());
    }
    const at::Tensor x = tokens(20), target = m.block->forward(x).detach() + 0.5;
    const auto loss = [&] {
      const at::Tensor y = m.block->forward(x);
      return (y - target).square().mean() +
             0.01 * balance_loss({m.mixture->routing()}, balance_of("mixlora"));
    };
    const double before = loss().item<double>();
    for (int step = 0; step < 5; ++step) {
      loss().backward();
      const at::NoGradGuard no_grad;
      for (at::Tensor parameter : m.mixture->parameters()) {
        parameter.sub_(parameter.grad(), 0.01);
        parameter.mutable_grad().zero_();
      }
    }
    CHECK(loss().item<double>() < before);
    const auto after = frozen();
    for (size_t i = 0; i < base.size(); ++i) CHECK(at::equal(base[i], after[i]));
  }
}

TEST_CASE("what a mixture trains, in closed form: MixLoRA's published counts", "[moe][mixlora]") {
  for (const bool dora : {false, true})
    for (const Selection selection : {Selection::softmax_top_k, Selection::threshold}) {
      MixLoraOptions options = options_of(4, 2);
      options.experts.dora = dora;
      options.router.selection = selection;
      MixtureBlock m(options, false);
      int64_t count = 0;
      for (const at::Tensor& parameter : m.mixture->parameters()) count += parameter.numel();
      CHECK(count == options.parameter_count(kHidden, kIntermediate));
    }
  // Llama-2-7B: 32 blocks of 4096 and 11008, rank 16 everywhere, 8 experts.
  const MixLoraOptions published{.router = {.experts = 8}, .experts = {.rank = 16}};
  const int64_t blocks = 32 * published.parameter_count(4096, 11008);
  const int64_t attention = 32 * 4 * 16 * (4096 + 4096);
  CHECK(blocks == 185'597'952 + 1'048'576);
  CHECK(blocks + attention == 203'423'744);
}

TEST_CASE("attention's LoRA has options of its own beside a mixture", "[moe][mixlora]") {
  struct Model : torch::nn::Module {
    Model() {
      q_proj = register_module("q_proj", graft::nn::Linear(kHidden, kHidden));
      mlp = register_module("mlp", GatedMlp(kHidden, kIntermediate));
    }
    graft::nn::Linear q_proj{nullptr};
    GatedMlp mlp{nullptr};
  } model;
  const auto adapter =
      graft::attach(model, graft::adapters::LoraOptions{.rank = 3}, {.targets = {"q_proj"}});
  const MixLora mixture = add_mixture(*model.mlp, options_of(4, 2), {.name = "mlp", .seed = 1});
  model.mlp->forward(model.q_proj->forward(at::randn({5, kHidden}))).sum().backward();
  for (const at::Tensor& parameter : adapter.parameters()) CHECK(parameter.grad().defined());
  for (const at::Tensor& parameter : mixture->parameters()) CHECK(parameter.grad().defined());
  CHECK(adapter.parameter_count() == 3 * 2 * kHidden);
}

TEST_CASE("a mixture in eval mode has no dropout, and a bfloat16 base keeps its type",
          "[moe][mixlora]") {
  MixLoraOptions options = options_of(4, 2);
  options.experts.dropout = 0.5;
  MixtureBlock m(options, false, at::kFloat);
  const at::Tensor x = tokens(9, at::kFloat);
  CHECK_FALSE(at::equal(m.block->forward(x), m.block->forward(x)));
  m.block->eval();
  const at::Tensor y = m.block->forward(x);
  CHECK(at::equal(m.block->forward(x), y));
  for (graft::nn::Linear layer : {m.block->gate_proj, m.block->up_proj, m.block->down_proj})
    layer->to(at::kBFloat16);
  const at::Tensor low = m.block->forward(x.to(at::kBFloat16));
  CHECK(low.scalar_type() == at::kBFloat16);
  CHECK(distance(low, y) < 0.05);
  low.sum().backward();
  CHECK(m.mixture->gate_proj->lora_A.grad().scalar_type() == at::kFloat);
}

TEST_CASE("a gated block has Llama's keys and formula, and takes one mixture", "[moe][mixlora]") {
  GatedMlp block(kHidden, kIntermediate);
  block->to(at::kDouble);
  std::vector<std::string> keys;
  for (const auto& item : block->named_parameters()) keys.push_back(item.key());
  CHECK(keys == std::vector<std::string>{"gate_proj.weight", "up_proj.weight", "down_proj.weight"});
  const at::Tensor x = tokens(5).view({1, 5, kHidden});
  const at::Tensor z =
      at::silu(at::linear(x, block->gate_proj->weight)) * at::linear(x, block->up_proj->weight);
  CHECK(distance(block->forward(x), at::linear(z, block->down_proj->weight)) < 1e-12);

  const at::Tensor before = block->forward(x);
  const MixLora mixture = add_mixture(*block, options_of(4, 2), block_context());
  CHECK(contains(error_of([&] { mixture->routing(); }), "no forward pass has run yet"));
  CHECK(contains(error_of([&] {
                   block->forward(at::zeros({3, 5}, at::kDouble));
                 }),
                 "[mixlora] the input must be [..., 6]; got [3, 5]"));
  CHECK(contains(error_of([&] { add_mixture(*block, options_of(4, 2), block_context()); }),
                 "an adapter's name must be new"));
  graft::nn::AdapterSlot::remove(*block);
  CHECK(block->slot == nullptr);
  CHECK(at::equal(block->forward(x), before));

  graft::attach(*block, graft::adapters::LoraOptions{.rank = 2}, {.targets = {"up_proj"}});
  add_mixture(*block, options_of(4, 2), block_context());
  CHECK(contains(error_of([&] { block->forward(x); }),
                 "a block with a mixture takes no adapter on its layers; got one on up_proj"));
}

TEST_CASE("a mixture refuses options that do not fit", "[moe][mixlora]") {
  GatedMlp block(kHidden, kIntermediate);
  const auto refusal = [&](const MixLoraOptions& options) {
    return error_of([&] { add_mixture(*block, options, {.name = "mlp"}); });
  };
  CHECK(contains(refusal({.experts = {.rank = 7}}),
                 "[mixlora] rank must be in [1, min(in, out)]; got rank=7 for in=6, out=10 (layer "
                 "'mlp.gate_proj')"));
  CHECK(contains(refusal({.experts = {.rank = 2, .alpha = 0}}), "alpha must be finite and not 0"));
  CHECK(contains(refusal({.experts = {.rank = 2, .dropout = 1.0}}), "dropout must be in [0, 1)"));
  CHECK(contains(refusal({.experts = {.rank = 2, .init = "pissa"}}), "experts start at random"));
  CHECK(contains(refusal({.router = {.top_k = 9}, .experts = {.rank = 2}}), "top_k must be in"));
  CHECK(block->slot == nullptr);
  CHECK(block->gate_proj->weight.requires_grad());
}
