// X-LoRA and Arrow beside Hugging Face PEFT (tests/goldens/make_xlora.py, make_arrow.py).
#include <graft/adapters/lora.h>
#include <graft/moe/arrow.h>
#include <graft/moe/xlora.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/adapters/random_bases.h"
#include "tests/moe/mixture_tests.h"

namespace {

using namespace graft::moe;
using graft::attach;
using graft::attach_from;
using graft::nn::FrozenLinear;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;
using graft::testing::Golden;
using graft::testing::random;
using graft::testing::randomise;
using graft::testing::some_input;
using graft::testing::some_linear;
using graft::testing::TempFolder;
using graft::testing::TwoLayers;

// PEFT's X-LoRA wants a part called `model`.
struct Wrapped : torch::nn::Module {
  Wrapped() { model = register_module("model", std::make_shared<TwoLayers>()); }
  at::Tensor forward(const at::Tensor& x) { return model->forward(x); }
  std::shared_ptr<TwoLayers> model;
};

void load_base(torch::nn::Module& module, const graft::io::SafetensorsFile& file) {
  const at::NoGradGuard no_grad;
  for (auto& item : module.named_parameters()) item.value().copy_(file.tensor(item.key()));
}

std::vector<std::filesystem::path> golden_adapters(const std::string& method) {
  std::vector<std::filesystem::path> folders;
  for (const char* number : {"0", "1", "2"})
    folders.push_back(std::filesystem::path(GRAFT_GOLDENS) / method / "adapters" / number);
  return folders;
}

// PEFT's folder with the adapters' whole paths.
void copy_golden(const std::string& name, const std::filesystem::path& to) {
  const std::filesystem::path golden = std::filesystem::path(GRAFT_GOLDENS) / "xlora";
  std::filesystem::copy(golden / name, to, std::filesystem::copy_options::recursive);
  nlohmann::json config =
      nlohmann::json::parse(std::ifstream(golden / name / "adapter_config.json"));
  for (auto& folder : config["adapters"]) folder = (golden / folder.get<std::string>()).string();
  std::ofstream(to / "adapter_config.json") << config.dump();
}

std::shared_ptr<const ExpertLibrary> some_library(int64_t count, bool equal = false) {
  at::manual_seed(31);
  std::vector<ExpertLibrary::Adapter> adapters;
  const at::Tensor A = random({2, 4}), B = random({6, 2});
  for (int64_t e = 0; e < count; ++e)
    adapters.push_back({{"q_proj", equal ? graft::adapters::PlainLora{A, B, 1.5}
                                         : graft::adapters::PlainLora{
                                               random({1 + e, 4}), random({6, 1 + e}), 1.0 + e}}});
  return std::make_shared<ExpertLibrary>(std::move(adapters));
}

XloraOptions small(std::shared_ptr<const ExpertLibrary> experts) {
  return {.experts = std::move(experts), .hidden_size = 5};
}

at::Tensor hidden_states() {
  at::manual_seed(9);
  return random({2, 5, 5});
}

}  // namespace

TEST_CASE("PEFT's X-LoRA folders give PEFT's scalings, outputs and gradients", "[moe][xlora]") {
  for (const std::string name : {"plain", "deep"}) {
    INFO(name);
    const TempFolder folder;
    copy_golden(name, folder.path());
    const auto golden = graft::io::SafetensorsFile::open(std::filesystem::path(GRAFT_GOLDENS) /
                                                         "xlora" / (name + ".safetensors"));
    Wrapped model;
    load_base(model, golden);
    auto adapter = attach_from(model, folder.path());
    model.eval();
    auto& xlora = xlora_of(*adapter.layers()[0].adapter);
    const at::Tensor x = golden.tensor("x");
    const at::Tensor hidden = model.forward(x).detach();  // scaling_pass_value is 0
    CHECK(distance(hidden, golden.tensor("hidden")) < 1e-6);
    const at::Tensor scalings = xlora.classify(hidden), theirs = golden.tensor("scalings");
    CHECK(distance(scalings, xlora.options.layerwise ? theirs : theirs.select(2, 0)) < 1e-6);
    const XloraScope scope(xlora, hidden);
    const at::Tensor y = model.forward(x);
    CHECK(distance(y, golden.tensor("y")) < 1e-5);
    (y * golden.tensor("c")).sum().backward();
    for (const auto& [key, tensor] : xlora.shared_file_tensors()) {
      INFO(key);
      const std::string own =
          key.substr(std::string("base_model.internal_xlora_classifier.").size());
      CHECK(distance(tensor.grad(), golden.tensor("grad." + own)) < 1e-5);
    }
    // Saved again: the same tensors, and a configuration that PEFT's fields agree with.
    const TempFolder again;
    adapter.save(again.path());
    const auto ours = graft::io::SafetensorsFile::open(again / "adapter_model.safetensors");
    const auto before = graft::io::SafetensorsFile::open(folder / "adapter_model.safetensors");
    CHECK(ours.names() == before.names());
    for (const auto& key : before.names()) CHECK(at::equal(ours.tensor(key), before.tensor(key)));
    const auto theirs_config = nlohmann::json::parse(std::ifstream(folder / "adapter_config.json"));
    const auto config = nlohmann::json::parse(std::ifstream(again / "adapter_config.json"));
    for (const auto& [key, value] : theirs_config.items())
      if (key != "auto_mapping" && key != "peft_version" && key != "task_type") {
        INFO(key);
        CHECK(config.at(key) == value);
      }
    Wrapped other;
    load_base(other, golden);
    attach_from(other, again.path());
  }
}

TEST_CASE("PEFT's Arrow gives the same outputs as graft's over PEFT's folders", "[moe][arrow]") {
  const Golden golden("arrow");
  const auto folders = golden_adapters("arrow");
  const auto library = ExpertLibrary::read(folders);
  const at::Tensor x = golden.file.tensor("x");
  const auto run = [&](const ArrowOptions& options) {
    TwoLayers model;
    golden.load_base(model);
    attach(model, options, {.targets = graft::nn::Selector(library->layers())});
    return model.forward(x);
  };
  CHECK(distance(run({.experts = library, .top_k = 2, .temperature = 0.7}),
                 golden.file.tensor("y")) < 1e-5);
  const auto tasks = ExpertLibrary::read({folders[0], folders[1]}),
             general = ExpertLibrary::read({folders[2]});
  CHECK(distance(run({.experts = tasks->without_general(*general), .top_k = 1, .temperature = 0.7}),
                 golden.file.tensor("y_gks")) < 1e-5);
  TwoLayers model;
  golden.load_base(model);
  auto adapter = attach(model, ArrowOptions{.experts = library},
                        {.targets = graft::nn::Selector(library->layers())});
  const at::Tensor v = static_cast<ArrowImpl&>(*adapter.layers()[0].adapter).prototypes;
  const at::Tensor cosines = (v * golden.file.tensor("prototypes")).sum(1).abs();
  CHECK(distance(cosines, at::ones({3})) < 1e-5);
}

TEST_CASE("T19 X-LoRA's scalings sum to 1, and equal adapters are one adapter", "[moe][xlora]") {
  const FrozenLinear base = some_linear();
  XloraImpl layer(base, small(some_library(3)), {"q_proj", 1});
  randomise(layer.parameters());
  const at::Tensor c = layer.classify(hidden_states());
  CHECK(c.sizes() == at::IntArrayRef({2, 5, 3}));
  CHECK(distance(c.sum(-1), at::ones({2, 5}, at::kDouble)) < 1e-12);
  const at::Tensor x = some_input();
  {
    const XloraScope scope(layer, hidden_states());
    CHECK(distance(layer.forward(base, x),
                   graft::testing::sum_over_experts(layer, base, x, c.view({10, 3}))) < 1e-12);
    // The scale before A is the scale after B.
    at::Tensor before = at::linear(x, base.weight, base.bias);
    for (int64_t e = 0; e < 3; ++e) {
      const auto lora = layer.extract_expert(e);
      before = before + at::linear(at::linear(x * c.narrow(-1, e, 1), lora.A), lora.B) * lora.scale;
    }
    CHECK(distance(layer.forward(base, x), before) < 1e-12);
  }
  CHECK(at::equal(layer.forward(base, x), base.apply(x)));  // pass 1

  XloraImpl same(base, small(some_library(3, /*equal=*/true)), {"q_proj", 1});
  randomise(same.parameters());
  const XloraScope scope(same, hidden_states());
  const auto lora = same.extract_expert(1);
  CHECK(distance(same.forward(base, x),
                 at::linear(x, base.weight + 1.5 * lora.B.mm(lora.A), base.bias)) < 1e-12);
}

TEST_CASE("T19 X-LoRA's top k keeps the largest scalings as they are, or takes a softmax again",
          "[moe][xlora]") {
  XloraOptions options = small(some_library(3));
  options.top_k = 2;
  options.global_scaling_weight = 2.0;
  const FrozenLinear base = some_linear();
  XloraImpl layer(base, options, {"q_proj", 1});
  randomise(layer.parameters());
  const at::Tensor c = layer.classify(hidden_states()).view({10, 3});
  const auto [values, indices] = c.topk(2);
  {
    const XloraScope scope(layer, hidden_states());
    const at::Tensor g = layer.gates(some_input());
    CHECK(distance(g, 2 * at::zeros_like(c).scatter(1, indices, values)) < 1e-14);
    CHECK((g.sum(1) < 2).all().item<bool>());
  }
  options.softmax_topk = true;
  XloraImpl again(base, options, {"q_proj", 1});
  randomise(again.parameters());
  const XloraScope scope(again, hidden_states());
  CHECK(distance(again.gates(some_input()),
                 2 * at::zeros_like(c).scatter(1, indices, at::softmax(values, -1))) < 1e-14);
  graft::testing::check_leaf_gradients(
      [&] {
        const XloraScope inner(again, hidden_states());
        return again.forward(base, some_input());
      },
      {{"bias", again.parameters().back()}});
}

TEST_CASE("X-LoRA's first pass runs at scaling_pass_value, its classifier drops in training alone",
          "[moe][xlora]") {
  XloraOptions options = small(some_library(2));
  options.scaling_pass_value = 0.5;
  options.depth = 3;
  options.size = 4;
  options.dropout_p = 0.5;
  const FrozenLinear base = some_linear();
  options.global_scaling_weight = 3.0;
  XloraImpl layer(base, options, {"q_proj", 1});
  randomise(layer.parameters());
  const at::Tensor x = some_input();
  CHECK(distance(layer.forward(base, x), graft::testing::sum_over_experts(
                                             layer, base, x, at::full({10, 2}, 1.5, at::kDouble))) <
        1e-13);
  const at::Tensor first = layer.classify(hidden_states());
  CHECK_FALSE(at::equal(layer.classify(hidden_states()), first));
  layer.eval();
  CHECK(at::equal(layer.classify(hidden_states()), layer.classify(hidden_states())));
  CHECK(layer.parameters().size() == 6);
}

TEST_CASE("X-LoRA without softmax takes the classifier's numbers, in the innermost scope",
          "[moe][xlora]") {
  XloraOptions options = small(some_library(3));
  options.softmax = false;
  const FrozenLinear base = some_linear();
  XloraImpl layer(base, options, {"q_proj", 1});
  randomise(layer.parameters());
  const auto parameters = layer.shared_file_tensors();
  const at::Tensor x = some_input(), hidden = hidden_states();
  CHECK(distance(layer.classify(hidden),
                 at::linear(hidden, parameters[0].tensor, parameters[1].tensor)) < 1e-13);
  const XloraScope scope(layer, hidden);
  const at::Tensor outer = layer.gates(x);
  {
    const XloraScope inner(layer, hidden * 2);
    CHECK_FALSE(at::equal(layer.gates(x), outer));
  }
  CHECK(at::equal(layer.gates(x), outer));
}

TEST_CASE("each field of X-LoRA's configuration is its own option, and folders go by number",
          "[moe][xlora][files]") {
  const auto folders = golden_adapters("xlora");
  nlohmann::json config = {{"hidden_size", 7},
                           {"xlora_depth", 3},
                           {"xlora_size", 5},
                           {"xlora_dropout_p", 0.125},
                           {"layerwise_scalings", true},
                           {"enable_softmax", false},
                           {"softmax_temperature", 0.5},
                           {"top_k_lora", 2},
                           {"enable_softmax_topk", true},
                           {"scaling_pass_value", 0.25},
                           {"global_scaling_weight", 1.5}};
  config["adapters"] = {
      {"0", folders[0].string()}, {"10", folders[1].string()}, {"9", folders[2].string()}};
  nlohmann::json rest = config, written = nlohmann::json::object();
  graft::adapters::find_method("xlora").read_config(rest)->write_config(written);
  CHECK(written["use_trainable_adapters"] == false);
  written.erase("use_trainable_adapters");
  config["adapters"] = {
      {"0", folders[0].string()}, {"1", folders[2].string()}, {"2", folders[1].string()}};
  CHECK(written == config);
}

TEST_CASE("X-LoRA's counter is its classifier's, one for all layers", "[moe][xlora]") {
  XloraOptions options = small(some_library(2));
  options.depth = 2;
  options.dropout_p = 0.5;
  const FrozenLinear base = some_linear();
  const graft::adapters::LayerContext context{"q_proj", 1};
  auto shared = XloraImpl::make_shared_part(options, {{"q_proj", base}, {"q_proj", base}}, context);
  graft::adapters::LayerContext with_shared = context;
  with_shared.shared = shared;
  XloraImpl first(base, options, with_shared), second(base, options, with_shared);
  randomise(first.parameters());
  first.classify(hidden_states());
  CHECK(first.counters() == std::vector<int64_t>{1});
  const at::Tensor expected = second.classify(hidden_states());
  CHECK(first.counters() == std::vector<int64_t>{2});
  first.set_counters({1});
  CHECK(at::equal(first.classify(hidden_states()), expected));
  CHECK(contains(error_of([&] { first.set_counters({1, 2}); }), "[xlora] a state has one counter"));
}

TEST_CASE("X-LoRA refuses what does not fit", "[moe][xlora]") {
  const FrozenLinear base = some_linear();
  XloraImpl layer(base, small(some_library(2)), {"q_proj", 1});
  CHECK(contains(error_of([&] {
                   layer.classify(random({2, 4}));
                 }),
                 "[xlora] hidden states must be [..., 5]; got [2, 4]"));
  const XloraScope scope(layer, hidden_states());
  CHECK(contains(error_of([&] {
                   layer.forward(base, random({3, 4}));
                 }),
                 "must be those of this pass's tokens; got 10 for 3 (layer 'q_proj')"));
  {
    const at::NoGradGuard no_grad;  // as a checkpointed block's first pass
    CHECK(contains(error_of([&] { layer.forward(base, some_input()); }),
                   "[xlora] a pass by trained scalings must keep its graph"));
    layer.eval();
    layer.forward(base, some_input());
    layer.train();
  }
  CHECK(contains(error_of([&] { layer.merge(base); }), "a mixture cannot be merged"));
  const auto with = [](auto change) {
    XloraOptions options = small(some_library(2));
    change(options);
    return error_of([&] { options.validate(); });
  };
  CHECK(contains(with([](auto& o) { o.top_k = 3; }),
                 "top_k_lora must be in [1, number of adapters]; got 3 for 2"));
  CHECK(contains(with([](auto& o) { o.depth = 0; }), "xlora_depth"));
  CHECK(contains(with([](auto& o) { o.temperature = 0; }), "softmax_temperature must be positive"));
  CHECK(contains(with([](auto& o) { o.experts = nullptr; }), "the experts must be given"));
  graft::adapters::LoraImpl lora(base, {.rank = 1}, {"q_proj", 1});
  CHECK(contains(error_of([&] { xlora_of(lora); }), "the adapter must be X-LoRA; got lora"));
  const auto read = [](nlohmann::json config) {
    return error_of([&] { graft::adapters::find_method("xlora").read_config(config); });
  };
  CHECK(contains(read(nlohmann::json::object()),
                 "adapters must name the adapters' folders; got null"));
  const std::string folder = golden_adapters("xlora")[0].string();
  CHECK(contains(read({{"adapters", {{"0", folder}}}, {"use_trainable_adapters", true}}),
                 "use_trainable_adapters must be off"));
}
