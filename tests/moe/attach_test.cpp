// MixLoRA on a whole model, through the handle.
#include <graft/adapters/lora.h>
#include <graft/attach/attach.h>
#include <graft/moe/mix_lora_recipe.h>
#include <graft/nn/adapter_slot.h>
#include <graft/train/checkpoint.h>
#include <unistd.h>

#include <filesystem>
#include <numeric>

#include "tests/support/gradcheck.h"
#include "tests/support/tiny_blocks.h"

namespace {

using namespace graft::testing;
using graft::attach;
using graft::AttachedAdapter;
using graft::adapters::LoraOptions;
using graft::moe::MixLoraAdapterOptions;
using graft::moe::MixLoraImpl;
using graft::moe::Selection;

const std::string kLayer = "model.layers.";

MixLoraAdapterOptions small(int64_t experts = 4, int64_t k = 2) {
  return {.mixture = {.router = {.experts = experts, .top_k = k},
                      .experts = {.rank = 2, .alpha = 4.0}}};
}

MixLoraImpl& mixture_of(const AttachedAdapter& adapter, int64_t block) {
  for (const auto& layer : adapter.layers())
    if (layer.name == kLayer + std::to_string(block) + ".mlp")
      return dynamic_cast<MixLoraImpl&>(*layer.adapter);
  throw std::runtime_error("no mixture on block " + std::to_string(block));
}

at::Tensor loss_of(BlockDecoder& model) {
  const at::Tensor wanted = at::remainder(some_tokens() + 1, BlockDecoder::kVocabulary).view(-1);
  return at::cross_entropy_loss(model.forward(some_tokens()).view({-1, BlockDecoder::kVocabulary}),
                                wanted);
}

// The penalty speaks of the pass before it.
at::Tensor penalised_loss(BlockDecoder& model, const AttachedAdapter& adapter) {
  const at::Tensor loss = loss_of(model);
  return loss + adapter.penalty();
}

int64_t sum_of(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

// The model's parameters and children as they are: names, bits, what is trained.
std::string tree(const torch::nn::Module& model) {
  std::string text;
  for (const auto& item : model.named_modules("", false)) text += item.key() + "\n";
  for (const auto& item : model.named_parameters())
    text += item.key() + (item.value().requires_grad() ? " trained\n" : " frozen\n");
  return text;
}

}  // namespace

TEST_CASE("one handle puts mixtures into blocks and LoRA on attention", "[moe][attach]") {
  BlockDecoder model;
  const auto base = snapshot(model);
  const at::Tensor before = model.forward(some_tokens());
  auto adapter = attach(model, small());
  CHECK(adapter.layers().size() == 2 * 5);
  CHECK(adapter.layers()[4].name == kLayer + "0.mlp");
  CHECK(distance(model.forward(some_tokens()), before) < 1e-5);
  const int64_t block = 4 * 8 + 4 * 3 * 2 * (8 + 12), attention = 4 * 2 * (8 + 8);
  CHECK(adapter.parameter_count() == 2 * (block + attention));
  for (const auto& [name, tensor] : adapter.named_parameters())
    CHECK(model.named_parameters()[name].is_same(tensor));

  penalised_loss(model, adapter).backward();
  for (const auto& [name, tensor] : adapter.named_parameters()) CHECK(tensor.grad().defined());
  adapter.check_used();
  randomise(adapter.parameters());
  const at::Tensor adapted = model.forward(some_tokens());
  CHECK(distance(adapted, before) > 1e-2);
  adapter.disable();
  CHECK(at::equal(model.forward(some_tokens()), before));
  adapter.enable();
  CHECK(at::equal(model.forward(some_tokens()), adapted));
  CHECK(
      contains(error_of([&] { adapter.merge(); }),
               "[mixlora] a mixture cannot be merged: which experts work, and with which weights, "
               "depends on the input (layer 'model.layers."));
  CHECK(at::equal(model.forward(some_tokens()), adapted));
  adapter.detach();
  CHECK(at::equal(model.forward(some_tokens()), before));
  CHECK(holds_exactly(model, base));
}

TEST_CASE("a failed attach of mixtures leaves the model as it was", "[moe][attach]") {
  BlockDecoder model;
  const std::string before = tree(model);
  const auto refusal = [&](const MixLoraAdapterOptions& options, graft::AttachOptions where) {
    const std::string error = error_of([&] { attach(model, options, where); });
    CHECK(tree(model) == before);
    return error;
  };
  MixLoraAdapterOptions large = small();
  large.mixture.experts.rank = 9;
  CHECK(contains(refusal(large, {}), "rank must be in [1, min(in, out)]; got rank=9"));
  CHECK(contains(refusal(small(), {.targets = {"q_proj", "gate_proj"}}),
                 "takes all three layers of a block, gate_proj, up_proj and down_proj; got 1 of "
                 "them (block 'model.layers.0.mlp')"));
  CHECK(contains(refusal(small(), {.targets = {"q_proj"}}), "got none"));
  CHECK(contains(refusal(small(), {.bias = graft::TrainedBias::all}),
                 "biases of mixtures' blocks stay frozen"));
  MixLoraAdapterOptions options = small();
  options.balance.of = "nobody";
  CHECK(contains(refusal(options, {}), "nobody"));
  options = small();
  options.balance.coefficient = -1;
  CHECK(contains(refusal(options, {}), "router_aux_loss_coef must not be negative; got -1"));
  options = small();
  options.attention = {.rank = 0};
  CHECK(contains(refusal(options, {}), "rank must be at least 1; got 0"));

  GraftDecoder without;
  CHECK(contains(error_of([&] { attach(without, small()); }),
                 "[attach] mixlora needs gated feed-forward blocks (graft::nn::GatedMlp); got a "
                 "model without one"));
  CHECK(contains(error_of([&] { attach(model, LoraOptions{.rank = 2}, {.targets = {"mlp"}}); }),
                 "a target must be a Linear, Embedding or Conv layer"));
}

TEST_CASE("attention has options of its own, by name or not at all", "[moe][attach]") {
  BlockDecoder model;
  MixLoraAdapterOptions options = small();
  options.attention = {.rank = 3, .alpha = 5};
  auto adapter = attach(model, options,
                        {.targets = {"v_proj", "gate_proj", "up_proj", "down_proj"},
                         .rank_pattern = {{"layers.1.self_attn.v_proj", 4}, {"0.mlp", 1}}});
  CHECK(adapter.layers().size() == 4);
  const auto parameters = model.named_parameters();
  const std::string lora = ".self_attn.v_proj.adapters.default.lora_A";
  CHECK(parameters[kLayer + "0" + lora].sizes() == at::IntArrayRef{3, 8});
  CHECK(parameters[kLayer + "1" + lora].sizes() == at::IntArrayRef{4, 8});
  CHECK(mixture_of(adapter, 0).up_proj->lora_A.sizes() == at::IntArrayRef{4, 1, 8});
  CHECK(mixture_of(adapter, 1).up_proj->lora_A.sizes() == at::IntArrayRef{4, 2, 8});
  adapter.detach();
  auto alone = attach(model, small(), {.targets = {"gate_proj", "up_proj", "down_proj"}});
  CHECK(alone.layers().size() == 2);
  alone.detach();
  MixLoraAdapterOptions dora = small();
  dora.mixture.experts.dora = true;
  auto magnitudes = attach(model, dora);
  CHECK(magnitudes.layers()[0].adapter->method() == "dora");
  CHECK(magnitudes.parameter_count() ==
        2 * (4 * 8 + 4 * 3 * 2 * 20 + 4 * (12 + 12 + 8) + 4 * 2 * 16 + 4 * 8));
}

TEST_CASE("a block's alpha goes by its name, attention shares rsLoRA, and has its own dropout",
          "[moe][attach]") {
  BlockDecoder model;
  MixLoraAdapterOptions options = small();
  options.mixture.experts.rslora = true;
  options.attention = {.rank = 2, .alpha = 4.0, .dropout = 0.5};
  auto adapter =
      attach(model, options, {.alpha_pattern = {{"1.mlp", 6.0}, {"0.self_attn.q_proj", 5.0}}});
  CHECK(mixture_of(adapter, 0).options.experts.alpha == 4.0);
  CHECK(mixture_of(adapter, 1).options.experts.alpha == 6.0);
  CHECK(mixture_of(adapter, 0).options.experts.dropout == 0.0);
  for (const auto& layer : adapter.layers()) {
    const auto* lora = dynamic_cast<const graft::adapters::LoraImpl*>(layer.adapter.get());
    if (lora == nullptr) continue;
    CHECK(lora->options.rslora);
    CHECK(lora->options.dropout == 0.5);
    CHECK(lora->options.alpha == (contains(layer.name, "0.self_attn.q_proj") ? 5.0 : 4.0));
  }
}

TEST_CASE("MixLoRA's published count for Llama-2-7B, attention's LoRA included", "[moe][attach]") {
  // What each kind of layer trains is counted on one layer of each kind with the real sizes.
  struct OneLayer : torch::nn::Module {
    OneLayer() {
      const auto empty = [](int64_t in, int64_t out) {
        graft::nn::Linear linear(torch::nn::LinearOptions(1, 1).bias(false));
        linear->weight.set_data(at::empty({out, in}, at::kBFloat16));
        return linear;
      };
      q_proj = register_module("q_proj", empty(4096, 4096));
      mlp = register_module(
          "mlp", graft::nn::GatedMlp(empty(4096, 11008), empty(4096, 11008), empty(11008, 4096)));
    }
    graft::nn::Linear q_proj{nullptr};
    graft::nn::GatedMlp mlp{nullptr};
  } model;
  auto adapter = attach(model, MixLoraAdapterOptions{}, {.initialise = false});
  int64_t counts[2] = {0, 0};
  for (size_t i = 0; i < 2; ++i)
    for (const auto& parameter : adapter.layers()[i].adapter->parameters())
      counts[i] += parameter.numel();
  CHECK(32 * (4 * counts[0] + counts[1]) == 203'423'744);
}

TEST_CASE("the penalty is the coefficient times the balance loss of the last pass",
          "[moe][attach]") {
  BlockDecoder model;
  MixLoraAdapterOptions options = small();
  options.balance = {.coefficient = 0.5, .of = "megatron", .z_coefficient = 0.25};
  auto adapter = attach(model, options);
  randomise(adapter.parameters());
  adapter.begin_step({});
  double sum = 0;
  for (int pass = 0; pass < 2; ++pass) {
    const at::Tensor valid = at::ones({2, 5}, at::kBool);
    if (pass == 1) valid[1].narrow(0, 2, 3).fill_(false);
    model.forward(some_tokens(), valid);
    const std::vector<graft::moe::Routing> passes = {mixture_of(adapter, 0).routing(),
                                                     mixture_of(adapter, 1).routing()};
    const graft::moe::BalanceOptions megatron = {.normalisation =
                                                     graft::moe::Normalisation::per_slot};
    const at::Tensor loss = graft::moe::balance_loss(passes, megatron);
    sum += loss.item<double>();
    const at::Tensor expected = 0.5 * loss + 0.25 * graft::moe::z_loss(passes);
    const at::Tensor penalty = adapter.penalty();
    CHECK(distance(penalty, expected) < 1e-6);
    penalty.backward();
    CHECK(mixture_of(adapter, 0).router->weight.grad().abs().sum().item<double>() > 0);
  }
  const auto figures = adapter.figures();
  REQUIRE(figures.size() == 3);
  CHECK(figures[0].first == "balance_loss");
  CHECK(std::abs(figures[0].second - sum / 2) < 1e-9);
  double largest = 0, smallest = 1;
  for (const auto& [layer, tokens] : adapter.expert_use()) {
    CHECK(tokens.size() == 4);
    int64_t all = 0;
    for (const int64_t count : tokens) all += count;
    CHECK(all == 2 * (10 + 7));
    for (const int64_t count : tokens) {
      largest = std::max(largest, static_cast<double>(count) / static_cast<double>(all));
      smallest = std::min(smallest, static_cast<double>(count) / static_cast<double>(all));
    }
  }
  CHECK(figures[1] == std::pair<std::string, double>("largest_expert_share", largest));
  CHECK(figures[2] == std::pair<std::string, double>("smallest_expert_share", smallest));
  CHECK(adapter.expert_use().size() == 2);

  model.eval();
  CHECK(adapter.expert_use(false).at(kLayer + "0.mlp") == std::vector<int64_t>(4, 0));
  const at::NoGradGuard no_grad;
  model.forward(some_tokens());
  CHECK(sum_of(adapter.expert_use(false).at(kLayer + "0.mlp")) == 20);
  CHECK(sum_of(adapter.expert_use().at(kLayer + "0.mlp")) == 2 * (10 + 7));
}

TEST_CASE("a step's figures are of that step alone, and z loss counts without a balance loss",
          "[moe][attach]") {
  BlockDecoder model;
  MixLoraAdapterOptions options = small();
  options.balance = {.coefficient = 0.0, .z_coefficient = 0.25};
  auto adapter = attach(model, options);
  randomise(adapter.parameters());
  adapter.begin_step({});
  model.forward(some_tokens());
  const at::Tensor penalty = adapter.penalty();
  REQUIRE(penalty.defined());
  CHECK(distance(penalty, 0.25 * graft::moe::z_loss({mixture_of(adapter, 0).routing(),
                                                     mixture_of(adapter, 1).routing()})) < 1e-6);
  penalty.backward();
  const auto first = adapter.figures();

  // Another pass, whose tokens are all the same, then the first one again.
  adapter.begin_step({});
  model.forward(at::zeros_like(some_tokens()));
  adapter.penalty();
  CHECK(adapter.figures() != first);
  adapter.begin_step({});
  CHECK(adapter.figures().empty());
  model.forward(some_tokens());
  adapter.penalty();
  CHECK(adapter.figures() == first);
}

TEST_CASE("a checkpointed pass keeps no routing for the balance loss", "[moe][attach]") {
  for (const double coefficient : {0.01, 0.0}) {
    BlockDecoder model;
    MixLoraAdapterOptions options = small();
    options.balance.coefficient = coefficient;
    options.mixture.experts.dropout = 0.3;
    options.mixture.router.jitter = 0.1;
    auto adapter = attach(model, options, {.seed = 3});
    randomise(adapter.parameters());
    const at::Tensor x = at::randn({2, 5, 8}).set_requires_grad(true);
    const auto piece = [&](const at::Tensor& in) { return model.blocks[0]->forward(in, {}); };
    std::vector<at::Tensor> trained;
    for (const auto& parameter : model.blocks[0]->parameters())
      if (parameter.requires_grad()) trained.push_back(parameter);
    const at::Tensor y = graft::train::checkpoint(piece, x, trained);
    const at::Tensor other = model.blocks[1]->forward(y, {});
    if (coefficient > 0) {
      CHECK(contains(error_of([&] { adapter.penalty(); }),
                     "the balance loss needs a forward pass that keeps its graph"));
      continue;
    }
    CHECK_FALSE(adapter.penalty().defined());
    other.sum().backward();
    // The second run of the piece does not count.
    CHECK(sum_of(adapter.expert_use().at(kLayer + "0.mlp")) == 20);

    BlockDecoder again;
    auto plain = attach(again, options, {.seed = 3});
    randomise(plain.parameters());
    const at::Tensor x2 = x.detach().clone().set_requires_grad(true);
    again.blocks[1]->forward(again.blocks[0]->forward(x2, {}), {}).sum().backward();
    CHECK(at::equal(x.grad(), x2.grad()));
    const auto ours = adapter.parameters(), theirs = plain.parameters();
    for (size_t i = 0; i < ours.size(); ++i) CHECK(at::equal(ours[i].grad(), theirs[i].grad()));
  }
}

TEST_CASE("counters and the router's bias make a resumed run go on bit for bit", "[moe][attach]") {
  MixLoraAdapterOptions options = small();
  options.mixture.router.selection = Selection::biased;
  options.mixture.router.jitter = 0.2;
  options.mixture.experts.dropout = 0.4;
  const auto step = [](BlockDecoder& model, AttachedAdapter& adapter) {
    adapter.begin_step({});
    penalised_loss(model, adapter).backward();
    const at::NoGradGuard no_grad;
    for (at::Tensor parameter : adapter.parameters()) {
      parameter.sub_(parameter.grad(), 0.1);
      parameter.mutable_grad().zero_();
    }
    adapter.end_step({});
  };
  const auto folder =
      std::filesystem::temp_directory_path() / ("graft-moe-" + std::to_string(::getpid()));
  BlockDecoder model;
  auto adapter = attach(model, options, {.seed = 7});
  step(model, adapter);
  step(model, adapter);
  adapter.save(folder);
  CHECK(mixture_of(adapter, 0).router->bias.abs().max().item<double>() > 0);
  BlockDecoder again;
  auto resumed = attach(again, options, {.seed = 7, .initialise = false});
  resumed.load(folder);
  for (size_t i = 0; i < adapter.layers().size(); ++i)
    resumed.layers()[i].adapter->set_counters(adapter.layers()[i].adapter->counters());
  step(model, adapter);
  step(again, resumed);
  CHECK(at::equal(mixture_of(adapter, 0).router->bias, mixture_of(resumed, 0).router->bias));
  CHECK(adapter.expert_use() == resumed.expert_use());
  const auto ours = adapter.parameters(), theirs = resumed.parameters();
  for (size_t i = 0; i < ours.size(); ++i) CHECK(at::equal(ours[i], theirs[i]));
  CHECK(contains(error_of([&] {
                   mixture_of(resumed, 0).set_counters({1, 2});
                 }),
                 "four counters and one an expert; got 2"));
  std::filesystem::remove_all(folder);
}

TEST_CASE("a router's bias moves by the tokens of its own step", "[moe][attach]") {
  BlockDecoder model;
  MixLoraAdapterOptions options = small();
  options.mixture.router.selection = Selection::biased;
  auto adapter = attach(model, options);
  const MixLoraImpl& mixture = mixture_of(adapter, 0);
  at::Tensor expected, of_all;
  for (int step = 0; step < 4; ++step) {  // the first three on one token only
    adapter.begin_step({});
    model.forward(step < 3 ? at::zeros_like(some_tokens()) : some_tokens());
    expected = mixture.router->bias.clone(), of_all = expected.clone();
    graft::moe::update_bias(expected, mixture.step_tokens, 1e-3);
    graft::moe::update_bias(of_all, mixture.trained_tokens, 1e-3);
    adapter.end_step({});
    CHECK(at::equal(mixture.router->bias, expected));
  }
  CHECK_FALSE(at::equal(expected, of_all));
}

TEST_CASE("two mixtures of one block add up, and each is trained when it is active",
          "[moe][attach]") {
  BlockDecoder model;
  const at::Tensor x = at::randn({2, 5, 8});
  auto& mlp = model.blocks[0]->mlp;
  const at::Tensor base = mlp->forward(x);
  auto first = attach(model, small(), {.name = "first"});
  randomise(first.parameters(), 1);
  auto second = attach(model, small(2, 1), {.name = "second"});
  randomise(second.parameters(), 2);
  const at::Tensor with_second = mlp->forward(x);
  first.set_active();
  const at::Tensor with_first = mlp->forward(x);
  CHECK_FALSE(mixture_of(second, 0).router->weight.requires_grad());
  second.set_active({"first", "second"});
  CHECK(distance(mlp->forward(x), with_first + with_second - base) < 1e-4);
  second.detach();
  first.set_active();
  CHECK(at::equal(mlp->forward(x), with_first));
}
