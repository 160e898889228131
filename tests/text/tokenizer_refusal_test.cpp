#include <filesystem>
#include <fstream>
#include <functional>

#include "examples/text/regex.h"
#include "examples/text/tokenizer.h"
#include "tests/support/testing.h"
#include "tests/text/golden_tokenizer.h"

using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::read_golden;
using graft::text::GgufVocabulary;
using graft::text::Tokenizer;
using Json = nlohmann::ordered_json;

namespace {

/// A folder of its own that vanishes with the test.
class Folder {
 public:
  Folder()
      : path_(std::filesystem::temp_directory_path() /
              ("graft_tokenizer_" + std::to_string(::rand()))) {
    std::filesystem::create_directories(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::string write(const std::string& name, const std::string& content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
    return (path_ / name).string();
  }

 private:
  std::filesystem::path path_;
};

/// The error for the gpt2 golden after `change`.
std::string error_after(const std::function<void(Json&)>& change) {
  Json json = read_golden("gpt2/tokenizer.json");
  change(json);
  const Folder folder;
  const std::string path = folder.write("tokenizer.json", json.dump());
  const std::string error = error_of([&] { Tokenizer::from_json_file(path); });
  CHECK(contains(error, "[tokenizer] "));
  CHECK(contains(error, path));
  return error;
}

GgufVocabulary tiny_gguf() {
  GgufVocabulary gguf;
  gguf.model = "gpt2";
  gguf.pre = "gpt-2";
  gguf.tokens = {"a", "b", "ab"};
  gguf.merges = {"a b"};
  gguf.source = "tiny.gguf";
  return gguf;
}

std::string error_of_gguf(const std::function<void(GgufVocabulary&)>& change) {
  GgufVocabulary gguf = tiny_gguf();
  change(gguf);
  const std::string error = error_of([&] { Tokenizer::from_gguf(gguf); });
  CHECK(contains(error, "(tiny.gguf)"));
  return error;
}

}  // namespace

TEST_CASE("unknown components are refused by name", "[text][tokenizer]") {
  CHECK(contains(error_after([](Json& j) { j["model"]["type"] = "Unigram"; }),
                 "must be BPE; got \"Unigram\""));
  CHECK(contains(error_after([](Json& j) {
                   j["normalizer"] = {{"type", "Nmt"}};
                 }),
                 "unknown normalizer; got \"Nmt\""));
  CHECK(contains(error_after([](Json& j) {
                   j["pre_tokenizer"] = {{"type", "UnicodeScripts"}};
                 }),
                 "\"UnicodeScripts\""));
  CHECK(contains(error_after([](Json& j) {
                   j["decoder"] = {{"type", "CTC"}};
                 }),
                 "unknown decoder; got \"CTC\""));
  CHECK(contains(error_after([](Json& j) {
                   j["post_processor"] = {{"type", "X"}};
                 }),
                 "unknown post-processor"));
}

TEST_CASE("options that are not neutral are refused by name", "[text][tokenizer]") {
  CHECK(contains(error_after([](Json& j) { j["model"]["dropout"] = 0.1; }), "'dropout'"));
  CHECK(contains(error_after([](Json& j) { j["model"]["end_of_word_suffix"] = "</w>"; }),
                 "'end_of_word_suffix'"));
  CHECK(contains(error_after([](Json& j) { j["model"]["novel"] = 1; }), "unknown option 'novel'"));
  CHECK(contains(error_after([](Json& j) { j["pre_tokenizer"]["novel"] = 1; }),
                 "pre_tokenizer.novel"));
}

TEST_CASE("inconsistent vocabularies are refused", "[text][tokenizer]") {
  CHECK(contains(error_after([](Json& j) { j["model"]["vocab"]["zzz"] = 3000000; }),
                 "id must be in [0, "));
  CHECK(contains(error_after([](Json& j) { j["model"]["vocab"]["zzz"] = 7; }),
                 "every id must name one token"));
  CHECK(contains(error_after([](Json& j) { j["model"]["vocab"]["zzz"] = -1; }), "[0, 2^31)"));
  CHECK(contains(error_after([](Json& j) {
                   j["model"]["merges"].push_back({"q", "zzz"});
                 }),
                 "'q' + 'zzz'"));
  CHECK(contains(error_after([](Json& j) { j["model"]["merges"].push_back("one two three"); }),
                 "two parts"));
  CHECK(contains(error_after([](Json& j) { j["added_tokens"][0]["id"] = 9; }), "here 0"));
  CHECK(contains(error_after([](Json& j) { j["model"]["unk_token"] = "<none>"; }), "got '<none>'"));
}

TEST_CASE("files that are no tokenizer are refused", "[text][tokenizer]") {
  const Folder folder;
  CHECK(contains(error_of([] { Tokenizer::from_json_file("absent/tokenizer.json"); }),
                 "absent/tokenizer.json"));
  const std::string broken = folder.write("broken.json", "{\"model\": ");
  CHECK(contains(error_of([&] { Tokenizer::from_json_file(broken); }), "must be JSON"));
  const std::string deep = folder.write("deep.json", std::string(100000, '['));
  CHECK(contains(error_of([&] { Tokenizer::from_json_file(deep); }), "at most 100 levels"));
}

TEST_CASE("invalid UTF-8 is refused with its position", "[text][tokenizer]") {
  const Tokenizer tokenizer =
      Tokenizer::from_json_file(graft::testing::tokenizer_path("gpt2/tokenizer.json"));
  for (const std::string bad :
       {"\xff", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe4\xbd", "\x80"}) {
    CHECK(contains(error_of([&] { tokenizer.encode("abc" + bad); }), "at position 3"));
  }
  CHECK(contains(error_of([&] { tokenizer.decode({1, 400}, true); }), "got 400"));
  CHECK(contains(error_of([&] { tokenizer.decode({-1}, true); }), "got -1"));
}

TEST_CASE("tokenizer_config.json and chat_template.jinja are heeded", "[text][tokenizer]") {
  const Folder folder;
  const std::string path =
      folder.write("tokenizer.json", read_golden("gpt2/tokenizer.json").dump());
  folder.write("tokenizer_config.json",
               R"({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": null,
                                            "add_bos_token": true, "chat_template": "one"})");
  const Tokenizer tokenizer = Tokenizer::from_json_file(path);
  CHECK(tokenizer.bos_token() == "<s>");
  CHECK(tokenizer.eos_token() == "</s>");
  CHECK_FALSE(tokenizer.padding_id().has_value());
  CHECK(tokenizer.encode("", true) == std::vector<int32_t>{*tokenizer.bos_id()});
  CHECK(tokenizer.chat_template() == "one");
  folder.write("chat_template.jinja", "two");
  CHECK(Tokenizer::from_json_file(path).chat_template() == "two");
  folder.write("tokenizer_config.json", R"({"bos_token": "<absent>"})");
  CHECK(contains(error_of([&] { Tokenizer::from_json_file(path); }), "<absent>"));
}

TEST_CASE("bad GGUF vocabularies are refused", "[text][tokenizer][gguf]") {
  CHECK_NOTHROW(Tokenizer::from_gguf(tiny_gguf()));
  CHECK(contains(error_of_gguf([](auto& g) { g.pre = "novel"; }), "got 'novel'"));
  CHECK(contains(error_of_gguf([](auto& g) { g.model = "bert"; }), "got 'bert'"));
  CHECK(contains(error_of_gguf([](auto& g) { g.model = "llama"; }),
                 "scores must have one entry a token, 3; got 0"));
  CHECK(contains(error_of_gguf([](auto& g) { g.bos_id = 3; }), "[0, 3); got 3"));
  CHECK(contains(error_of_gguf([](auto& g) { g.token_types = {1}; }), "token_type"));
  CHECK(contains(error_of_gguf([](auto& g) { g.tokens[1] = "a"; }), "'a' twice"));
  CHECK(contains(error_of_gguf([](auto& g) { g.tokens[1] = "\xff"; }), "valid UTF-8"));
  CHECK(contains(error_of_gguf([](auto& g) { g.merges = {"ab"}; }), "two parts"));
}

TEST_CASE("regular expressions outside the common subset are refused by name", "[text][regex]") {
  using graft::text::Regex;
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"[a[b]]", "nested"},        {"[a&&b]", "intersection"}, {"a{1,3}+", "possessive"},
      {"(?i)a", "group \"(?i)\""}, {"\\p{Novel}", "Novel"},    {"\\R", "\\R"},
      {"(?<n>a)", "group"},        {"[a", "without end"},      {"a\\", "trailing"},
      {"a{b}", "brace"},           {"(a", "must compile"}};
  for (const auto& [expression, part] : cases) {
    INFO(expression);
    CHECK(contains(error_of([&, e = expression] { Regex(e, "x.json"); }), part));
  }
}

TEST_CASE("regular expressions have Oniguruma's meaning", "[text][regex]") {
  const auto count = [](const std::string& expression, const std::string& text) {
    return graft::text::Regex(expression, "test")(text).size();
  };
  CHECK(count("\\s", " \u180e\u00a0\u3000") == 3);    // the Mongolian separator is no space
  CHECK(count("\\w", "a\u0301_\u00b2-\u24b6") == 5);  // marks, and the odd superscript digits
  CHECK(count("\\h", "fg F") == 2);                   // a hexadecimal digit
  CHECK(count("\\p{Han}", "\u6f22\u3001") == 1);      // the script, not its extensions
  CHECK(count("(?i:'s)", "'S '\u017f") == 2);
  CHECK(count("^a", "a\na") == 2);
  CHECK(count("x*", "axxb") == 3);  // before a, xx, after b; not twice after xx
}
