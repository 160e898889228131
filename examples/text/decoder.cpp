#include "examples/text/decoder.h"

#include <graft/core/error.h>

#include <optional>
#include <utility>

#include "examples/text/byte_level.h"
#include "examples/text/normalizer.h"
#include "examples/text/unicode.h"

namespace graft::text {
namespace {

using Tokens = std::vector<std::string>;

std::string join(const Tokens& tokens) {
  std::string text;
  for (const std::string& token : tokens) text += token;
  return text;
}

Tokens decode_byte_level(Tokens tokens) {
  std::string bytes;
  // An added token may be spelled outside the alphabet; then it stands for itself.
  for (const std::string& token : tokens) bytes += from_byte_level(token).value_or(token);
  return {replace_invalid_utf8(bytes)};
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

/// The byte of a token "<0xHH>".
std::optional<char> byte_of(const std::string& token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  const int high = hex_digit(token[3]);
  const int low = hex_digit(token[4]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<char>(high << 4 | low);
}

/// A run of byte tokens is one text if it is valid as a whole; else every byte of it becomes
/// U+FFFD.
Tokens decode_byte_fallback(Tokens tokens) {
  Tokens decoded;
  std::string run;
  const auto finish_run = [&] {
    if (run.empty()) return;
    if (find_invalid_utf8(run) == std::string::npos) {
      decoded.push_back(run);
    } else {
      decoded.insert(decoded.end(), run.size(), "\uFFFD");
    }
    run.clear();
  };
  for (std::string& token : tokens) {
    if (const auto byte = byte_of(token)) {
      run.push_back(*byte);
    } else {
      finish_run();
      decoded.push_back(std::move(token));
    }
  }
  finish_run();
  return decoded;
}

Decoder make_replace_decoder(Matcher matcher, std::string content) {
  return [matcher = std::move(matcher), content = std::move(content)](Tokens tokens) {
    for (std::string& token : tokens) {
      Piece piece{std::move(token), 0};
      piece.replace(matcher, content);
      token = std::move(piece.text);
    }
    return tokens;
  };
}

std::string strip(const std::string& token, const std::string& character, int64_t start,
                  int64_t stop) {
  size_t begin = 0;
  size_t end = token.size();
  for (int64_t i = 0; i < start && token.compare(begin, character.size(), character) == 0; ++i)
    begin += character.size();
  for (int64_t i = 0; i < stop && end >= begin + character.size() &&
                      token.compare(end - character.size(), character.size(), character) == 0;
       ++i) {
    end -= character.size();
  }
  return token.substr(begin, end - begin);
}

Decoder make_strip_decoder(std::string character, int64_t start, int64_t stop) {
  return [=](Tokens tokens) {
    for (std::string& token : tokens) token = strip(token, character, start, stop);
    return tokens;
  };
}

Tokens fuse(Tokens tokens) {
  return {join(tokens)};
}

Decoder make_sequence(std::vector<Decoder> steps) {
  return [steps = std::move(steps)](Tokens tokens) {
    for (const Decoder& step : steps) tokens = step(std::move(tokens));
    return tokens;
  };
}

/// In the first token the mark is dropped when encoding may have put one there, elsewhere it is a
/// space.
Decoder read_metaspace(const JsonNode& node) {
  node.allow_only(
      {"type", "replacement", "str_rep", "add_prefix_space", "prepend_scheme", "split"});
  const Matcher mark = find_literal(node.at("replacement").string());
  const bool never =
      node.string_or("prepend_scheme", "") == "never" || !node.boolean_or("add_prefix_space", true);
  return [=](Tokens tokens) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      Piece piece{std::move(tokens[i]), 0};
      piece.replace(mark, i == 0 && !never ? "" : " ");
      tokens[i] = std::move(piece.text);
    }
    return tokens;
  };
}

Decoder read_strip(const JsonNode& node) {
  node.allow_only({"type", "content", "start", "stop"});
  const JsonNode content = node.at("content");
  const std::string& character = content.string();
  if (character.empty() || utf8_length(character[0]) != character.size())
    content.refuse("must be one character");
  const int64_t start = node.at("start").integer();
  const int64_t stop = node.at("stop").integer();
  if (start < 0 || stop < 0) node.refuse("start and stop must be >= 0");
  return make_strip_decoder(character, start, stop);
}

Decoder read_sequence(const JsonNode& node) {
  node.allow_only({"type", "decoders"});
  std::vector<Decoder> steps;
  for (const JsonNode& item : node.at("decoders").items()) steps.push_back(read_decoder(item));
  return make_sequence(std::move(steps));
}

}  // namespace

Decoder make_byte_level_decoder() {
  return decode_byte_level;
}

Decoder make_sentencepiece_decoder(bool strip_space) {
  std::vector<Decoder> steps{make_replace_decoder(find_literal("▁"), " "), decode_byte_fallback,
                             fuse};
  if (strip_space) steps.push_back(make_strip_decoder(" ", 1, 0));
  return make_sequence(std::move(steps));
}

Decoder read_decoder(const JsonNode& node) {
  const std::string& type = node.type();
  if (type == "ByteLevel") {
    node.allow_only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    return decode_byte_level;
  }
  if (type == "ByteFallback" || type == "Fuse") {
    node.allow_only({"type"});
    return type == "Fuse" ? Decoder(fuse) : Decoder(decode_byte_fallback);
  }
  if (type == "Replace") {
    node.allow_only({"type", "pattern", "content"});
    return make_replace_decoder(read_pattern(node.at("pattern")), node.at("content").string());
  }
  if (type == "Strip") return read_strip(node);
  if (type == "Metaspace") return read_metaspace(node);
  if (type == "Sequence") return read_sequence(node);
  node.at("type").refuse("unknown decoder");
}

}  // namespace graft::text
