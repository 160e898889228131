// DoRA's folders, against those of PEFT.
#include <graft/adapters/dora.h>
#include <graft/attach/attach.h>
#include <graft/io/safetensors.h>
#include <graft/nn/conv.h>
#include <graft/nn/embedding.h>
#include <graft/nn/linear.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/io/file_helpers.h"
#include "tests/support/gradcheck.h"

namespace {

using graft::adapters::DoraImpl;
using graft::adapters::DoraOptions;
using graft::testing::contains;
using graft::testing::distance;
using graft::testing::error_of;

// The layers of the golden adapter.
struct GoldenModel : torch::nn::Module {
  graft::nn::Linear linear = register_module("linear", graft::nn::Linear(12, 10));
  graft::nn::Embedding embed = register_module("embed", graft::nn::Embedding(14, 8));
  graft::nn::Conv2d conv = register_module(
      "conv",
      graft::nn::Conv2d(torch::nn::Conv2dOptions(3, 6, {3, 2}).stride({2, 1}).padding({1, 0})));

  at::Tensor run(const std::string& name, const at::Tensor& x) {
    if (name == "linear") return linear->forward(x);
    return name == "embed" ? embed->forward(x) : conv->forward(x);
  }
};

nlohmann::json config_in(const std::filesystem::path& folder) {
  return nlohmann::json::parse(std::ifstream(folder / "adapter_config.json"));
}

std::shared_ptr<const graft::adapters::Recipe> read(nlohmann::json config) {
  return graft::adapters::find_method("dora").read_config(config);
}

}  // namespace

TEST_CASE("a PEFT folder with DoRA gives PEFT's outputs and gradients", "[adapters][dora]") {
  const std::filesystem::path golden = std::filesystem::path(GRAFT_GOLDENS) / "dora";
  const auto file = graft::io::SafetensorsFile::open(golden / "expected.safetensors");
  GoldenModel model;
  const auto adapter = graft::attach_from(model, golden);
  {
    const at::NoGradGuard no_grad;
    for (const std::string layer : {"linear", "embed", "conv"})
      for (auto& parameter : model.named_children()[layer]->named_parameters(false))
        parameter.value().copy_(file.tensor(layer + "." + parameter.key()));
  }
  for (const std::string layer : {"linear", "embed", "conv"}) {
    INFO(layer);
    at::Tensor x = file.tensor(layer + ".x").clone();
    if (layer != "embed") x.set_requires_grad(true);
    const at::Tensor y = model.run(layer, x);
    CHECK(distance(y, file.tensor(layer + ".y")) < 1e-5);
    y.backward(file.tensor(layer + ".dy"));
    if (layer != "embed") CHECK(distance(x.grad(), file.tensor(layer + ".grad_x")) < 1e-5);
    const std::string prefix = layer + ".adapters.default.lora_";
    for (const auto& [name, tensor] : adapter.named_parameters()) {
      if (!name.starts_with(prefix)) continue;
      const std::string key = name.ends_with("_vector") ? "m" : name.substr(prefix.size());
      CHECK(distance(tensor.grad(), file.tensor(layer + ".grad_" + key)) < 1e-5);
    }
  }
}

TEST_CASE("a DoRA folder has PEFT's keys, shapes and fields", "[adapters][dora]") {
  const std::filesystem::path golden = std::filesystem::path(GRAFT_GOLDENS) / "dora";
  const graft::testing::TempFolder folder;
  GoldenModel model;
  graft::attach_from(model, golden).save(folder.path());
  const auto ours = graft::io::SafetensorsFile::open(folder / "adapter_model.safetensors"),
             theirs = graft::io::SafetensorsFile::open(golden / "adapter_model.safetensors");
  REQUIRE(ours.names().size() == theirs.names().size());
  for (const auto& name : theirs.names()) CHECK(at::equal(ours.tensor(name), theirs.tensor(name)));
  const auto config = config_in(folder.path()), expected = config_in(golden);
  for (const char* key : {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora",
                          "lora_bias", "init_lora_weights", "fan_in_fan_out"})
    CHECK(config.at(key) == expected.at(key));
  for (const auto& [key, value] : config.items()) CHECK(expected.contains(key));
}

TEST_CASE("DoRA's options survive a configuration; its own key is written only when it is on",
          "[adapters][dora]") {
  nlohmann::json config = {{"peft_type", "LORA"}};
  const DoraOptions options{.rank = 4,
                            .alpha = 2.5,
                            .dropout = 0.1,
                            .dropout_on_base = true,
                            .rslora = true,
                            .init = "orthogonal"};
  DoraImpl::write_config(options, config);
  CHECK(config.at("dora_dropout_on_base") == true);
  CHECK(graft::adapters::method_of_config(config).name == "dora");
  nlohmann::json written = {{"peft_type", "LORA"}};
  read(config)->write_config(written);
  CHECK(written == config);
  CHECK(read(config)->describe() ==
        "rank 4, alpha 2.5, rsLoRA, dropout 0.1 on the base too, init orthogonal");
  config["use_dora"] = false;
  CHECK(graft::adapters::method_of_config(config).name == "lora");
  nlohmann::json plain;
  read(nlohmann::json::object())->write_config(plain);
  CHECK(plain.at("lora_alpha") == 8);
  CHECK_FALSE(plain.contains("dora_dropout_on_base"));
  const auto recipe = read({{"loraplus_lr_ratio", 4.0}});
  CHECK(recipe->rule("lora_A").lr_scale == 1.0);
  CHECK(recipe->rule("lora_magnitude_vector").lr_scale == 4.0);
  CHECK(contains(error_of([] { read({{"lora_bias", true}}); }), "[dora] lora_bias must be off"));
  CHECK(contains(error_of([] { read({{"use_dora", false}}); }), "use_dora must be true"));
}
