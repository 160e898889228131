#include <graft/adapters/dylora.h>
#include <graft/adapters/lora.h>
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

FrozenLinear base_layer(at::ScalarType type = at::kDouble) {
  at::manual_seed(21);
  return {at::randn({5, 6}, type), at::randn({5}, type)};
}

std::shared_ptr<DyloraImpl> make(const FrozenLayer& base, DyloraOptions options) {
  auto layer = std::make_shared<DyloraImpl>(base, options, LayerContext{"q", 3});
  randomise(layer->parameters());
  return layer;
}

// Puts the layer into training mode and a step of that rank.
void begin(DyloraImpl& layer, int64_t rank) {
  layer.train();
  for (int64_t step = 0; step < 1000; ++step) {
    DyloraImpl::begin_step({&layer}, {.step = step, .seed = 1});
    if (layer.active_rank() == rank) return;
  }
  FAIL("rank " << rank << " was never drawn");
}

at::Tensor linear_formula(const FrozenLinear& base, const DyloraImpl& layer, const at::Tensor& x,
                          int64_t b) {
  const at::Tensor A = layer.lora_A.narrow(0, 0, b), B = layer.lora_B.narrow(1, 0, b);
  return x.mm(base.weight.t()) + base.bias +
         (layer.options.alpha / static_cast<double>(b)) * x.mm(A.t()).mm(B.t());
}

const DyloraOptions& options_of(const Recipe& recipe) {
  return dynamic_cast<const RecipeOf<DyloraImpl>&>(recipe).options();
}

graft::testing::MethodCase dylora_case(DyloraOptions options) {
  graft::testing::MethodCase method;
  method.method = "dylora";
  method.recipe = [options](int64_t rank) mutable {
    options.rank = rank;
    return make_recipe(options);
  };
  method.count = [](const FrozenLayer& layer, int64_t rank) {
    const at::Tensor& weight = graft::nn::weight_of(layer);
    return rank * (weight.numel() / weight.size(0) + weight.size(0));
  };
  method.zero_at_first = [](const std::string& kind) {
    return std::vector<std::string>{kind == "Embedding" ? "lora_B" : "lora_A"};
  };
  method.unfit_layers = {"groups"};  // in which ranks do not nest
  return method;
}

}  // namespace

TEST_CASE("DyLoRA keeps the promises of adapters", "[adapters][dylora]") {
  graft::testing::run_adapter_kit(dylora_case({.alpha = 3.0}));
}

TEST_CASE("DyLoRA at rank b is the leading b units at the scale alpha over b",
          "[adapters][dylora]") {
  const FrozenLinear base = base_layer();
  const auto layer = make(base, {.rank = 4, .alpha = 3.0, .frozen = false});
  const at::Tensor x = at::randn({7, 6}, at::kDouble);
  CHECK(distance(layer->forward(base, x), linear_formula(base, *layer, x, 4)) < 1e-12);
  for (int64_t b = 1; b <= 4; ++b) {
    begin(*layer, b);
    CHECK(distance(layer->forward(base, x), linear_formula(base, *layer, x, b)) < 1e-12);
    layer->eval();
    CHECK(distance(layer->forward(base, x), linear_formula(base, *layer, x, 4)) < 1e-12);
    layer->set_rank(b);
    CHECK(distance(layer->forward(base, x), linear_formula(base, *layer, x, b)) < 1e-12);
    const at::Tensor merged = layer->merged_weight(base);
    CHECK(distance(x.mm(merged.t()) + base.bias, layer->forward(base, x)) < 1e-12);
    layer->set_rank(4);
  }
}

TEST_CASE("DyLoRA slices an embedding's and a convolution's factors alike", "[adapters][dylora]") {
  at::manual_seed(22);
  const graft::nn::FrozenEmbedding table{.weight = at::randn({9, 5}, at::kDouble)};
  const auto embedding = make(table, {.rank = 4, .alpha = 3.0});
  const at::Tensor indices = at::tensor({1, 8, 1, 0});
  graft::nn::Conv1d conv(torch::nn::Conv1dOptions(4, 5, 3).stride(2));
  conv->to(at::kDouble);
  const FrozenLayer frozen = graft::nn::frozen_layer(*conv);
  const auto& kernel = std::get<graft::nn::FrozenConv>(frozen);
  const auto convolution = make(frozen, {.rank = 4, .alpha = 3.0});
  const at::Tensor image = at::randn({2, 4, 9}, at::kDouble);
  for (int64_t b = 1; b <= 4; ++b) {
    const double scale = 3.0 / static_cast<double>(b);
    const auto leading = [&](const DyloraImpl& layer) {
      return std::pair(layer.lora_A.narrow(0, 0, b), layer.lora_B.narrow(1, 0, b));
    };
    embedding->eval();
    embedding->set_rank(b);
    const auto [A, B] = leading(*embedding);
    const at::Tensor delta = scale * B.mm(A);
    CHECK(distance(embedding->forward(table, indices),
                   (table.weight + delta.t()).index_select(0, indices)) < 1e-12);
    convolution->eval();
    convolution->set_rank(b);
    const auto [C, D] = leading(*convolution);
    CHECK(distance(convolution->forward(kernel, image),
                   kernel.apply(image) +
                       scale * at::conv1d(at::conv1d(image, C, {}, at::IntArrayRef({2})), D)) <
          1e-12);
  }
}

TEST_CASE("DyLoRA's gradients reach the live rows and no other", "[adapters][dylora]") {
  const FrozenLinear base = base_layer();
  const at::Tensor x = at::randn({7, 6}, at::kDouble);
  for (const bool frozen : {false, true}) {
    for (int64_t b = 1; b <= 4; ++b) {
      INFO("frozen " << frozen << ", rank " << b);
      const auto layer = make(base, {.rank = 4, .alpha = 3.0, .frozen = frozen});
      begin(*layer, b);
      uneven_sum(layer->forward(base, x)).backward();
      const auto gradients = torch::autograd::grad({uneven_sum(linear_formula(base, *layer, x, b))},
                                                   {layer->lora_A, layer->lora_B});
      for (const char* name : {"lora_A", "lora_B"}) {
        const auto live = layer->live_rows(name);
        REQUIRE(live.has_value());
        CHECK(live->begin == (frozen ? b - 1 : 0));
        CHECK(live->end == b);
        const bool is_A = std::string(name) == "lora_A";
        const at::Tensor found = (is_A ? layer->lora_A : layer->lora_B).grad();
        at::Tensor expected = at::zeros_like(found);
        expected.narrow(live->dim, live->begin, live->end - live->begin)
            .copy_(gradients[is_A ? 0 : 1].narrow(live->dim, live->begin, live->end - live->begin));
        CHECK(distance(found, expected) < 1e-12);
      }
    }
  }
}

namespace {

// A small decoder, its optimiser, and steps on one batch.
struct Trained {
  explicit Trained(std::shared_ptr<const Recipe> recipe)
      : adapter(graft::attach(model, std::move(recipe), {.targets = {"q_proj", "v_proj"}})),
        optimizer(graft::train::parameter_groups(adapter, 0.1)) {}

  void step(int64_t index) {
    const StepInfo info{index, 20, 1e-2, 4};
    adapter.begin_step(info);
    for (int micro = 0; micro < 2; ++micro) uneven_sum(model.forward(tokens)).backward();
    optimizer.step(info.lr);
    adapter.end_step(info);
    optimizer.zero_grad();
  }
  at::Tensor output() {
    const at::NoGradGuard no_grad;
    model.eval();
    const at::Tensor y = model.forward(tokens);
    model.train();
    return y;
  }
  std::vector<at::Tensor> values() {
    std::vector<at::Tensor> list;
    for (const auto& p : adapter.parameters()) list.push_back(p.detach().clone());
    return list;
  }
  template <class Impl>
  Impl& layer(size_t i) {
    return dynamic_cast<Impl&>(*adapter.layers().at(i).adapter);
  }

  TinyDecoder<GraftLayers> model;
  at::Tensor tokens = at::tensor({1, 5, 3, 10, 2, 7}).view({2, 3});
  graft::AttachedAdapter adapter;
  graft::train::AdamW optimizer;
};

}  // namespace

TEST_CASE("DyLoRA trains one unit a step and leaves the others' bits alone under weight decay",
          "[adapters][dylora]") {
  Trained run(make_recipe(DyloraOptions{.rank = 4, .alpha = 4.0}));
  std::vector<int64_t> times(4, 0);
  for (int64_t t = 0; t < 20; ++t) {
    const auto before = run.values();
    run.step(t);
    const int64_t b = draw_rank({.rank = 4}, 4, t);
    CHECK(run.adapter.figures() == Figures{{"rank", static_cast<double>(b)}});
    ++times[b - 1];
    const auto after = run.values();
    for (size_t i = 0; i < after.size(); ++i) {
      const int64_t dim = i % 2;  // A, B, A, B, ...
      for (int64_t row = 0; row < 4; ++row) {
        INFO("step " << t << ", rank " << b << ", parameter " << i << ", row " << row);
        // A's row has no gradient while B's column is zero, but weight decay moves it.
        CHECK(at::equal(after[i].select(dim, row), before[i].select(dim, row)) == (row != b - 1));
      }
    }
  }
  CHECK(std::all_of(times.begin(), times.end(), [](int64_t n) { return n > 0; }));
  for (const auto& [name, tensor] : run.optimizer.state_dict())
    if (name.ends_with(".row_steps")) CHECK(at::equal(tensor, at::tensor(times, at::kLong)));
}

TEST_CASE("DyLoRA without freezing trains the leading units together", "[adapters][dylora]") {
  Trained run(make_recipe(DyloraOptions{.rank = 4, .alpha = 4.0, .frozen = false}));
  for (int64_t t = 0; t < 8; ++t) {
    const auto before = run.values();
    run.step(t);
    const int64_t b = draw_rank({.rank = 4}, 4, t);
    const auto after = run.values();
    for (size_t i = 0; i < after.size(); ++i)
      for (int64_t row = 0; row < 4; ++row)
        CHECK(at::equal(after[i].select(i % 2, row), before[i].select(i % 2, row)) == (row >= b));
  }
}

TEST_CASE("DyLoRA that always draws R is LoRA, step for step", "[adapters][dylora]") {
  Trained dylora(
      make_recipe(DyloraOptions{.rank = 4, .alpha = 6.0, .rank_min = 4, .frozen = false}));
  Trained lora(make_recipe(LoraOptions{.rank = 4, .alpha = 6.0}));
  for (int64_t t = 0; t < 6; ++t) {
    dylora.step(t);
    lora.step(t);
    const auto ours = dylora.values(), theirs = lora.values();
    for (size_t i = 0; i < ours.size(); ++i) CHECK(at::equal(ours[i], theirs[i]));
  }
  CHECK(at::equal(dylora.output(), lora.output()));
}

TEST_CASE("DyLoRA cut to any rank is the model at that rank, bit for bit", "[adapters][dylora]") {
  const DyloraOptions options{.rank = 5, .alpha = 3.0};
  const auto recipe = make_recipe(options);
  const MethodEntry entry = dylora_entry();
  const FrozenLinear base = base_layer(at::kFloat);
  const auto layer = make(base, options);
  const at::Tensor x = at::randn({7, 6});
  StoredLayer stored;
  for (const auto& [suffix, tensor] : layer->file_tensors()) stored[suffix] = tensor.detach();
  layer->eval();
  for (int64_t b = 0; b <= 5; ++b) {
    const PlainLora cut = entry.to_lora(*recipe, stored, b);
    const int64_t rank = b == 0 ? 5 : b;
    REQUIRE(cut.A.sizes() == at::IntArrayRef({rank, 6}));
    REQUIRE(cut.B.sizes() == at::IntArrayRef({5, rank}));
    LoraImpl lora(base, {.rank = rank, .alpha = 3.0}, {"q", 3});
    CHECK(lora.scale == cut.scale);
    const at::NoGradGuard no_grad;
    lora.lora_A.copy_(cut.A);
    lora.lora_B.copy_(cut.B);
    layer->set_rank(rank);
    CHECK(at::equal(lora.forward(base, x), layer->forward(base, x)));
    begin(*layer, rank);  // the same rank in a training step
    CHECK(at::equal(lora.forward(base, x), layer->forward(base, x)));
    layer->eval();
  }
  CHECK(contains(error_of([&] { entry.to_lora(*recipe, stored, 6); }), "must be in [1, 5]; got 6"));
  CHECK(
      entry.to_lora(*make_recipe(DyloraOptions{.rank = 5, .eval_rank = 2}), stored, 0).A.size(0) ==
      2);
}

TEST_CASE("DyLoRA draws by seed and step alone, uniformly or by weights", "[adapters][dylora]") {
  const DyloraOptions uniform{.rank = 8, .rank_min = 3, .rank_max = 6},
      weighted{.rank = 8, .rank_min = 3, .rank_max = 6, .rank_weights = {1, 0, 5, 2}};
  constexpr int64_t kDraws = 8000;
  std::vector<int64_t> even(9, 0), uneven(9, 0), other(9, 0);
  bool seeds_differ = false;
  for (int64_t t = 0; t < kDraws; ++t) {
    const int64_t b = draw_rank(uniform, 1, t);
    CHECK(b == draw_rank(uniform, 1, t));
    seeds_differ = seeds_differ || b != draw_rank(uniform, 2, t);
    ++even.at(b);
    ++uneven.at(draw_rank(weighted, 1, t));
  }
  CHECK(seeds_differ);
  // Six standard deviations of a binomial count.
  const auto near = [](int64_t count, double p) {
    return std::abs(static_cast<double>(count) - kDraws * p) < 6 * std::sqrt(kDraws * p * (1 - p));
  };
  for (int64_t b = 0; b <= 8; ++b) {
    INFO("rank " << b);
    const bool inside = b >= 3 && b <= 6;
    CHECK((inside ? near(even[b], 0.25) : even[b] == 0));
    CHECK((inside && b != 4 ? near(uneven[b], weighted.rank_weights[b - 3] / 8) : uneven[b] == 0));
  }
  // Pinned: a resumed run of a later version must draw the same.
  std::vector<int64_t> first;
  for (int64_t t = 0; t < 8; ++t) first.push_back(draw_rank({.rank = 8}, 42, t));
  CHECK(first == std::vector<int64_t>{5, 2, 7, 4, 4, 1, 4, 5});
}

TEST_CASE("DyLoRA gives every layer the step's rank, at most its own", "[adapters][dylora]") {
  TinyDecoder<GraftLayers> model;
  auto adapter = graft::attach(model, DyloraOptions{.rank = 6},
                               {.targets = {"q_proj", "v_proj"}, .rank_pattern = {{"v_proj", 2}}});
  for (int64_t t = 0; t < 10; ++t) {
    adapter.begin_step({.step = t, .seed = 9});
    const int64_t b = draw_rank({.rank = 6}, 9, t);
    for (const auto& layer : adapter.layers()) {
      const bool small = layer.name.ends_with("v_proj");
      CHECK(dynamic_cast<DyloraImpl&>(*layer.adapter).active_rank() ==
            (small ? std::min<int64_t>(b, 2) : b));
    }
  }
  model.eval();
  set_dylora_rank(model, 4);
  for (const auto& layer : adapter.layers())
    CHECK(dynamic_cast<DyloraImpl&>(*layer.adapter).active_rank() ==
          (layer.name.ends_with("v_proj") ? 2 : 4));
  CHECK(contains(error_of([&] { set_dylora_rank(model, 7); }), "must be in [1, 6]; got 7"));
  CHECK(contains(error_of([&] { set_dylora_rank(model, 0); }), "got 0"));
  TinyDecoder<GraftLayers> plain;
  CHECK(contains(error_of([&] { set_dylora_rank(plain, 1); }), "got a model without"));
}

TEST_CASE("DyLoRA's options go to a config and come back", "[adapters][dylora]") {
  const DyloraOptions options{.rank = 6,
                              .alpha = 2.5,
                              .dropout = 0.1,
                              .init = "gaussian",
                              .rank_min = 2,
                              .rank_max = 4,
                              .rank_weights = {1, 2, 3},
                              .frozen = false,
                              .eval_rank = 3};
  nlohmann::json config;
  make_recipe(options)->write_config(config);
  const auto recipe = dylora_entry().read_config(config);
  CHECK(config.empty());
  nlohmann::json again, expected;
  recipe->write_config(again);
  make_recipe(options)->write_config(expected);
  CHECK(again == expected);
  CHECK(expected["rank_weights"] == nlohmann::json({1.0, 2.0, 3.0}));
  CHECK(recipe->describe() ==
        "rank 6, alpha 2.5, trained at ranks 2 to 4 with weights, all leading units, dropout 0.1, "
        "init gaussian, used at rank 3");
  nlohmann::json empty = nlohmann::json::object();
  CHECK(options_of(*dylora_entry().read_config(empty)).rank == 8);
  CHECK(options_of(*dylora_entry().read_config(empty)).frozen);
}

TEST_CASE("DyLoRA refuses what it cannot do, in a line", "[adapters][dylora]") {
  const auto error = [](const DyloraOptions& options) {
    return error_of([&] { options.validate(); });
  };
  CHECK(contains(error({.rank = 0}), "[dylora] rank must be in [1, min(in, out)]; got rank=0"));
  CHECK(contains(error({.alpha = 0}), "alpha"));
  CHECK(contains(error({.dropout = 1}), "[dylora]"));
  CHECK(contains(error({.rank_min = 5, .rank_max = 4}),
                 "1 <= rank_min <= rank_max <= r; got rank_min=5, rank_max=4, r=8"));
  CHECK(contains(error({.rank_min = 0}), "got rank_min=0"));
  CHECK(contains(error({.rank_max = 9}), "rank_max=9, r=8"));
  CHECK(contains(error({.rank_max = -1}), "rank_max=-1"));
  CHECK(contains(error({.eval_rank = 9}), "eval_rank must be in [1, 8]"));
  CHECK(contains(error({.rank_weights = {1, 2}}), "each of the 8 ranks from 1 to 8; got 2"));
  CHECK(
      contains(error({.rank = 2, .rank_weights = {1, -1}}), "none negative, not all 0; got [1.0"));
  CHECK(contains(error({.rank = 2, .rank_weights = {0, 0}}), "not all 0"));
  CHECK(contains(error({.rank = 2, .rank_weights = {1e308, 1e308}}), "must be finite"));
  const FrozenLinear base = base_layer();
  CHECK(contains(error_of([&] { make(base, {.rank = 6}); }), "got rank=6 for in=6, out=5"));
  CHECK(contains(error_of([&] { make(base, {.rank = 4})->set_rank(5); }),
                 "must be in [1, 4]; got 5 (layer 'q')"));
  graft::nn::Conv1d grouped(torch::nn::Conv1dOptions(4, 6, 3).groups(2));
  CHECK(contains(error_of([&] { make(graft::nn::frozen_layer(*grouped), {.rank = 2}); }),
                 "ranks do not nest in a convolution with groups; got groups=2 (layer 'q')"));
}
