#include <cstdlib>
#include <filesystem>
#include <iostream>

#include "examples/text/tokenizer.h"
#include "tests/support/testing.h"
#include "tests/text/golden_tokenizer.h"

using graft::testing::read_golden;
using graft::testing::tokenizer_path;
using graft::text::GgufVocabulary;
using graft::text::StreamDecoder;
using graft::text::Tokenizer;
using Ids = std::vector<int32_t>;

namespace {

Tokenizer golden_tokenizer(const std::string& style) {
  return Tokenizer::from_json_file(tokenizer_path(style + "/tokenizer.json"));
}

Ids around(const nlohmann::ordered_json& expected, const Ids& ids) {
  Ids all = expected["before"].get<Ids>();
  all.insert(all.end(), ids.begin(), ids.end());
  const Ids after = expected["after"].get<Ids>();
  all.insert(all.end(), after.begin(), after.end());
  return all;
}

std::string stream(const Tokenizer& tokenizer, const Ids& ids, bool skip) {
  StreamDecoder decoder(tokenizer, skip);
  std::string text;
  for (const int32_t id : ids) text += decoder.push(id);
  return text + decoder.finish();
}

/// The GGUF form of a golden tokenizer.json: the metadata that a converter would write.
GgufVocabulary as_gguf(const std::string& style, const std::string& model, const std::string& pre) {
  const auto json = read_golden(style + "/tokenizer.json");
  GgufVocabulary gguf;
  gguf.model = model;
  gguf.pre = pre;
  gguf.source = style + ".gguf";
  gguf.tokens.resize(json["model"]["vocab"].size());
  for (const auto& [token, id] : json["model"]["vocab"].items())
    gguf.tokens[id.get<size_t>()] = token;
  gguf.token_types.assign(gguf.tokens.size(), 1);
  for (const auto& token : json["added_tokens"]) gguf.token_types[token["id"].get<size_t>()] = 3;
  if (model == "gpt2") {
    for (const auto& merge : json["model"]["merges"]) {
      gguf.merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
    }
    return gguf;
  }
  const size_t names = 3 + 256;
  for (size_t i = 0; i < gguf.tokens.size(); ++i)
    gguf.scores.push_back(i < names ? 0.0f : -static_cast<float>(i - names));
  gguf.bos_id = 0;
  gguf.eos_id = 1;
  gguf.unknown_id = 2;
  return gguf;
}

void check_ids(const Tokenizer& tokenizer, const std::string& style) {
  const auto lines = read_golden("lines.json");
  const auto expected = read_golden(style + "/expected.json");
  REQUIRE(lines.size() == expected["ids"].size());
  for (size_t i = 0; i < lines.size(); ++i) {
    INFO(style << ", line " << i << ": " << lines[i].dump());
    CHECK(tokenizer.encode(lines[i].get<std::string>()) == expected["ids"][i].get<Ids>());
  }
}

}  // namespace

TEST_CASE("encoding gives the reference's ids in every style", "[text][tokenizer]") {
  for (const std::string style : graft::testing::kStyles) {
    const Tokenizer tokenizer = golden_tokenizer(style);
    check_ids(tokenizer, style);
    check_ids(tokenizer, style);  // again, from the cache of words
    const auto expected = read_golden(style + "/expected.json");
    CHECK(tokenizer.encode("hello", true) == around(expected, tokenizer.encode("hello")));
  }
}

TEST_CASE("decoding gives the reference's text, with and without special tokens",
          "[text][tokenizer]") {
  for (const std::string style : graft::testing::kStyles) {
    const Tokenizer tokenizer = golden_tokenizer(style);
    const auto expected = read_golden(style + "/expected.json");
    for (size_t i = 0; i < expected["ids"].size(); ++i) {
      INFO(style << ", line " << i);
      const Ids ids = around(expected, expected["ids"][i].get<Ids>());
      const auto text = expected["texts"][i].get<std::string>();
      const auto& without = expected["skipped"][i];
      CHECK(tokenizer.decode(ids, false) == text);
      CHECK(tokenizer.decode(ids, true) == (without.is_null() ? text : without.get<std::string>()));
    }
    for (size_t i = 0; i < expected["loose"].size(); ++i) {
      INFO(style << ", loose ids " << i);
      CHECK(tokenizer.decode(expected["loose"][i].get<Ids>(), false) ==
            expected["loose_texts"][i].get<std::string>());
    }
  }
}

TEST_CASE("streamed parts are valid UTF-8 and join to the whole text", "[text][tokenizer]") {
  for (const std::string style : graft::testing::kStyles) {
    const Tokenizer tokenizer = golden_tokenizer(style);
    const auto expected = read_golden(style + "/expected.json");
    for (const auto& line : expected["ids"]) {
      const Ids ids = around(expected, line.get<Ids>());
      INFO(style << ": " << line.dump());
      CHECK(stream(tokenizer, ids, false) == tokenizer.decode(ids, false));
      CHECK(stream(tokenizer, ids, true) == tokenizer.decode(ids, true));
    }
  }
}

TEST_CASE("a streamed character appears when its last byte arrives", "[text][tokenizer]") {
  const Tokenizer tokenizer = golden_tokenizer("gpt2");
  const Ids ids = tokenizer.encode("\u0e44");  // three bytes that no merge joins
  REQUIRE(ids.size() == 3);
  StreamDecoder decoder(tokenizer, true);
  CHECK(decoder.push(ids[0]).empty());
  CHECK(decoder.push(ids[1]).empty());
  CHECK(decoder.push(ids[2]) == "\u0e44");
  CHECK(decoder.push(ids[0]).empty());
  CHECK(decoder.finish() == "\uFFFD");
}

TEST_CASE("a GGUF vocabulary gives the ids of the tokenizer.json it came from",
          "[text][tokenizer][gguf]") {
  check_ids(Tokenizer::from_gguf(as_gguf("gpt2", "gpt2", "gpt-2")), "gpt2");
  check_ids(Tokenizer::from_gguf(as_gguf("llama3", "gpt2", "llama-bpe")), "llama3");
  check_ids(Tokenizer::from_gguf(as_gguf("qwen", "gpt2", "qwen2")), "qwen");
  check_ids(Tokenizer::from_gguf(as_gguf("smollm", "gpt2", "smollm")), "smollm");
  check_ids(Tokenizer::from_gguf(as_gguf("llama", "llama", "")), "llama");
}

TEST_CASE("a GGUF vocabulary adds the tokens its flags ask for", "[text][tokenizer][gguf]") {
  GgufVocabulary gguf = as_gguf("llama", "llama", "");
  const Ids plain = Tokenizer::from_gguf(gguf).encode("hello");
  Ids with_bos = plain;
  with_bos.insert(with_bos.begin(), 0);
  CHECK(Tokenizer::from_gguf(gguf).encode("hello", true) == with_bos);
  gguf.add_bos_token = false;
  gguf.add_eos_token = true;
  Ids with_eos = plain;
  with_eos.push_back(1);
  const Tokenizer tokenizer = Tokenizer::from_gguf(gguf);
  CHECK(tokenizer.encode("hello", true) == with_eos);
  CHECK(tokenizer.bos_token() == "<s>");
  CHECK(tokenizer.eos_id() == 1);
  CHECK(tokenizer.is_special(0));
  CHECK(tokenizer.decode(tokenizer.encode("hello"), true) == "hello");
  gguf.add_space_prefix = false;
  CHECK(Tokenizer::from_gguf(gguf).encode(" hello") == plain);
}

TEST_CASE("the vocabulary can be asked", "[text][tokenizer]") {
  const Tokenizer tokenizer = golden_tokenizer("added");
  const auto id = tokenizer.token_id("<Norm>");
  REQUIRE(id.has_value());
  CHECK(tokenizer.token(*id) == "<Norm>");
  CHECK_FALSE(tokenizer.is_special(*id));
  CHECK(tokenizer.is_special(tokenizer.token_id("<s>").value()));
  CHECK(tokenizer.vocabulary_size() == 407);
  CHECK_FALSE(tokenizer.token_id("no such token").has_value());
}

TEST_CASE("a word of a megabyte is encoded", "[text][tokenizer]") {
  std::string word;
  while (word.size() < (size_t{1} << 20)) word += "theothers";
  for (const std::string style : {"llama", "gpt2"}) {
    const Tokenizer tokenizer = golden_tokenizer(style);
    CHECK(tokenizer.decode(tokenizer.encode(word), true) == word);
  }
}

TEST_CASE("real tokenizers give back what they encode", "[text][tokenizer]") {
  const char* folder = std::getenv("GRAFT_SHARED_TOKENIZERS");
  const auto lines = read_golden("lines.json");
  int skipped = 0;
  for (const std::string model : {"llama2", "qwen3"}) {
    const auto path =
        std::filesystem::path(folder == nullptr ? "" : folder) / model / "tokenizer.json";
    if (folder == nullptr || !std::filesystem::exists(path)) {
      ++skipped;
      continue;
    }
    const Tokenizer tokenizer = Tokenizer::from_json_file(path.string());
    const std::string text = "The year 2024: it's caf\u00e9 time \U0001f44d\u4f60\u597d\n\n  done";
    CHECK(tokenizer.decode(tokenizer.encode(text), true) == text);
    for (const auto& line : lines) CHECK_NOTHROW(tokenizer.encode(line.get<std::string>(), true));
    const Ids hello = tokenizer.encode("Hello world", true);
    CHECK(hello == (model == "llama2" ? Ids{1, 22557, 1526} : Ids{9707, 1879}));
  }
  if (skipped > 0)
    std::cout << "skipped: " << skipped << " of 2 real tokenizers (GRAFT_SHARED_TOKENIZERS)\n";
}
