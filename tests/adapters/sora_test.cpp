#include <graft/adapters/lora.h>
#include <graft/adapters/sora.h>
#include <graft/train/adamw.h>
#include <graft/train/parameter_groups.h>

#include <nlohmann/json.hpp>

#include "tests/support/adapter_kit.h"

namespace {

using namespace graft::adapters;
using graft::nn::FrozenLayer;
using graft::nn::FrozenLinear;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::GraftLayers;
using graft::testing::randomise;
using graft::testing::TinyDecoder;
using graft::testing::uneven_sum;

FrozenLinear base_layer() {
  at::manual_seed(21);
  return {at::randn({5, 6}, at::kDouble), at::randn({5}, at::kDouble)};
}

std::shared_ptr<SoraImpl> make(const FrozenLayer& base, const SoraOptions& options) {
  auto layer = std::make_shared<SoraImpl>(base, options, LayerContext{"q", 3});
  randomise(layer->parameters());
  return layer;
}

StoredLayer stored(const SoraImpl& layer) {
  StoredLayer tensors;
  for (const auto& [suffix, tensor] : layer.file_tensors()) tensors[suffix] = tensor.detach();
  return tensors;
}

at::Tensor in_two_groups(const at::Tensor& x, const at::Tensor& kernel) {
  return at::convolution(x, kernel, {}, {1}, {0}, {1}, false, {0}, 2);
}

void set_gate(SoraImpl& layer, const at::Tensor& values) {
  const at::NoGradGuard no_grad;
  layer.lora_gate.copy_(values);
}

graft::testing::MethodCase sora_case() {
  graft::testing::MethodCase method;
  method.method = "sora";
  method.recipe = [](int64_t rank) { return make_recipe(SoraOptions{.rank = rank, .alpha = 3.0}); };
  method.count = [](const FrozenLayer& layer, int64_t rank) {
    const at::Tensor& weight = graft::nn::weight_of(layer);
    const auto* conv = std::get_if<graft::nn::FrozenConv>(&layer);
    const int64_t groups = conv == nullptr ? 1 : conv->groups;
    return rank * (weight.numel() / weight.size(0) * groups) + weight.size(0) * (rank / groups) +
           rank;
  };
  method.zero_at_first = [](const std::string& kind) {
    return std::vector<std::string>{kind == "Embedding" ? "lora_B" : "lora_A", "lora_gate"};
  };
  return method;
}

}  // namespace

TEST_CASE("SoRA keeps the promises of adapters on every kind of layer", "[adapters][sora]") {
  graft::testing::run_adapter_kit(sora_case());
}

TEST_CASE("SoRA gates the hidden units of each kind of layer", "[adapters][sora]") {
  const SoraOptions options{.rank = 4, .alpha = 3.0};
  const FrozenLinear base = base_layer();
  const auto linear = make(base, options);
  const at::Tensor x = at::randn({7, 6}, at::kDouble);
  const at::Tensor hidden = x.mm(linear->lora_A.t()) * linear->lora_gate;
  CHECK(distance(linear->forward(base, x),
                 x.mm(base.weight.t()) + base.bias + 0.75 * hidden.mm(linear->lora_B.t())) < 1e-12);

  const graft::nn::FrozenEmbedding table{.weight = at::randn({9, 5}, at::kDouble)};
  const auto embedding = make(table, options);
  const at::Tensor indices = at::tensor({1, 8, 1, 0});
  const at::Tensor delta =
      0.75 * embedding->lora_B.mm(at::diag(embedding->lora_gate)).mm(embedding->lora_A);
  CHECK(distance(embedding->forward(table, indices),
                 (table.weight + delta.t()).index_select(0, indices)) < 1e-12);

  graft::nn::Conv1d conv(torch::nn::Conv1dOptions(4, 6, 3).groups(2));
  conv->to(at::kDouble);
  const FrozenLayer frozen = graft::nn::frozen_layer(*conv);
  const auto& kernel = std::get<graft::nn::FrozenConv>(frozen);
  const auto convolution = make(frozen, options);
  const at::Tensor image = at::randn({2, 4, 9}, at::kDouble);
  const at::Tensor units =
      at::conv1d(image, convolution->lora_A) * convolution->lora_gate.view({1, 4, 1});
  CHECK(distance(convolution->forward(kernel, image),
                 kernel.apply(image) + 0.75 * in_two_groups(units, convolution->lora_B)) < 1e-12);
}

TEST_CASE("SoRA's gate starts normal, its factors as LoRA's; with gates of 1 it is LoRA",
          "[adapters][sora]") {
  const FrozenLinear base{at::ones({400, 400}), {}};
  SoraImpl sora(base, {.rank = 400, .alpha = 5.0}, {"q", 3});
  LoraImpl lora(base, {.rank = 400, .alpha = 5.0}, {"q", 3});
  CHECK(at::equal(sora.lora_A, lora.lora_A));
  CHECK(sora.lora_B.count_nonzero().item<int64_t>() == 0);
  CHECK(std::abs(sora.lora_gate.mean().item<double>()) < 0.2);
  CHECK(std::abs(sora.lora_gate.std().item<double>() - 1.0) < 0.15);
  CHECK_FALSE(at::equal(sora.lora_gate, SoraImpl(base, {.rank = 400}, {"k", 3}).lora_gate));
  set_gate(sora, at::ones({400}));
  randomise({sora.lora_B, lora.lora_B});
  const at::NoGradGuard no_grad;
  lora.lora_B.copy_(sora.lora_B);
  const at::Tensor x = at::randn({3, 400});
  CHECK(at::equal(sora.forward(base, x), lora.forward(base, x)));
}

TEST_CASE("SoRA's soft threshold is the minimiser that the l1 norm asks for", "[adapters][sora]") {
  const double xi = 0.3;
  const at::Tensor v =
      at::tensor({-1.0, -0.45, -0.3, -0.1, 0.0, 0.2, 0.3, 0.31, 0.6, 2.0}, at::kDouble);
  const at::Tensor z = soft_threshold(v, xi);
  const auto cost = [&](const at::Tensor& w) { return (w - v).square() / 2 + xi * w.abs(); };
  for (double shift = -2.0; shift <= 2.0; shift += 0.01)
    CHECK((cost(z) <= cost(z + shift) + 1e-15).all().item<bool>());
  CHECK((cost(z) <= cost(at::zeros_like(z)) + 1e-15).all().item<bool>());
  CHECK(distance(z, at::tensor({-0.7, -0.15, 0.0, 0.0, 0.0, 0.0, 0.0, 0.01, 0.3, 1.7},
                               at::kDouble)) < 1e-15);
  CHECK(((z - v).abs() <= xi + 1e-15).all().item<bool>());
  CHECK(at::equal(soft_threshold(v, 0.0), v));
  CHECK(at::equal(soft_threshold(-v, xi), -z));
}

TEST_CASE("SoRA's released threshold clears up to twice xi and spares xi itself",
          "[adapters][sora]") {
  const at::Tensor v =
      at::tensor({-2.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5}, at::kDouble);
  const at::Tensor expected =
      at::tensor({-1.5, 0.0, -0.5, 0.0, 0.0, 0.0, 0.5, 0.0, 0.5, 1.0}, at::kDouble);
  CHECK(at::equal(released_threshold(v, 0.5), expected));
  CHECK(at::equal(released_threshold(v, 0.0), v));
}

TEST_CASE("SoRA's threshold follows its schedule", "[adapters][sora]") {
  SoraOptions options{.sparse_lambda = 0.1,
                      .sparse_schedule = "linear",
                      .sparse_lambda_end = 0.9,
                      .sparse_stages = 5};
  const auto stages = [&] {
    std::vector<double> values;
    for (const int64_t step : {0, 19, 20, 40, 60, 80, 99, 200})
      values.push_back(options.strength(step, 100));
    return at::tensor(values, at::kDouble);
  };
  CHECK(distance(stages(), at::tensor({0.1, 0.1, 0.3, 0.5, 0.7, 0.9, 0.9, 0.9}, at::kDouble)) <
        1e-14);
  options.sparse_schedule = "exp_linear";
  const double factor = std::pow(9.0, 0.25);
  CHECK(distance(stages(), at::tensor({0.1, 0.1, 0.1 * factor, 0.3, 0.3 * factor, 0.9, 0.9, 0.9},
                                      at::kDouble)) < 1e-14);
  options.sparse_schedule = "log_linear";
  const double low = std::exp(0.1), part = (std::exp(0.9) - low) / 4;
  CHECK(distance(stages(), at::tensor({0.1, 0.1, std::log(low + part), std::log(low + 2 * part),
                                       std::log(low + 3 * part), 0.9, 0.9, 0.9},
                                      at::kDouble)) < 1e-14);
  options.sparse_schedule = "constant";
  CHECK(options.strength(99, 0) == 0.1);
  options.sparse_schedule = "linear";
  CHECK(contains(error_of([&] { options.strength(3, 0); }), "[sora] a schedule"));
  // Proximal: times the learning rate; the others not.
  const StepInfo info{.step = 40, .total_steps = 100, .lr = 0.01};
  CHECK(std::abs(options.xi(info) - 0.005) < 1e-16);
  options.threshold = "constant";
  CHECK(std::abs(options.xi(info) - 0.5) < 1e-15);
  options.threshold = "released";
  CHECK(std::abs(options.xi(info) - 0.5) < 1e-15);
}

TEST_CASE("SoRA's training step is AdamW without decay on the gate, then the threshold",
          "[adapters][sora]") {
  for (const std::string threshold : {"proximal", "constant", "released"}) {
    INFO(threshold);
    const double strength = threshold == "proximal" ? 40.0 : 0.4;
    TinyDecoder<GraftLayers> model;
    auto adapter = graft::attach(
        model, SoraOptions{.rank = 4, .threshold = threshold, .sparse_lambda = strength},
        {.targets = {"q_proj", "v_proj"}});
    graft::train::AdamW optimizer(graft::train::parameter_groups(adapter, 0.5));
    const StepInfo info{.step = 0, .total_steps = 10, .lr = 0.01};
    std::vector<at::Tensor> before;
    for (const auto& layer : adapter.layers())
      before.push_back(dynamic_cast<SoraImpl&>(*layer.adapter).lora_gate.detach().clone());
    adapter.begin_step(info);
    CHECK_FALSE(adapter.penalty().defined());
    uneven_sum(model.forward(graft::testing::some_tokens())).backward();
    optimizer.step(info.lr);
    adapter.end_step(info);
    double active = 0;
    for (size_t i = 0; i < before.size(); ++i) {
      // B is zero in the first step, so the gate's gradient is, and only the threshold moves it.
      const auto& sora = dynamic_cast<SoraImpl&>(*adapter.layers()[i].adapter);
      const at::Tensor expected = threshold == "released" ? released_threshold(before[i], 0.4)
                                                          : soft_threshold(before[i], 0.4);
      CHECK(distance(sora.lora_gate, expected) < 1e-6);
      CHECK(sora.active_rank() == expected.count_nonzero().item<int64_t>());
      CHECK(sora.lora_gate.requires_grad());
      active += static_cast<double>(sora.active_rank());
    }
    REQUIRE(active > 0);
    REQUIRE(active < 16);
    const Figures figures = adapter.figures();
    REQUIRE(figures.size() == 2);
    CHECK(figures[0] == std::pair<std::string, double>("active_rank", active / 4));
    CHECK(figures[1].first == "sparsity");
    CHECK(std::abs(figures[1].second - (1 - active / 16)) < 1e-12);
  }
}

TEST_CASE("SoRA's penalty is the mean size of all gates", "[adapters][sora]") {
  TinyDecoder<GraftLayers> model;
  auto adapter = graft::attach(model, SoraOptions{.rank = 4, .l1_penalty = 10.0},
                               {.targets = {"q_proj", "v_proj"}});
  double sum = 0;
  for (const auto& layer : adapter.layers()) {
    const auto& gate = dynamic_cast<SoraImpl&>(*layer.adapter).lora_gate;
    sum += gate.abs().sum().item<double>();
  }
  const at::Tensor penalty = adapter.penalty();
  CHECK(std::abs(penalty.item<double>() - 10 * sum / 16) < 1e-5);
  penalty.backward();
  const auto& gate = dynamic_cast<SoraImpl&>(*adapter.layers()[0].adapter).lora_gate;
  CHECK(distance(gate.grad(), gate.sign() * (10.0 / 16)) < 1e-6);
}

TEST_CASE("SoRA without its zero gates is a plain LoRA with the same output", "[adapters][sora]") {
  const SoraOptions options{.rank = 4, .alpha = 3.0};
  const auto recipe = make_recipe(options);
  const MethodEntry entry = sora_entry();
  const FrozenLinear base = base_layer();
  const at::Tensor x = at::randn({7, 6}, at::kDouble);
  const auto layer = make(base, options);
  for (const auto& gate :
       {at::tensor({0.5, 0.0, -2.0, 0.0}, at::kDouble),
        at::tensor({0.5, 0.1, -2.0, 3.0}, at::kDouble), at::zeros({4}, at::kDouble)}) {
    set_gate(*layer, gate);
    const PlainLora plain = entry.to_lora(*recipe, stored(*layer), 0);
    const int64_t kept = gate.count_nonzero().item<int64_t>();
    REQUIRE(plain.A.sizes() == at::IntArrayRef({kept, 6}));
    REQUIRE(plain.B.sizes() == at::IntArrayRef({5, kept}));
    CHECK(plain.scale == 0.75);
    CHECK(distance(
              x.mm(base.weight.t()) + base.bias + plain.scale * x.mm(plain.A.t()).mm(plain.B.t()),
              layer->forward(base, x)) < 1e-12);
  }
  CHECK(contains(error_of([&] { entry.to_lora(*recipe, stored(*layer), 2); }), "got rank=2"));
}

TEST_CASE("SoRA's zero gates go from embeddings and convolutions too", "[adapters][sora]") {
  const SoraOptions options{.rank = 4, .alpha = 3.0};
  const auto recipe = make_recipe(options);
  const at::Tensor gate = at::tensor({0.5, 0.0, -2.0, 0.0}, at::kDouble);
  const auto plain_of = [&](const FrozenLayer& base, SoraImpl& layer) {
    set_gate(layer, gate);
    const PlainLora plain = sora_entry().to_lora(*recipe, stored(layer), 0);
    const at::Tensor weight = graft::nn::weight_of(base);
    at::Tensor delta = plain.B.flatten(1).mm(plain.A.flatten(1)) * plain.scale;
    if (std::holds_alternative<graft::nn::FrozenEmbedding>(base)) delta = delta.t();
    CHECK(distance(weight + delta.view(weight.sizes()), layer.merged_weight(base)) < 1e-12);
    return plain;
  };
  const graft::nn::FrozenEmbedding table{.weight = at::randn({9, 5}, at::kDouble)};
  CHECK(plain_of(table, *make(table, options)).A.sizes() == at::IntArrayRef({2, 9}));
  graft::nn::Conv1d conv(torch::nn::Conv1dOptions(4, 5, 3));
  conv->to(at::kDouble);
  const FrozenLayer frozen = graft::nn::frozen_layer(*conv);
  CHECK(plain_of(frozen, *make(frozen, options)).A.sizes() == at::IntArrayRef({2, 4, 3}));

  // Units of a grouped convolution keep their places; the gate is folded in.
  graft::nn::Conv1d grouped(torch::nn::Conv1dOptions(4, 6, 3).groups(2));
  grouped->to(at::kDouble);
  const FrozenLayer in_groups = graft::nn::frozen_layer(*grouped);
  const auto layer = make(in_groups, options);
  set_gate(*layer, gate);
  const PlainLora plain = sora_entry().to_lora(*recipe, stored(*layer), 0);
  const at::Tensor image = at::randn({2, 4, 9}, at::kDouble);
  const auto& kernel = std::get<graft::nn::FrozenConv>(in_groups);
  CHECK(distance(
            kernel.apply(image) + plain.scale * in_two_groups(at::conv1d(image, plain.A), plain.B),
            layer->forward(kernel, image)) < 1e-12);
}

TEST_CASE("SoRA's files and options have names of their own", "[adapters][sora]") {
  const FrozenLinear base = base_layer();
  std::vector<std::string> names;
  for (const auto& item : make(base, {.rank = 2})->file_tensors()) names.push_back(item.suffix);
  CHECK(names == std::vector<std::string>{"lora_A.weight", "lora_B.weight", "lora_gate"});

  const SoraOptions options{.rank = 6,
                            .alpha = 2.5,
                            .dropout = 0.1,
                            .init = "gaussian",
                            .threshold = "released",
                            .sparse_lambda = 0.25,
                            .sparse_schedule = "linear",
                            .sparse_lambda_end = 0.5,
                            .sparse_stages = 3,
                            .l1_penalty = 2.0};
  nlohmann::json config, again, expected;
  make_recipe(options)->write_config(config);
  expected = config;
  CHECK(expected["threshold"] == "released");
  CHECK(expected["sparse_stages"] == 3);
  const auto recipe = sora_entry().read_config(config);
  CHECK(config.empty());
  recipe->write_config(again);
  CHECK(again == expected);
  CHECK(recipe->describe() ==
        "rank 6 at the start, alpha 2.5, released threshold of strength 0.25 to 0.5 (linear, 3 "
        "stages), l1 penalty 2, dropout 0.1, init gaussian");
}

TEST_CASE("SoRA refuses what it cannot do, in a line", "[adapters][sora]") {
  const auto error = [](const SoraOptions& options) {
    return error_of([&] { options.validate(); });
  };
  CHECK(contains(error({.rank = 0}), "[sora] rank must be in [1, min(in, out)]; got rank=0"));
  CHECK(contains(error({.alpha = 0}), "alpha"));
  CHECK(contains(error({.dropout = 1}), "[sora]"));
  CHECK(contains(error({.threshold = "hard"}),
                 "threshold must be proximal, constant or released; got 'hard'"));
  CHECK(contains(error({.sparse_lambda = -1}), "sparse_lambda must be finite and >= 0; got -1"));
  CHECK(contains(error({.l1_penalty = -1}), "l1_penalty"));
  CHECK(contains(error({.sparse_schedule = "cosine"}), "got 'cosine'"));
  CHECK(contains(error({.sparse_schedule = "linear"}), "at least sparse_lambda; got 0 for 0.375"));
  CHECK(contains(error({.sparse_schedule = "linear", .sparse_lambda_end = 1, .sparse_stages = 1}),
                 "sparse_stages must be in [2, 1000000]; got 1"));
  CHECK(
      contains(error({.sparse_lambda = 0, .sparse_schedule = "exp_linear", .sparse_lambda_end = 1}),
               "must start above 0"));
  const FrozenLinear base = base_layer();
  CHECK(contains(error_of([&] { make(base, {.rank = 6}); }), "got rank=6 for in=6, out=5"));
}
