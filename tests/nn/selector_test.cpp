#include <graft/nn/selector.h>

#include "tests/support/tiny_models.h"

namespace {

using graft::nn::find_pattern;
using graft::nn::LayerPattern;
using graft::nn::select;
using graft::nn::Selector;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::GraftDecoder;
using graft::testing::TorchDecoder;

using Names = std::vector<std::string>;

Names chosen(const torch::nn::Module& model, const Selector& selector, const Names& skip = {}) {
  Names names;
  for (const auto& layer : select(model, selector, skip)) names.push_back(layer.name);
  return names;
}

Selector with_layers(std::initializer_list<const char*> names, std::vector<int64_t> layers,
                     Names patterns = {}) {
  Selector selector(names);
  selector.layers = std::move(layers);
  selector.layers_pattern = std::move(patterns);
  return selector;
}

}  // namespace

TEST_CASE("a list matches whole names and endings after a dot", "[nn][selector]") {
  const Selector q{"q"};
  CHECK(q.matches("q"));
  CHECK(q.matches("a.b.q"));
  CHECK_FALSE(q.matches("a.b.seq"));
  CHECK_FALSE(q.matches("a.q.b"));
  CHECK_FALSE(q.matches("qq"));
  const Selector nested{"attn.q"};
  CHECK(nested.matches("layers.0.attn.q"));
  CHECK_FALSE(nested.matches("layers.0.xattn.q"));
  CHECK_FALSE(Selector{".*q_proj"}.matches("a.q_proj"));  // literal text
}

TEST_CASE("a pattern must match the whole name", "[nn][selector]") {
  const Selector selector = Selector::regex(".*\\.(q|v)_proj");
  CHECK(selector.matches("layers.0.q_proj"));
  CHECK_FALSE(selector.matches("layers.0.q_proj.x"));
  CHECK_FALSE(selector.matches("q_proj"));
}

TEST_CASE("exclusion comes first, by list or by pattern", "[nn][selector]") {
  Selector selector{"q", "layers.1.q"};
  selector.exclude = {"layers.1.q"};
  CHECK(selector.matches("layers.0.q"));
  CHECK_FALSE(selector.matches("layers.1.q"));
  selector.exclude = {};
  selector.exclude_pattern = "layers\\.0.*";
  CHECK_FALSE(selector.matches("layers.0.q"));
  CHECK(selector.matches("layers.1.q"));
  CHECK(selector.matches("x.layers.0.q"));  // the whole name
}

TEST_CASE("layer numbers are the first number between dots after two components",
          "[nn][selector]") {
  const Selector selector = with_layers({"q"}, {1});
  CHECK(selector.matches("model.layers.1.q"));
  CHECK_FALSE(selector.matches("model.layers.2.q"));
  CHECK_FALSE(selector.matches("model.layers.2.experts.1.q"));
  CHECK(selector.matches("model.layers.1.experts.2.q"));
  CHECK_FALSE(selector.matches("layers.1.q"));    // no leading component: PEFT finds no number
  CHECK_FALSE(selector.matches("model.head.q"));  // no number at all
  CHECK(with_layers({"q"}, {}).matches("model.layers.2.q"));
}

TEST_CASE("layers_pattern names the component before the number", "[nn][selector]") {
  const Selector selector = with_layers({"q"}, {1}, {"blocks", "h"});
  CHECK(selector.matches("model.blocks.1.q"));
  CHECK(selector.matches("model.h.1.q"));
  CHECK_FALSE(selector.matches("model.layers.1.q"));
  CHECK(selector.matches("model.layers.2.h.1.q"));
}

TEST_CASE("a name that equals a list item is chosen whatever its number", "[nn][selector]") {
  CHECK(with_layers({"model.layers.2.q"}, {1}).matches("model.layers.2.q"));
}

TEST_CASE("select walks the model in its order", "[nn][selector]") {
  for (const auto& model : std::vector<std::shared_ptr<torch::nn::Module>>{
           std::make_shared<GraftDecoder>(), std::make_shared<TorchDecoder>()}) {
    CHECK(chosen(*model, {"v_proj", "q_proj"}) ==
          Names{"model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.1.q_proj",
                "model.layers.1.v_proj"});
    CHECK(chosen(*model, Selector::regex("model\\.layers\\.1\\.[ov]_proj")) ==
          Names{"model.layers.1.v_proj", "model.layers.1.o_proj"});
    CHECK(chosen(*model, {"embed", "lm_head"}) == Names{"model.embed", "lm_head"});
    Selector linear = Selector::all_linear();
    CHECK(chosen(*model, linear).size() == 6);
    linear.output_layer = "o_proj";
    CHECK(chosen(*model, linear) == Names{"model.layers.0.q_proj", "model.layers.0.v_proj",
                                          "model.layers.1.q_proj", "model.layers.1.v_proj",
                                          "lm_head"});
  }
}

TEST_CASE("modules to save are left out with all below them", "[nn][selector]") {
  const GraftDecoder model;
  CHECK(chosen(model, {"q_proj"}, {"model.layers.0"}) == Names{"model.layers.1.q_proj"});
  CHECK(chosen(model, Selector::regex(".*(q_proj|lm_head)"), {"lm_head"}).size() == 2);
  CHECK(chosen(model, Selector::all_linear(), {"0"}).size() == 3);
}

TEST_CASE("targets that match nothing name the nearest ones", "[nn][selector]") {
  const GraftDecoder model;
  CHECK(error_of([&] { select(model, {"q_porj"}); }) ==
        "[targets] the targets must match at least one layer; got 'q_porj', which matches 0 of 8 "
        "(nearest names: q_proj, v_proj, o_proj, embed, lm_head)");
  CHECK(contains(error_of([&] { select(model, Selector::regex("x.*")); }), "got '/x.*/'"));
  CHECK(contains(error_of([&] {
                   select(model, {"q_proj", "gate_proj"});
                 }),
                 "every target must match a layer; got 'gate_proj', which matches none (nearest "
                 "names: q_proj"));
  Selector lenient{"q_proj", "gate_proj"};
  lenient.every_name_must_match = false;
  CHECK(select(model, lenient).size() == 2);
}

TEST_CASE("a chosen module that is no layer is an error that names it", "[nn][selector]") {
  const GraftDecoder model;
  CHECK(contains(error_of([&] { select(model, {"layers"}); }), "(module 'model.layers')"));
}

TEST_CASE("contradictory choices are refused", "[nn][selector]") {
  const auto refusal = [](const Selector& selector) {
    return error_of([&] { selector.validate(); });
  };
  CHECK(contains(refusal(Selector{}), "list of target modules must not be empty"));
  CHECK(contains(refusal(Selector::regex("")), "pattern must not be empty"));
  CHECK(contains(refusal(Selector::regex("(")), "must be a regular expression; got '('"));
  Selector pattern = Selector::regex(".*");
  pattern.layers = {1};
  CHECK(contains(refusal(pattern), "layers_to_transform goes with a list"));
  CHECK(contains(refusal(with_layers({"q"}, {}, {"h"})), "layers_pattern needs"));
  Selector exclusion{"q"};
  exclusion.exclude_pattern = "[";
  CHECK(contains(refusal(exclusion), "exclude_modules must be a regular expression"));
}

TEST_CASE("a layer number too large for an integer is no crash", "[nn][selector]") {
  CHECK_FALSE(with_layers({"q"}, {1}).matches("model.layers.99999999999999999999999.q"));
}

TEST_CASE("pattern keys match endings after a dot, in their order", "[nn][selector]") {
  const LayerPattern<int64_t> pattern = {{"layers.0.q", 1}, {"q", 2}, {"^k", 3}, {"[vo]", 4}};
  CHECK(find_pattern(pattern, "model.layers.0.q") == 1);
  CHECK(find_pattern(pattern, "model.layers.1.q") == 2);
  CHECK(find_pattern(pattern, "a.o") == 4);
  CHECK_FALSE(find_pattern(pattern, "model.seq"));
  CHECK_FALSE(find_pattern(pattern, "q.x"));
  CHECK(contains(error_of([] { graft::nn::pattern_key_matches("(", "q"); }),
                 "[targets] a pattern key must be a regular expression"));
}
