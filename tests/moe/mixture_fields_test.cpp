// Each field of a linear mixture's configuration sets its own option, and is written again.
#include <graft/moe/arrow.h>
#include <graft/moe/llava_mole.h>
#include <graft/moe/lora_mixer.h>
#include <graft/moe/meteora.h>
#include <graft/moe/mm_lora.h>

#include <nlohmann/json.hpp>

#include "tests/moe/mixture_tests.h"

namespace {

using namespace graft::moe;
using nlohmann::json;

// Options of which none has its default, and the fields by hand.
template <class Options>
void check_fields(const Options& options, const json& expected) {
  const auto recipe = graft::adapters::make_recipe(options);
  INFO(recipe->method());
  json written = json::object();
  recipe->write_config(written);
  CHECK(written == expected);
  json rest = written, again = json::object();
  graft::adapters::find_method(recipe->method()).read_config(rest)->write_config(again);
  CHECK(again == expected);
  CHECK(rest.empty());  // nothing that it wrote is unknown to it
}

// The fields that experts behind a router have in common.
json routed(json own) {
  own.update({{"r", 3},
              {"lora_alpha", 7},
              {"lora_dropout", 0.25},
              {"init_lora_weights", "gaussian"},
              {"use_rslora", true},
              {"router_aux_loss_coef", 0.125}});
  if (!own.contains("num_experts")) own["num_experts"] = 5;
  return own;
}

template <class Options>
Options with_common(Options options) {
  options.rank = 3;
  options.alpha = 7.0;
  options.dropout = 0.25;
  options.rslora = true;
  options.init = "gaussian";
  options.balance_loss = 0.125;
  if constexpr (requires { options.experts = 5; }) options.experts = 5;
  return options;
}

}  // namespace

TEST_CASE("each field of a trained mixture's configuration is its own option",
          "[moe][mixture][files]") {
  MolaOptions mola = with_common(MolaOptions{.top_k = 3});
  mola.experts = {4, 6};
  check_fields(mola, routed({{"num_experts", {4, 6}}, {"top_k", 3}}));
  check_fields(with_common(LoraMoeOptions{.delta = 0.5, .paper_dispersion = true}),
               routed({{"delta", 0.5}, {"paper_dispersion", true}}));
  check_fields(with_common(AdaMoleOptions{.max_threshold = 0.0625}),
               routed({{"max_threshold", 0.0625}}));
  check_fields(with_common(LlavaMoleOptions{.combine = Combine::straight_through}),
               routed({{"combine", "straight_through"}}));
  check_fields(with_common(LoraMixerOptions{.top_k = 4, .hard_steps = 9}),
               routed({{"top_k", 4}, {"hard_steps", 9}}));
  check_fields(
      MmLoraOptions{
          .ranks = {5, 2, 3}, .scale = 1.5, .dropout = 0.25, .init = "gaussian", .default_kind = 2},
      {{"expert_ranks", {5, 2, 3}},
       {"scale", 1.5},
       {"lora_dropout", 0.25},
       {"init_lora_weights", "gaussian"},
       {"default_kind", 2}});
}

TEST_CASE("each field of frozen experts' configuration is its own option",
          "[moe][library][files]") {
  const auto library =
      std::make_shared<ExpertLibrary>(std::vector<int64_t>{2, 5}, std::vector<double>{1.5, 0.25});
  const json experts = {{"expert_ranks", {2, 5}}, {"expert_scales", {1.5, 0.25}}};
  json meteora = {{"top_k", 1}, {"router_temperature", 15.0}, {"label_loss", 50.0}};
  meteora.update(experts);
  check_fields(
      MeteoraOptions{.experts = library, .top_k = 1, .temperature = 15.0, .label_loss = 50.0},
      meteora);
  json arrow = {{"top_k", 2}, {"router_temperature", 0.5}};
  arrow.update(experts);
  check_fields(ArrowOptions{.experts = library, .top_k = 2, .temperature = 0.5}, arrow);
}
