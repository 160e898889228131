// MixLoRA's adapter folders: MoE-PEFT's layout both ways (goldens/make_mixlora.py).
#include <graft/attach/attach.h>
#include <graft/io/adapter_config.h>
#include <graft/io/atomic_file.h>
#include <graft/io/pickled_tensors.h>
#include <graft/io/safetensors.h>
#include <graft/moe/mix_lora_recipe.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/support/gradcheck.h"
#include "tests/support/tiny_blocks.h"

namespace {

namespace fs = std::filesystem;
using namespace graft::testing;
using graft::moe::MixLoraAdapterOptions;
using graft::moe::Selection;
using nlohmann::json;

const fs::path kGoldens = fs::path(GRAFT_GOLDENS) / "mixlora";

// A folder that is gone at the end.
struct Scratch {
  Scratch() : path(fs::temp_directory_path() / ("graft-mixlora-" + std::to_string(::getpid()))) {
    fs::create_directories(path);
  }
  ~Scratch() { fs::remove_all(path); }
  fs::path path;
};

std::string slurp(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  std::stringstream bytes;
  bytes << stream.rdbuf();
  return bytes.str();
}

json config_of(const fs::path& folder) {
  return json::parse(slurp(folder / "adapter_config.json"));
}

MixLoraAdapterOptions small() {
  return {.mixture = {.router = {.experts = 3, .top_k = 2}, .experts = {.rank = 2, .alpha = 4.0}}};
}

// The golden's weights in the blocks of a model.
void set_golden_weights(BlockDecoder& model, const graft::io::SafetensorsFile& golden) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < 2; ++i) {
    auto& mlp = model.blocks[i]->mlp;
    const std::string path = "layers." + std::to_string(i) + ".";
    int count = 0;
    for (auto& layer : {mlp->gate_proj, mlp->up_proj, mlp->down_proj})
      layer->weight.copy_(golden.tensor(
          path + std::vector<std::string>{"gate_proj", "up_proj", "down_proj"}[count++]));
  }
}

// MoE-PEFT's configuration with these fields changed.
void read_changed(const fs::path& folder, const json& changes) {
  json config = config_of(kGoldens / "moe_peft");
  config.update(changes);
  graft::io::write_text_file(folder / "adapter_config.json", config.dump());
  graft::io::read_adapter_config(folder);
}

// What a folder's configuration with these fields changed says.
MixLoraAdapterOptions options_of(const fs::path& folder, const json& changes) {
  read_changed(folder, changes);
  const auto recipe = graft::io::read_adapter_config(folder).recipe;
  return dynamic_cast<const graft::adapters::RecipeOf<graft::moe::MixLoraImpl>&>(*recipe).options();
}

std::string config_error(const fs::path& folder, const json& changes) {
  return error_of([&] { read_changed(folder, changes); });
}

}  // namespace

TEST_CASE("T17 MoE-PEFT's folders compute the paper's formula, old names included",
          "[moe][files]") {
  const auto golden = graft::io::SafetensorsFile::open(kGoldens / "expected.safetensors");
  for (const std::string name : {"moe_peft", "legacy"}) {
    INFO(name);
    BlockDecoder model;
    set_golden_weights(model, golden);
    auto adapter = graft::attach_from(model, kGoldens / name);
    CHECK(adapter.layers().size() == 10);
    model.eval();
    for (size_t i = 0; i < 2; ++i) {
      const at::Tensor y = model.blocks[i]->mlp->forward(golden.tensor("x"));
      CHECK(distance(y, golden.tensor(name + "." + std::to_string(i))) < 2e-5);
    }
    const at::Tensor A = model.named_parameters()
                             ["model.layers.0.self_attn.q_proj.adapters."
                              "default.lora_A"];
    CHECK(A.size(0) == (name == "legacy" ? 2 : 3));
  }
}

TEST_CASE("T17 what is written has the layout's keys and fields, and comes back bit for bit",
          "[moe][files]") {
  const Scratch scratch;
  std::vector<std::string> keys;
  std::istringstream lines(slurp(kGoldens / "keys.txt"));
  for (std::string line; std::getline(lines, line);) keys.push_back(line);

  BlockDecoder model;
  auto adapter = graft::attach(model, small());
  randomise(adapter.parameters());
  for (int i = 0; i < 2; ++i) model.forward(some_tokens());
  adapter.save(scratch.path, "tiny");
  CHECK(graft::io::SafetensorsFile::open(scratch.path / "adapter_model.safetensors").names() ==
        keys);
  const json config = config_of(scratch.path);
  CHECK(config["peft_type"] == "MIXLORA");
  CHECK(config["act_fn"] == "silu");
  CHECK(config["routing_strategy"] == "mixlora");
  CHECK((config["num_experts"] == 3 && config["top_k"] == 2 && config["r"] == 2));
  CHECK(config["target_modules"] ==
        json({"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"}));
  CHECK(config["router_aux_loss_coef"] == 0.01);
  CHECK((config.contains("jitter_noise") && !config.contains("expert_lora")));

  const at::Tensor expected = model.forward(some_tokens());
  BlockDecoder again;
  auto loaded = graft::attach_from(again, scratch.path);
  CHECK(at::equal(again.forward(some_tokens()), expected));

  // The same folder as a pickle.
  const fs::path pickled = scratch.path / "pickled";
  fs::create_directories(pickled);
  fs::copy_file(scratch.path / "adapter_config.json", pickled / "adapter_config.json");
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  const auto file = graft::io::SafetensorsFile::open(scratch.path / "adapter_model.safetensors");
  for (const auto& name : file.names()) tensors.emplace_back(name, file.tensor(name));
  graft::io::write_pickled_tensors(pickled / "adapter_model.bin", tensors);
  BlockDecoder third;
  graft::attach_from(third, pickled);
  CHECK(at::equal(third.forward(some_tokens()), expected));
}

TEST_CASE("every option of a mixture comes back from its configuration", "[moe][files]") {
  const Scratch scratch;
  for (const Selection selection :
       {Selection::softmax_top_k, Selection::top_k_softmax, Selection::dense, Selection::top_p,
        Selection::switch_top_1, Selection::threshold, Selection::biased})
    for (const bool dora : {false, true}) {
      MixLoraAdapterOptions options = small();
      auto& router = options.mixture.router;
      router.selection = selection;
      router.jitter = 0.125;
      router.init_range = 0.5;
      if (selection == Selection::top_k_softmax) router.temperature = 0.5;
      if (selection == Selection::biased) router.scale = 2.5;
      options.mixture.experts.dora = dora;
      options.mixture.experts.rslora = dora;
      options.mixture.experts.init = dora ? "gaussian" : "kaiming";
      if (dora) options.attention = {.rank = 3, .alpha = 1.5, .dropout = 0.25};
      options.balance = {.coefficient = 0.25,
                         .of = "switch",
                         .reduction = graft::moe::Reduction::pooled,
                         .z_coefficient = 0.5};
      BlockDecoder model;
      auto adapter = graft::attach(model, options);
      randomise(adapter.parameters());
      if (selection == Selection::biased) {
        adapter.begin_step({});
        model.forward(some_tokens());
        adapter.end_step({});
      }
      model.forward(some_tokens());
      adapter.save(scratch.path);
      BlockDecoder again;
      auto loaded = graft::attach_from(again, scratch.path);
      model.eval();
      again.eval();
      CHECK(at::equal(model.forward(some_tokens()), again.forward(some_tokens())));
      json ours, theirs;
      adapter.recipe().write_config(ours);
      loaded.recipe().write_config(theirs);
      CHECK(ours == theirs);
      CHECK(adapter.recipe().describe() == loaded.recipe().describe());
      CHECK(loaded.parameter_count() == adapter.parameter_count());
    }
}

TEST_CASE("each field of a mixture's configuration sets its own option, and is written again",
          "[moe][files]") {
  using graft::moe::ForwardPath;
  using graft::moe::Reduction;
  const Scratch scratch;
  const auto read = [&](const json& changes) { return options_of(scratch.path, changes); };
  CHECK(read({{"forward_path", "literal"}}).mixture.path == ForwardPath::literal);
  CHECK(read({{"forward_path", "shared"}}).mixture.path == ForwardPath::shared);
  CHECK(read({{"forward_path", "combined"}}).mixture.path == ForwardPath::combined);
  CHECK(read({{"router_aux_loss_reduction", "sum"}}).balance.reduction == Reduction::sum);
  CHECK(read({{"router_aux_loss_reduction", "pooled"}}).balance.reduction == Reduction::pooled);
  CHECK(read({{"router_aux_loss_coef", 0.5}}).balance.coefficient == 0.5);
  CHECK(read({{"router_aux_loss_coef", 0.5}, {"router_loss", false}}).balance.coefficient == 0.0);
  CHECK(read({{"router_renormalise", false}}).mixture.router.renormalise == false);
  CHECK(read({{"init_lora_weights", false}}).mixture.experts.init == "random");
  CHECK(read({{"lora_init", "gaussian"}}).mixture.experts.init == "gaussian");  // names of before
  CHECK(read({{"lora_init", "original"}}).mixture.experts.init == "kaiming");
  CHECK(read({{"routing_strategy", "mixtral"}}).mixture.router.selection ==
        Selection::softmax_top_k);
  const auto experts =
      read({{"expert_lora", {{"r", 1}, {"lora_alpha", 7}, {"lora_dropout", 0.25}}}});
  CHECK(experts.mixture.experts.rank == 1);
  CHECK(experts.mixture.experts.alpha == 7.0);
  CHECK(experts.mixture.experts.dropout == 0.25);
  CHECK(experts.resolved_attention().rank == 3);
  CHECK(experts.resolved_attention().dropout == read(json::object()).mixture.experts.dropout);

  for (const json& fields : std::vector<json>{
           {{"forward_path", "literal"}},
           {{"forward_path", "shared"}},
           {{"forward_path", "combined"}},
           {{"router_aux_loss_reduction", "sum"}},
           {{"router_renormalise", false}},
           {{"init_lora_weights", false}},
           {{"init_lora_weights", "gaussian"}},
           {{"jitter_noise", 0.125}, {"router_init_range", 0.5}, {"router_z_loss_coef", 0.5}},
           {{"routing_strategy", "threshold"}, {"top_k", nullptr}, {"router_tau_max", 0.125}},
           {{"routing_strategy", "biased"}, {"router_bias_rate", 0.5}, {"router_scale", 2.5}},
           {{"routing_strategy", "mixlora-dynamic"},
            {"top_k", nullptr},
            {"top_p", 0.5},
            {"temperature", 0.0}},
           {{"routing_strategy", "mixlora-switch"},
            {"top_k", nullptr},
            {"expert_capacity", 5},
            {"sparse_step", 1}}}) {
    INFO(fields.dump());
    json written;
    graft::adapters::make_recipe(read(fields))->write_config(written);
    for (const auto& [key, value] : fields.items())
      if (!value.is_null()) CHECK(written[key] == value);
  }
}

TEST_CASE("a folder of a mixture is read strictly", "[moe][files]") {
  const Scratch scratch;
  read_changed(scratch.path, json::object());
  read_changed(scratch.path, {{"router_loss", false}, {"sparse_step", 1}, {"act_fn", "swish"}});
  for (const auto& [change, text] : std::vector<std::pair<json, std::string>>{
           {{{"routing_strategy", "other"}}, "selection must be one of softmax_top_k"},
           {{{"routing_strategy", "mixlora-dynamic"}}, "the router does not hear top_k; got 2"},
           {{{"top_k", 4}}, "top_k must be in [1, experts]; got top_k=4 for experts=3"},
           {{{"temperature", 0.5}}, "use router_temperature; got temperature=0.5"},
           {{{"sparse_step", 2}}, "every layer has a mixture; got sparse_step=2"},
           {{{"act_fn", "gelu"}}, "the blocks' act_fn is silu; got 'gelu'"},
           {{{"expert_lora", {{"r", 4}, {"bias", true}}}}, "expert_lora holds r, lora_alpha"},
           {{{"expert_lora", 4}}, "expert_lora must be an object; got 4"},
           {{{"routing_strategy", 4}}, "routing_strategy must be a name; got 4"},
           {{{"router_aux_loss_reduction", "median"}}, "must be mean, sum or pooled; got 'median'"},
           {{{"forward_path", "fast"}}, "literal, shared or combined; got 'fast'"},
           {{{"router_aux_loss", "nobody"}}, "nobody"},
           {{{"lora_dropout", 1.0}}, "dropout must be in [0, 1)"},
           {{{"init_lora_weights", "pissa"}}, "experts start at random; got init=pissa"},
           {{{"surprise", 1}}, "every option must be known or neutral; got surprise=1"}}) {
    INFO(change.dump());
    CHECK(contains(config_error(scratch.path, change), text));
  }

  // Missing, unexpected and mis-shaped tensors in one line.
  BlockDecoder model;
  auto tensors = graft::io::read_pickled_tensors(kGoldens / "moe_peft" / "adapter_model.bin");
  tensors.erase("mixlora.layers.1.mlp.moe_gate.weight");
  tensors["mixlora.layers.0.mlp.up_proj.experts.3.lora_A.weight"] = at::zeros({3, 8});
  tensors["mixlora.layers.0.mlp.up_proj.experts.2.lora_A.weight"] = at::zeros({2, 8});
  fs::copy_file(kGoldens / "moe_peft" / "adapter_config.json", scratch.path / "adapter_config.json",
                fs::copy_options::overwrite_existing);
  graft::io::write_pickled_tensors(scratch.path / "adapter_model.bin",
                                   {tensors.begin(), tensors.end()});
  const std::string error = error_of([&] { graft::attach_from(model, scratch.path); });
  CHECK(contains(error, "1 missing: mixlora.layers.1.mlp.moe_gate.weight"));
  CHECK(contains(error, "1 unexpected: mixlora.layers.0.mlp.up_proj.experts.3.lora_A.weight"));
  CHECK(contains(error,
                 "1 mis-shaped: mixlora.layers.0.mlp.up_proj.experts.2.lora_A.weight [2, 8] "
                 "for [3, 8]"));
  CHECK(error.find('\n') == std::string::npos);
  CHECK(model.blocks[0]->mlp->slot == nullptr);
}

TEST_CASE("pickles that are no dict of tensors are refused in one line", "[moe][files]") {
  const Scratch scratch;
  const std::string whole = slurp(kGoldens / "moe_peft" / "adapter_model.bin");
  for (const auto& [bytes, what] : std::vector<std::pair<std::string, std::string>>{
           {whole.substr(0, whole.size() / 2), "cut"},
           {whole.substr(0, 20), "beginning"},
           {"", "empty"},
           {"\x80\x02}q\x01.", "an old pickle without the zip form"},
           {"cos\nsystem\n(S'true'\ntR.", "a pickle that calls something"},
           {slurp(kGoldens / "not_an_adapter.bin"), "a dict of other things"}}) {
    INFO(what);
    graft::io::write_text_file(scratch.path / "adapter_model.bin", bytes);
    const std::string error =
        error_of([&] { graft::io::read_pickled_tensors(scratch.path / "adapter_model.bin"); });
    CHECK(contains(error, "[pickle] "));
    CHECK(contains(error, "adapter_model.bin"));
    CHECK(error.find('\n') == std::string::npos);
  }
  CHECK(contains(error_of([&] { graft::io::read_pickled_tensors(scratch.path / "none.bin"); }),
                 "the file must exist and be readable"));
}
