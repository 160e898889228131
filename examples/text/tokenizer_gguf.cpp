#include <graft/core/error.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "examples/text/byte_level.h"
#include "examples/text/tokenizer.h"
#include "examples/text/tokenizer_parts.h"
#include "examples/text/unicode.h"

namespace graft::text {
namespace {

// Values of tokenizer.ggml.token_type that matter here.
constexpr int32_t kControl = 3, kUserDefined = 4;

constexpr std::string_view kLlama3Words =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2Words =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

/// How a "gpt2" vocabulary splits text, as the tokenizer.json of its models does.
struct WordRule {
  std::string_view pre;         // the name in tokenizer.ggml.pre
  std::string_view expression;  // empty: GPT-2's
  bool single_digits = false;   // digits are words of their own
  bool nfc = false;
  bool ignore_merges = false;
};

constexpr std::array kWordRules = {
    WordRule{.pre = "gpt-2", .expression = ""},
    WordRule{.pre = "gpt2", .expression = ""},
    WordRule{.pre = "olmo", .expression = ""},
    WordRule{.pre = "smollm", .expression = "", .single_digits = true},
    WordRule{.pre = "starcoder", .expression = "", .single_digits = true},
    WordRule{.pre = "llama-bpe", .expression = kLlama3Words, .ignore_merges = true},
    WordRule{.pre = "llama3", .expression = kLlama3Words, .ignore_merges = true},
    WordRule{.pre = "llama-v3", .expression = kLlama3Words, .ignore_merges = true},
    WordRule{.pre = "qwen2", .expression = kQwen2Words, .nfc = true},
    WordRule{.pre = "deepseek-r1-qwen", .expression = kQwen2Words, .nfc = true},
};

[[noreturn]] void refuse(const std::string& message, const GgufVocabulary& vocabulary) {
  fail("tokenizer", concat(message, " (", vocabulary.source, ")"));
}

const WordRule& word_rule(const GgufVocabulary& vocabulary) {
  std::string known;
  for (const WordRule& rule : kWordRules) {
    if (rule.pre == vocabulary.pre) return rule;
    known += concat(known.empty() ? "" : ", ", rule.pre);
  }
  refuse(concat("tokenizer.ggml.pre must be one of ", known, "; got '", vocabulary.pre, "'"),
         vocabulary);
}

std::string printable(std::string_view bytes) {
  return replace_invalid_utf8(bytes);
}

void check(const GgufVocabulary& vocabulary) {
  const size_t count = vocabulary.tokens.size();
  const auto check_length = [&](std::string_view key, size_t length, bool optional) {
    if (length == count || (optional && length == 0)) return;
    refuse(
        concat("tokenizer.ggml.", key, " must have one entry a token, ", count, "; got ", length),
        vocabulary);
  };
  if (count == 0) refuse("tokenizer.ggml.tokens must not be empty; got none", vocabulary);
  check_length("token_type", vocabulary.token_types.size(), /*optional=*/true);
  check_length("scores", vocabulary.scores.size(), /*optional=*/vocabulary.model != "llama");
  for (const auto& id :
       {vocabulary.bos_id, vocabulary.eos_id, vocabulary.unknown_id, vocabulary.padding_id}) {
    const bool valid = !id || (*id >= 0 && static_cast<size_t>(*id) < count);
    if (!valid)
      refuse(concat("a special token's id must be in [0, ", count, "); got ", *id), vocabulary);
  }
  for (const std::string& token : vocabulary.tokens) {
    if (find_invalid_utf8(token) == std::string::npos) continue;
    refuse(concat("a token must be valid UTF-8; got '", printable(token), "'"), vocabulary);
  }
  for (const float score : vocabulary.scores) {
    if (std::isnan(score)) refuse("a token's score must be a number; got nan", vocabulary);
  }
}

BpeOptions vocabulary_options(const GgufVocabulary& vocabulary) {
  BpeOptions options;
  options.source = vocabulary.source;
  options.vocabulary.reserve(vocabulary.tokens.size());
  for (size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    options.vocabulary.emplace_back(vocabulary.tokens[i], static_cast<int32_t>(i));
  }
  return options;
}

std::vector<std::pair<std::string, std::string>> read_merges(const GgufVocabulary& vocabulary) {
  std::vector<std::pair<std::string, std::string>> merges;
  merges.reserve(vocabulary.merges.size());
  for (const std::string& merge : vocabulary.merges) {
    const size_t space = merge.find(' ');
    const bool two_parts =
        space != std::string::npos && merge.find(' ', space + 1) == std::string::npos;
    if (!two_parts) {
      refuse(concat("a merge must have two parts with one space between; got '", printable(merge),
                    "'"),
             vocabulary);
    }
    merges.emplace_back(merge.substr(0, space), merge.substr(space + 1));
  }
  return merges;
}

/// SentencePiece joins the adjacent pair whose join is the best-scored token (Kudo and Richardson
/// 2018). Every way to cut a token in two tokens is therefore a merge, ranked by the score of the
/// join; among equal scores Hugging Face puts the longer left part first, then the longer right
/// part, then the order of the vocabulary.
std::vector<std::pair<std::string, std::string>> merges_from_scores(
    const GgufVocabulary& vocabulary) {
  StringMap<size_t> index;
  for (size_t i = 0; i < vocabulary.tokens.size(); ++i) index.emplace(vocabulary.tokens[i], i);
  struct Merge {
    float score;
    size_t left_length, right_length;  // in characters
    size_t token, left, right;
  };
  std::vector<Merge> found;
  for (size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const std::string_view token = vocabulary.tokens[i];
    if (token.empty()) continue;
    size_t length = 0;
    for (const char byte : token) length += (static_cast<unsigned char>(byte) & 0xC0) != 0x80;
    // Also bounds the work on a hostile file: the reference vocabularies stay far below.
    if (length > 256) continue;
    size_t left_length = 0;
    for (size_t cut = utf8_length(token[0]); cut < token.size(); cut += utf8_length(token[cut])) {
      ++left_length;
      const auto left = index.find(token.substr(0, cut));
      const auto right = left == index.end() ? index.end() : index.find(token.substr(cut));
      if (right == index.end()) continue;
      found.push_back({vocabulary.scores[i], left_length, length - left_length, i, left->second,
                       right->second});
    }
  }
  std::sort(found.begin(), found.end(), [](const Merge& a, const Merge& b) {
    const auto descending = [](const Merge& m) {
      return std::tuple(m.score, m.left_length, m.right_length);
    };
    if (descending(a) != descending(b)) return descending(a) > descending(b);
    return std::tuple(a.token, a.left, a.right) < std::tuple(b.token, b.left, b.right);
  });
  std::vector<std::pair<std::string, std::string>> merges;
  merges.reserve(found.size());
  for (const Merge& m : found)
    merges.emplace_back(vocabulary.tokens[m.left], vocabulary.tokens[m.right]);
  return merges;
}

std::vector<AddedToken> added_tokens(const GgufVocabulary& vocabulary) {
  std::vector<AddedToken> tokens;
  const auto add = [&](size_t id, bool special) {
    if (vocabulary.tokens[id].empty()) return;
    tokens.push_back(
        {.content = vocabulary.tokens[id], .id = static_cast<int32_t>(id), .special = special});
  };
  for (size_t i = 0; i < vocabulary.token_types.size(); ++i) {
    const bool is_unknown =
        vocabulary.unknown_id && static_cast<size_t>(*vocabulary.unknown_id) == i;
    if (vocabulary.token_types[i] == kControl || is_unknown) {
      add(i, /*special=*/true);
    } else if (vocabulary.token_types[i] == kUserDefined) {
      add(i, /*special=*/false);
    }
  }
  return tokens;
}

std::shared_ptr<TokenizerParts> byte_level_parts(const GgufVocabulary& vocabulary) {
  const WordRule& rule = word_rule(vocabulary);
  BpeOptions options = vocabulary_options(vocabulary);
  options.ignore_merges = rule.ignore_merges;
  options.merges = read_merges(vocabulary);
  auto parts = std::make_shared<TokenizerParts>(std::move(options));
  if (rule.nfc) parts->normalizer = make_nfc();
  std::vector<PreTokenizer> steps;
  if (rule.single_digits)
    steps.push_back(make_split(find_code_points(is_number), SplitBehavior::kIsolated));
  if (!rule.expression.empty()) {
    steps.push_back(
        make_split(Regex(rule.expression, vocabulary.source), SplitBehavior::kIsolated));
  }
  steps.push_back(
      make_byte_level(/*add_prefix_space=*/false, /*use_regex=*/rule.expression.empty()));
  parts->pretokenizer = make_sequence(std::move(steps));
  parts->decoder = make_byte_level_decoder();
  return parts;
}

/// As in Llama 2's tokenizer.json: a space goes in front of every stretch of text between special
/// tokens.
std::shared_ptr<TokenizerParts> sentencepiece_parts(const GgufVocabulary& vocabulary) {
  BpeOptions options = vocabulary_options(vocabulary);
  options.byte_fallback = true;
  options.fuse_unknown = true;
  if (vocabulary.unknown_id)
    options.unknown_token = vocabulary.tokens[static_cast<size_t>(*vocabulary.unknown_id)];
  options.merges =
      vocabulary.merges.empty() ? merges_from_scores(vocabulary) : read_merges(vocabulary);
  auto parts = std::make_shared<TokenizerParts>(std::move(options));
  const bool add_space = vocabulary.add_space_prefix.value_or(true);
  std::vector<std::unique_ptr<Normalizer>> steps;
  if (add_space) steps.push_back(make_prepend("▁"));
  steps.push_back(make_replace(find_literal(" "), "▁"));
  parts->normalizer = make_sequence(std::move(steps));
  parts->decoder = make_sentencepiece_decoder(/*strip_space=*/add_space);
  return parts;
}

}  // namespace

Tokenizer Tokenizer::from_gguf(const GgufVocabulary& vocabulary) {
  const bool sentencepiece = vocabulary.model == "llama";
  if (!sentencepiece && vocabulary.model != "gpt2") {
    refuse(concat("tokenizer.ggml.model must be 'gpt2' or 'llama'; got '", vocabulary.model, "'"),
           vocabulary);
  }
  check(vocabulary);
  const auto parts = sentencepiece ? sentencepiece_parts(vocabulary) : byte_level_parts(vocabulary);
  parts->added = AddedTokens(added_tokens(vocabulary), parts->normalizer.get());
  parts->bos_id = vocabulary.bos_id;
  parts->eos_id = vocabulary.eos_id;
  parts->padding_id = vocabulary.padding_id;
  if (vocabulary.add_bos_token.value_or(sentencepiece) && parts->bos_id)
    parts->post_processor.before = {*parts->bos_id};
  if (vocabulary.add_eos_token.value_or(false) && parts->eos_id)
    parts->post_processor.after = {*parts->eos_id};
  parts->chat_template = vocabulary.chat_template;
  return Tokenizer(parts);
}

}  // namespace graft::text
