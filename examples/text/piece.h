/// A stretch of text on its way from the input to the model.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "examples/text/regex.h"

namespace graft::text {

/// Part of the input, perhaps rewritten.
struct Piece {
  std::string text;

  /// How many leading bytes stem from the first character of the whole input; 0 when the piece
  /// stands further inside. The "first" scheme of Metaspace asks for it.
  size_t from_start = 0;

  /// The part [begin, end) as a piece of its own.
  Piece part(size_t begin, size_t end) const {
    return {text.substr(begin, end - begin), from_start > begin ? from_start - begin : 0};
  }

  /// Puts `prefix` in front; the new text counts as coming from where the old text begins.
  void prepend(std::string_view prefix) {
    if (text.empty()) return;
    text.insert(0, prefix);
    if (from_start > 0) from_start += prefix.size();
  }

  /// Replaces every match by `content`.
  void replace(const Matcher& matcher, std::string_view content);
};

/// What becomes of the matches when a piece is split at them.
enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

/// Splits each piece at the matches (`invert`: at what lies between them); empty parts vanish.
std::vector<Piece> split_pieces(const std::vector<Piece>& pieces, const Matcher& matcher,
                                SplitBehavior behavior, bool invert = false);

}  // namespace graft::text
