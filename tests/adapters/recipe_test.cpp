#include <graft/adapters/lora.h>
#include <graft/adapters/recipe.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "tests/support/testing.h"

namespace {

using namespace graft::adapters;
using graft::testing::contains;
using graft::testing::error_of;
using nlohmann::json;

const LoraOptions& lora_of(const Recipe& recipe) {
  return dynamic_cast<const RecipeOf<LoraImpl>&>(recipe).options();
}

}  // namespace

TEST_CASE("methods are found by name, and unknown ones list the known", "[adapters][recipe]") {
  CHECK(find_method("lora").peft_type == "LORA");
  const auto names = method_names();
  CHECK(std::find(names.begin(), names.end(), "lora") != names.end());
  CHECK(contains(error_of([] { find_method("lorra"); }), "[methods] method must be one of lora"));
  CHECK(contains(error_of([] { find_method("lorra"); }), "got 'lorra'"));
  CHECK(contains(error_of([] { register_method(find_method("lora")); }),
                 "a method's name must be new; got 'lora' again"));
}

TEST_CASE("a new method joins the list", "[adapters][recipe]") {
  MethodEntry entry = find_method("lora");
  entry.name = "of_this_test";
  entry.peft_type = "OF_THIS_TEST";
  register_method(entry);
  CHECK(method_of_config(json{{"peft_type", "OF_THIS_TEST"}}).name == "of_this_test");
}

TEST_CASE("a config names its method by peft_type", "[adapters][recipe]") {
  CHECK(method_of_config(json{{"peft_type", "LORA"}}).name == "lora");
  CHECK(contains(error_of([] { method_of_config(json::object()); }), "got nothing"));
  CHECK(contains(error_of([] { method_of_config(json{{"peft_type", 3}}); }), "got 3"));
  CHECK(contains(error_of([] {
                   method_of_config(json{{"peft_type", "NO_SUCH"}});
                 }),
                 "got NO_SUCH"));
}

TEST_CASE("LoRA's options go to a config and come back", "[adapters][recipe]") {
  const LoraOptions options{
      .rank = 3, .alpha = 2.5, .dropout = 0.1, .rslora = true, .bias = true, .init = "gaussian"};
  json config;
  make_recipe(options)->write_config(config);
  CHECK(config["r"] == 3);
  CHECK(config["lora_alpha"] == 2.5);
  CHECK(config["init_lora_weights"] == "gaussian");
  const LoraOptions back = lora_of(*find_method("lora").read_config(config));
  CHECK(back.rank == 3);
  CHECK(back.alpha == 2.5);
  CHECK(back.dropout == 0.1);
  CHECK((back.rslora && back.bias));
  CHECK(back.init == "gaussian");
  for (const char* understood :
       {"r", "lora_alpha", "lora_dropout", "use_rslora", "lora_bias", "init_lora_weights"})
    CHECK_FALSE(config.contains(understood));
}

TEST_CASE("a LoRA config's missing fields have PEFT's values", "[adapters][recipe]") {
  json empty = json::object();
  const LoraOptions options = lora_of(*find_method("lora").read_config(empty));
  CHECK(options.rank == 8);
  CHECK(options.alpha == 8.0);
  CHECK(options.init == "kaiming");
  json random = {{"init_lora_weights", false}};
  CHECK(lora_of(*find_method("lora").read_config(random)).init == "random");
  json whole;
  make_recipe(LoraOptions{.alpha = 16})->write_config(whole);
  CHECK(whole["lora_alpha"].is_number_integer());
  CHECK(whole["init_lora_weights"] == true);
}

TEST_CASE("a config value of the wrong type is refused", "[adapters][recipe]") {
  for (json config :
       {json{{"r", "four"}}, json{{"use_rslora", 2.5}}, json{{"init_lora_weights", 3}}})
    CHECK(contains(error_of([&] { find_method("lora").read_config(config); }), "[lora]"));
}

TEST_CASE("rank and alpha of one layer override the recipe's", "[adapters][recipe]") {
  const graft::nn::FrozenLinear base{at::ones({6, 6}), {}};
  const auto recipe = make_recipe(LoraOptions{.rank = 2, .alpha = 4});
  const auto adapter = recipe->make(base, {"q", 0}, {3, 9.0});
  const auto& lora = dynamic_cast<const LoraImpl&>(*adapter);
  CHECK(lora.lora_A.size(0) == 3);
  CHECK(lora.scale == 3.0);
  CHECK(contains(error_of([&] { recipe->make(base, {"q", 0}, {7, std::nullopt}); }), "got rank=7"));
  CHECK(contains(error_of([&] { recipe->make(base, {"q", 0}, {0, std::nullopt}); }), "[lora]"));
}

TEST_CASE("a recipe describes itself in a line", "[adapters][recipe]") {
  CHECK(make_recipe(LoraOptions{})->describe() == "rank 8, alpha 16");
  CHECK(make_recipe(LoraOptions{.dropout = 0.1, .rslora = true, .bias = true, .init = "gaussian"})
            ->describe() == "rank 8, alpha 16, rsLoRA, dropout 0.1, lora bias, init gaussian");
}
