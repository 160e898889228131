#include "examples/text/pretokenizer.h"

#include <graft/core/error.h>

#include <utility>

#include "examples/text/byte_level.h"
#include "examples/text/normalizer.h"
#include "examples/text/unicode.h"

namespace graft::text {
namespace {

constexpr std::string_view kGpt2Words =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

enum class PrependScheme { kNever, kFirst, kAlways };

SplitBehavior read_behavior(const JsonNode& node) {
  const std::string& name = node.string();
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  node.refuse("unknown split behavior");
}

/// The scheme by its name, or by the boolean that older files have in its place.
PrependScheme read_prepend_scheme(const JsonNode& node) {
  const bool add_prefix_space = node.boolean_or("add_prefix_space", true);
  const auto scheme = node.find("prepend_scheme");
  if (!scheme) return add_prefix_space ? PrependScheme::kAlways : PrependScheme::kNever;
  const std::string& name = scheme->string();
  if (!add_prefix_space && name != "never")
    scheme->refuse("must agree with add_prefix_space, which is false");
  if (name == "never") return PrependScheme::kNever;
  if (name == "first") return PrependScheme::kFirst;
  if (name == "always") return PrependScheme::kAlways;
  scheme->refuse("unknown prepend scheme");
}

PreTokenizer read_metaspace(const JsonNode& node) {
  node.allow_only(
      {"type", "replacement", "str_rep", "add_prefix_space", "prepend_scheme", "split"});
  const std::string mark = node.at("replacement").string();
  const PrependScheme scheme = read_prepend_scheme(node);
  const bool split = node.boolean_or("split", true);
  const Matcher space = find_literal(" ");
  return [=](std::vector<Piece> pieces) {
    for (Piece& piece : pieces) {
      piece.replace(space, mark);
      const bool wanted = scheme == PrependScheme::kAlways ||
                          (scheme == PrependScheme::kFirst && piece.from_start > 0);
      if (wanted && !piece.text.starts_with(mark)) piece.prepend(mark);
    }
    if (!split) return pieces;
    return split_pieces(pieces, find_literal(mark), SplitBehavior::kMergedWithNext);
  };
}

PreTokenizer read_byte_level(const JsonNode& node) {
  node.allow_only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
  return make_byte_level(node.boolean_or("add_prefix_space", true),
                         node.boolean_or("use_regex", true));
}

PreTokenizer read_split(const JsonNode& node) {
  node.allow_only({"type", "pattern", "behavior", "invert"});
  return make_split(read_pattern(node.at("pattern")), read_behavior(node.at("behavior")),
                    node.boolean_or("invert", false));
}

PreTokenizer read_sequence(const JsonNode& node) {
  node.allow_only({"type", "pretokenizers"});
  std::vector<PreTokenizer> steps;
  for (const JsonNode& item : node.at("pretokenizers").items())
    steps.push_back(read_pretokenizer(item));
  return make_sequence(std::move(steps));
}

PreTokenizer read_digits(const JsonNode& node) {
  node.allow_only({"type", "individual_digits"});
  const bool individual = node.boolean_or("individual_digits", false);
  return make_split(find_code_points(is_number),
                    individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous);
}

/// Words and runs of other visible characters.
PreTokenizer make_whitespace(const std::string& place) {
  return make_split(
      Regex(R"([\w\x{200C}\x{200D}]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}\s]+)",
            place),
      SplitBehavior::kRemoved, /*invert=*/true);
}

PreTokenizer make_bert() {
  return make_sequence({make_split(find_code_points(is_whitespace), SplitBehavior::kRemoved),
                        make_split(find_code_points(is_punctuation), SplitBehavior::kIsolated)});
}

}  // namespace

PreTokenizer make_split(Matcher matcher, SplitBehavior behavior, bool invert) {
  return [matcher = std::move(matcher), behavior, invert](std::vector<Piece> pieces) {
    return split_pieces(pieces, matcher, behavior, invert);
  };
}

PreTokenizer make_byte_level(bool add_prefix_space, bool use_regex) {
  const Matcher words = use_regex ? Matcher(Regex(kGpt2Words, "ByteLevel")) : Matcher();
  return [=](std::vector<Piece> pieces) {
    for (Piece& piece : pieces) {
      if (add_prefix_space && !piece.text.starts_with(' ')) piece.prepend(" ");
    }
    if (words) pieces = split_pieces(pieces, words, SplitBehavior::kIsolated);
    for (Piece& piece : pieces) {
      piece.text = to_byte_level(piece.text);
      if (piece.from_start > 0) piece.from_start = utf8_length(piece.text[0]);
    }
    return pieces;
  };
}

PreTokenizer make_sequence(std::vector<PreTokenizer> steps) {
  return [steps = std::move(steps)](std::vector<Piece> pieces) {
    for (const PreTokenizer& step : steps) pieces = step(std::move(pieces));
    return pieces;
  };
}

PreTokenizer read_pretokenizer(const JsonNode& node) {
  const std::string& type = node.type();
  if (type == "ByteLevel") return read_byte_level(node);
  if (type == "Split") return read_split(node);
  if (type == "Metaspace") return read_metaspace(node);
  if (type == "Digits") return read_digits(node);
  if (type == "Sequence") return read_sequence(node);
  if (type == "Punctuation") {
    node.allow_only({"type", "behavior"});
    const auto behavior = node.find("behavior");
    return make_split(find_code_points(is_punctuation),
                      behavior ? read_behavior(*behavior) : SplitBehavior::kIsolated);
  }
  if (type == "CharDelimiterSplit") {
    node.allow_only({"type", "delimiter"});
    return make_split(find_literal(node.at("delimiter").string()), SplitBehavior::kRemoved);
  }
  if (type == "Whitespace" || type == "WhitespaceSplit" || type == "BertPreTokenizer") {
    node.allow_only({"type"});
    if (type == "Whitespace") return make_whitespace(node.place());
    if (type == "BertPreTokenizer") return make_bert();
    return make_split(find_code_points(is_whitespace), SplitBehavior::kRemoved);
  }
  node.at("type").refuse("unknown pre-tokenizer");
}

}  // namespace graft::text
