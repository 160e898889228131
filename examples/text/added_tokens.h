/// Added tokens: spellings that are cut out of the text before anything else looks at it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "examples/text/bpe.h"
#include "examples/text/normalizer.h"
#include "examples/text/piece.h"

namespace graft::text {

/// One added token with its matching rules.
struct AddedToken {
  std::string content;
  int32_t id = 0;
  bool special = false;      ///< Left out by decoding when asked for.
  bool single_word = false;  ///< Matches only where no letter or digit touches it.
  bool lstrip = false;       ///< Swallows the white space before it.
  bool rstrip = false;       ///< Swallows the white space after it.
  bool normalized = false;   ///< Is looked for, normalized itself, in the normalized text.
  /// What decoding shows: the content, in its normalized spelling if `normalized`. AddedTokens
  /// fills it in.
  std::string spelling = {};
};

/// Finds the leftmost, and there the longest, of many strings.
class StringSet {
 public:
  struct Match {
    size_t begin, end, index;
  };

  /// Adds the string number `index`; of two equal strings the first one counts, and an empty one
  /// never matches.
  void add(std::string_view text, size_t index);

  /// The first match that begins at or after `position`.
  std::optional<Match> find(std::string_view text, size_t position) const;

 private:
  static constexpr size_t kNone = ~size_t{0};
  std::unordered_map<uint64_t, uint32_t> edges_;  // node << 8 | byte -> node
  std::vector<size_t> ends_{kNone};               // by node: the string that ends there
  bool starts_[256] = {};
};

/// A stretch of text, or the added token that stood in its place.
struct Fragment {
  Piece piece;
  std::optional<int32_t> id;
};

/// All added tokens of a tokenizer.
class AddedTokens {
 public:
  AddedTokens() = default;

  /// `normalizer` may be null.
  AddedTokens(std::vector<AddedToken> tokens, const Normalizer* normalizer);

  /// Cuts the tokens out of `text`, normalizing the rest on the way: first those that are not
  /// `normalized`, then, within what is left, the others.
  std::vector<Fragment> split(std::string_view text, const Normalizer* normalizer) const;

  const AddedToken* find(int32_t id) const;  ///< By id; null when there is none.
  const AddedToken* find(
      std::string_view content) const;  ///< By spelling; null when there is none.
  int64_t end_id() const;               ///< Largest id + 1, or 0.

 private:
  void cut(const Piece& piece, const StringSet& set, std::vector<Fragment>& fragments) const;

  std::vector<AddedToken> tokens_;
  std::unordered_map<int32_t, size_t> by_id_;
  StringMap<size_t> by_content_;
  StringSet raw_, normalized_;
};

/// Reads "added_tokens". An id must be the one that the vocabulary or the order of the list gives,
/// as the reference would otherwise use another one than the file says.
std::vector<AddedToken> read_added_tokens(const JsonNode& node, const Bpe& model);

}  // namespace graft::text
