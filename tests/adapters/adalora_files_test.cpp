// AdaLoRA's options, files and agreement with PEFT's; what it computes is in adalora_test.cpp.
#include <ATen/ATen.h>
#include <graft/adapters/adalora.h>
#include <graft/attach/attach.h>
#include <graft/io/safetensors.h>
#include <graft/nn/linear.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/support/gradcheck.h"
#include "tests/support/method_tests.h"
#include "tests/support/tiny_models.h"

namespace {

using namespace graft::adapters;
using namespace graft::testing;
using graft::nn::FrozenConv;
using graft::nn::FrozenLinear;
using nlohmann::json;

AdaLoraImpl make(const graft::nn::FrozenLayer& base, const AdaLoraOptions& options) {
  return make_random<AdaLoraImpl>(base, options);
}

const AdaLoraOptions& options_of(const Recipe& recipe) {
  return dynamic_cast<const RecipeOf<AdaLoraImpl>&>(recipe).options();
}

}  // namespace

TEST_CASE("triplets that are left fold into plain LoRA", "[adapters][adalora]") {
  const FrozenLinear base = some_linear(6, 5);
  const AdaLoraOptions options{.init_rank = 4, .target_rank = 1, .lora_alpha = 3};
  AdaLoraImpl adapter = make(base, options);
  {
    const at::NoGradGuard no_grad;
    adapter.lora_E[0].zero_();
    adapter.lora_E[2].zero_();
  }
  StoredLayer stored;
  for (const auto& [key, tensor] : adapter.file_tensors()) stored[key] = tensor.detach();
  const auto to_lora = adalora_entry().to_lora;
  const auto recipe = make_recipe(options);
  const PlainLora plain = to_lora(*recipe, stored, 0);
  CHECK(plain.A.sizes() == at::IntArrayRef({2, 5}));
  CHECK(plain.B.sizes() == at::IntArrayRef({6, 2}));
  CHECK(distance(base.weight + plain.scale * plain.B.mm(plain.A), adapter.merged_weight(base)) <
        1e-14);
  CHECK(contains(error_of([&] { to_lora(*recipe, stored, 2); }), "do not nest; got rank=2"));
  stored["lora_E"] = at::zeros({4, 1}, at::kDouble);
  CHECK(to_lora(*recipe, stored, 0).A.size(0) == 0);
  stored["lora_E"] = at::ones({3, 1}, at::kDouble);
  CHECK(contains(error_of([&] { to_lora(*recipe, stored, 0); }), "must fit each other"));
  stored.erase("lora_E");
  CHECK(contains(error_of([&] { to_lora(*recipe, stored, 0); }), "must hold lora_E"));
}

TEST_CASE("AdaLoRA's options go through a config and back", "[adapters][adalora]") {
  const MethodEntry entry = adalora_entry();
  CHECK((entry.peft_type == "ADALORA" && entry.keys.rank == "init_r"));
  json config;
  make_recipe(AdaLoraOptions{.init_rank = 6,
                             .target_rank = 3,
                             .lora_alpha = 2.5,
                             .dropout = 0.1,
                             .tinit = 1,
                             .tfinal = 2,
                             .delta_t = 3,
                             .beta1 = 0.8,
                             .beta2 = 0.7,
                             .orth_reg_weight = 0.2,
                             .total_step = 9,
                             .random_start = true})
      ->write_config(config);
  const auto recipe = entry.read_config(config);
  CHECK(config == json{{"fan_in_fan_out", false}});
  const AdaLoraOptions& o = options_of(*recipe);
  CHECK((o.init_rank == 6 && o.target_rank == 3 && o.lora_alpha == 2.5 && o.dropout == 0.1));
  CHECK((o.tinit == 1 && o.tfinal == 2 && o.delta_t == 3 && o.total_step == 9));
  CHECK((o.beta1 == 0.8 && o.beta2 == 0.7 && o.orth_reg_weight == 0.2 && o.random_start));
  CHECK(recipe->describe() ==
        "rank 6 to 3, alpha 2.5, budget from step 1, final 2 steps, dropout 0.1");

  json empty = json::object();  // PEFT's defaults
  const AdaLoraOptions d = options_of(*entry.read_config(empty));
  CHECK((d.init_rank == 12 && d.target_rank == 8 && d.lora_alpha == 8.0 && d.tinit == 0));
  CHECK((d.tfinal == 0 && d.delta_t == 1 && d.beta1 == 0.85 && d.beta2 == 0.85));
  CHECK((d.orth_reg_weight == 0.5 && !d.total_step && !d.random_start));
}

TEST_CASE("steps that are left to the training loop stay so in a file that PEFT opens",
          "[adapters][adalora]") {
  json config;
  make_recipe(AdaLoraOptions{})->write_config(config);
  CHECK(config["total_step"].get<int64_t>() > 1000000000);  // PEFT opens no file without one
  CHECK_FALSE(options_of(*adalora_entry().read_config(config)).total_step);
}

TEST_CASE("AdaLoRA refuses what it cannot do", "[adapters][adalora]") {
  const auto error = [](const AdaLoraOptions& options) {
    return error_of([&] { options.validate(); });
  };
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  CHECK(contains(error({.init_rank = 0}), "[adalora] init_r must be in [1, min(in, out)]; got 0"));
  CHECK(contains(error({.init_rank = 4}), "target_r must be in [1, init_r]; got 8 for init_r=4"));
  CHECK(contains(error({.target_rank = 0}), "target_r must be in [1, init_r]; got 0"));
  CHECK(contains(error({.rank = 13}), "rank must be in [0, init_r]; got 13 for init_r=12"));
  CHECK(contains(error({.lora_alpha = 0}), "lora_alpha must be finite and positive; got 0"));
  CHECK(contains(error({.tinit = -1}), "tinit and tfinal must be >= 0; got -1"));
  CHECK(contains(error({.delta_t = 0}), "deltaT must be at least 1; got 0"));
  CHECK(contains(error({.beta1 = 1}), "beta1 must be in (0, 1); got 1"));
  CHECK(contains(error({.beta2 = std::nan("")}), "beta2 must be in (0, 1)"));
  CHECK(contains(error({.orth_reg_weight = -1}), "orth_reg_weight must be >= 0; got -1"));
  CHECK(contains(error({.dropout = 1}), "[adalora]"));
  CHECK(contains(error({.tinit = 5, .tfinal = 5, .total_step = 10}), "total_step=10"));
  CHECK(contains(error({.tinit = kHuge, .tfinal = kHuge, .total_step = kHuge}), "tinit + tfinal"));
  CHECK(contains(error({.total_step = 0}), "total_step=0"));
  AdaLoraOptions{.tinit = 5, .tfinal = 4, .total_step = 10}.validate();

  CHECK(contains(error_of([] { make(some_linear(6, 5), {}); }), "got rank=12 for in=5"));
  CHECK(contains(error_of([] {
                   make(graft::nn::FrozenEmbedding{random({5, 4})}, {.init_rank = 1});
                 }),
                 "[adalora]"));
  const AdaLoraOptions small{.init_rank = 2, .target_rank = 1};
  CHECK(contains(error_of([&] {
                   make(graft::nn::FrozenEmbedding{random({5, 4})}, small);
                 }),
                 "this method does not support Embedding (layer 'q_proj')"));
  const FrozenConv grouped{random({4, 2, 2}), {}, {1}, {0}, {1}, 2};
  CHECK(contains(error_of([&] { make(grouped, small); }), "got groups=2 (layer 'q_proj')"));
  CHECK(contains(error_of([&] {
                   make_recipe(small)->make(some_linear(6, 5), {"q_proj", 1}, {1, std::nullopt});
                 }),
                 "training allots the ranks itself"));
  CHECK(contains(error_of([&] {
                   make_recipe(small)->make(some_linear(6, 5), {"q_proj", 1}, {std::nullopt, 2.0});
                 }),
                 "this method has no alpha"));
}

namespace {

// c(tanh(b(tanh(a x)))), the model of the goldens.
struct Stack : torch::nn::Module {
  Stack() {
    a = register_module("a", graft::nn::Linear(6, 5));
    b = register_module("b", graft::nn::Linear(torch::nn::LinearOptions(5, 7).bias(false)));
    c = register_module("c", graft::nn::Linear(7, 4));
    to(at::kDouble);
  }
  at::Tensor forward(const at::Tensor& x) {
    return c->forward(at::tanh(b->forward(at::tanh(a->forward(x)))));
  }
  graft::nn::Linear a{nullptr}, b{nullptr}, c{nullptr};
};

const std::string kGoldens = std::string(GRAFT_GOLDENS) + "/adalora/";

graft::io::SafetensorsFile golden_run() {
  return graft::io::SafetensorsFile::open(kGoldens + "run.safetensors");
}

void load_base(Stack& model, const graft::io::SafetensorsFile& golden) {
  const at::NoGradGuard no_grad;
  for (auto& item : model.named_parameters())
    item.value().copy_(golden.tensor("start." + item.key()));
}

// Puts the golden's values of that kind into the adapters.
void load_adapters(const graft::AttachedAdapter& adapter, const graft::io::SafetensorsFile& golden,
                   const std::string& kind) {
  const at::NoGradGuard no_grad;
  for (const auto& layer : adapter.layers())
    for (auto [suffix, tensor] : layer.adapter->file_tensors())
      tensor.copy_(golden.tensor(kind + "." + layer.name + "." + suffix));
}

graft::AttachedAdapter attach_golden(Stack& model) {
  return graft::attach(model,
                       AdaLoraOptions{.init_rank = 4,
                                      .target_rank = 2,
                                      .lora_alpha = 6,
                                      .tinit = 2,
                                      .tfinal = 4,
                                      .delta_t = 2,
                                      .beta1 = 0.8,
                                      .beta2 = 0.7,
                                      .orth_reg_weight = 0.1},
                       {.targets = {"a", "b", "c"}});
}

}  // namespace

TEST_CASE("AdaLoRA trains as PEFT's does: losses, budgets, masks and values",
          "[adapters][adalora]") {
  const auto golden = golden_run();
  json run;
  std::ifstream(kGoldens + "run.json") >> run;
  Stack model;
  load_base(model, golden);
  const auto adapter = attach_golden(model);
  load_adapters(adapter, golden, "start");
  const at::Tensor x = golden.tensor("x"), target = golden.tensor("target"),
                   values = golden.tensor("E");
  const auto total = static_cast<int64_t>(run["steps"].size());
  for (int64_t step = 0; step < total; ++step) {
    const json& expected = run["steps"][static_cast<size_t>(step)];
    INFO("step " << step);
    const StepInfo info{.step = step, .total_steps = total};
    adapter.begin_step(info);
    const at::Tensor loss = (model.forward(x) - target).square().mean() + adapter.penalty();
    CHECK(std::abs(loss.item<double>() - expected["loss"].get<double>()) < 1e-12);
    loss.backward();
    adapter.before_update(info);
    {
      const at::NoGradGuard no_grad;
      for (at::Tensor& p : adapter.parameters()) p.sub_(p.grad(), run["lr"].get<double>());
    }
    adapter.end_step(info);
    model.zero_grad();
    std::vector<at::Tensor> E;
    for (const auto& layer : adapter.layers())
      E.push_back(dynamic_cast<AdaLoraImpl&>(*layer.adapter).lora_E.detach().view(-1));
    CHECK(distance(at::cat(E), values[step]) < 1e-12);
    CHECK(at::equal(at::cat(E) != 0, values[step] != 0));
    const Figures figures = adapter.figures();
    CHECK(figures[0].second == expected["budget"].get<double>());
    CHECK(std::abs(figures[1].second - expected["kept"].get<double>() / 3) < 1e-12);
  }
}

TEST_CASE("AdaLoRA's output and gradients are PEFT's", "[adapters][adalora]") {
  const auto golden = golden_run();
  Stack model;
  load_base(model, golden);
  const auto adapter = attach_golden(model);
  load_adapters(adapter, golden, "end");
  const at::Tensor y = model.forward(golden.tensor("x"));
  CHECK(distance(y, golden.tensor("y")) < 1e-13);
  uneven_sum(y).backward();
  for (const auto& layer : adapter.layers())
    for (const auto& [suffix, tensor] : layer.adapter->file_tensors())
      CHECK(distance(tensor.grad(), golden.tensor("gradient." + layer.name + "." + suffix)) <
            1e-12);
}

TEST_CASE("a folder that PEFT has pruned gives its output, and is saved as it is",
          "[adapters][adalora]") {
  const auto golden = golden_run();
  Stack model;
  load_base(model, golden);
  auto adapter = graft::attach_from(model, kGoldens + "pruned");
  const auto rank = [&](size_t layer) {
    return dynamic_cast<AdaLoraImpl&>(*adapter.layers()[layer].adapter).lora_E.size(0);
  };
  CHECK((rank(0) == 2 && rank(1) == 0 && rank(2) == 4));  // a layer may lose all its triplets
  const at::Tensor expected = golden.tensor("y");
  CHECK(distance(model.forward(golden.tensor("x")), expected) < 1e-13);
  adapter.merge();
  CHECK(distance(model.forward(golden.tensor("x")), expected) < 1e-13);
  adapter.unmerge();

  std::string folder = (std::filesystem::temp_directory_path() / "graft-ada-XXXXXX").string();
  REQUIRE(::mkdtemp(folder.data()) != nullptr);
  adapter.save(folder);
  json config;
  std::ifstream(folder + "/adapter_config.json") >> config;
  Stack again;
  load_base(again, golden);
  graft::attach_from(again, folder);
  CHECK(distance(again.forward(golden.tensor("x")), expected) < 1e-13);
  std::filesystem::remove_all(folder);
  const json pattern = {{"a.lora_E", {true, true, false, false}},
                        {"b.lora_E", {false, false, false, false}},
                        {"c.lora_E", {true, true, true, true}}};
  CHECK(config["rank_pattern"] == pattern);
}
