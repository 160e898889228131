#include "examples/text/chat_template.h"

#include "tests/support/testing.h"
#include "tests/text/golden_tokenizer.h"

using graft::testing::contains;
using graft::testing::error_of;
using graft::text::render_chat_template;
using Json = nlohmann::ordered_json;

namespace {

std::string render(const std::string& chat_template) {
  return render_chat_template(chat_template, Json::array());
}

std::string error_in(const std::string& chat_template) {
  const std::string error = error_of([&] { render(chat_template); });
  CHECK(contains(error, "[chat_template] "));
  return error;
}

}  // namespace

TEST_CASE("chat templates render as in transformers", "[text][chat]") {
  const Json golden = graft::testing::read_golden("chat_cases.json");
  const Json expected = graft::testing::read_golden("chats.json");
  REQUIRE(golden["cases"].size() == expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    const Json& item = golden["cases"][i];
    const auto name = item["template"].get<std::string>();
    INFO("case " << i << " " << name << " " << item["messages"].dump());
    const graft::text::ChatOptions options{.add_generation_prompt = item["prompt"].get<bool>(),
                                           .bos_token = "<s>",
                                           .eos_token = "</s>"};
    const auto render_case = [&] {
      return render_chat_template(golden["templates"][name].get<std::string>(), item["messages"],
                                  options, item.value("variables", Json()));
    };
    if (expected[i].is_null()) {
      CHECK(contains(error_of(render_case), "(line "));
    } else {
      CHECK(render_case() == expected[i].get<std::string>());
    }
  }
}

TEST_CASE("unknown syntax is refused by name and line", "[text][chat]") {
  CHECK(contains(error_in("\n\n{% include 'x' %}"), "got 'include' (line 3)"));
  CHECK(contains(error_in("{{ 1 }}\n{{ x|shuffle }}"), "got 'shuffle' (line 2)"));
  CHECK(contains(error_in("{{ x is novel }}"), "got 'novel' (line 1)"));
  CHECK(contains(error_in("{{ 'a'.novel() }}"), "got 'novel' of a string (line 1)"));
  CHECK(contains(error_in("{{ novel(1) }}"), "got 'novel' (line 1)"));
  CHECK(contains(error_in("{% if true %}\n\n"), "must end with 'endif'"));
  CHECK(contains(error_in("{{ 1 +"), "must end with }}"));
  CHECK(contains(error_in("{{ (1 }}"), "unexpected '}'"));
  CHECK(contains(error_in("{{ 1 1 }}"), "got '1'"));
  CHECK(contains(error_in("{# open"), "comment"));
  CHECK(contains(error_in("{{ 'open }}"), "a string must end"));
  CHECK(contains(error_in("{{ 1 ? 2 }}"), "unexpected character '?'"));
  CHECK(contains(error_in("{% break %}"), "in a loop"));
  CHECK(contains(error_in("{{ strftime_now('%d') }}"), "strftime_now"));
}

TEST_CASE("a template's own refusal is passed on", "[text][chat]") {
  CHECK(contains(error_in("\n{{ raise_exception('no system role') }}"),
                 "got: no system role (line 2)"));
}

TEST_CASE("values that do not fit an operation are refused", "[text][chat]") {
  CHECK(contains(error_in("{{ absent.role }}"), "'absent' is undefined"));
  CHECK(contains(error_in("{{ 'a' + 1 }}"), "a string and an integer"));
  CHECK(contains(error_in("{{ absent + 'a' }}"), "'absent' is undefined"));
  CHECK(contains(error_in("{{ 1 // 0 }}"), "divisor"));
  CHECK(contains(error_in("{{ 9223372036854775807 + 1 }}"), "64 bits"));
  CHECK(contains(error_in("{{ 1 in 'a' }}"), "only a string is in a string"));
  CHECK(contains(error_in("{{ {}.items }}"), "must be called"));
  CHECK(contains(error_in("{% set a, b = [1] %}"), "as many values"));
}

TEST_CASE("a hostile template ends with an error", "[text][chat]") {
  std::string nested, closing, summed = "{{ 1", blocks;
  for (int i = 0; i < 100000; ++i) {
    nested += "(";
    closing += ")";
    summed += "+1";
    blocks += "{% if x %}";
  }
  CHECK(contains(error_in("{{ " + nested + "1" + closing + " }}"), "nest at most"));
  CHECK(contains(error_in(summed + " }}"), "at most 1000 operators"));
  CHECK(contains(error_in(blocks), "nest at most"));
  CHECK(contains(error_in("{{ 'x' * 1000000000000 }}"), "bytes"));
  CHECK(contains(error_in("{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s "
                          "~ n.s %}{% endfor %}"),
                 "bytes"));
  CHECK(contains(error_in("{% set n = namespace(l=[]) %}{% for i in range(999) %}{% set n.l = "
                          "[n.l] %}{% endfor %}"),
                 "levels"));
  CHECK(contains(error_in("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "macros may nest"));
  CHECK(contains(
      error_in("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"),
      "steps"));
  CHECK(contains(error_in("{{ range(1000000000) }}"), "range()"));
}
