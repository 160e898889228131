#include "examples/text/piece.h"

#include <algorithm>

namespace graft::text {
namespace {

struct Segment {
  size_t begin, end;
  bool is_match;
};

/// The whole text as alternating matches and gaps.
std::vector<Segment> segments_of(std::string_view text, const Matcher& matcher, bool invert) {
  std::vector<Segment> segments;
  size_t end = 0;
  for (const Span& span : matcher(text)) {
    if (span.begin != end) segments.push_back({end, span.begin, invert});
    segments.push_back({span.begin, span.end, !invert});
    end = span.end;
  }
  if (end != text.size()) segments.push_back({end, text.size(), invert});
  return segments;
}

/// Joins a segment to the one before it wherever `joins(previous_is_match, is_match)` says so.
template <class Joins>
std::vector<Segment> join_forward(const std::vector<Segment>& segments, Joins joins) {
  std::vector<Segment> joined;
  bool previous = false;
  for (const Segment& segment : segments) {
    if (!joined.empty() && joins(previous, segment.is_match)) {
      joined.back().end = segment.end;
    } else {
      joined.push_back(segment);
    }
    previous = segment.is_match;
  }
  return joined;
}

bool match_after_other(bool previous, bool current) {
  return current && !previous;
}
bool same_kind(bool previous, bool current) {
  return current == previous;
}

std::vector<Segment> join_backward(std::vector<Segment> segments) {
  std::vector<Segment> joined;
  bool next = false;
  for (auto segment = segments.rbegin(); segment != segments.rend(); ++segment) {
    if (!joined.empty() && match_after_other(next, segment->is_match)) {
      joined.back().begin = segment->begin;
    } else {
      joined.push_back(*segment);
    }
    next = segment->is_match;
  }
  std::reverse(joined.begin(), joined.end());
  return joined;
}

std::vector<Segment> apply_behavior(std::vector<Segment> segments, SplitBehavior behavior) {
  switch (behavior) {
    case SplitBehavior::kRemoved:
      std::erase_if(segments, [](const Segment& segment) { return segment.is_match; });
      return segments;
    case SplitBehavior::kMergedWithPrevious:
      return join_forward(segments, match_after_other);
    case SplitBehavior::kMergedWithNext:
      return join_backward(std::move(segments));
    case SplitBehavior::kContiguous:
      return join_forward(segments, same_kind);
    case SplitBehavior::kIsolated:
      break;
  }
  return segments;
}

}  // namespace

void Piece::replace(const Matcher& matcher, std::string_view content) {
  const std::vector<Span> matches = matcher(text);
  if (matches.empty()) return;
  std::string replaced;
  replaced.reserve(text.size());
  size_t end = 0;
  size_t new_from_start = from_start;
  for (const Span& match : matches) {
    replaced.append(text, end, match.begin - end);
    // A match at the very start hands its place on to the content; a removed start is gone.
    if (from_start > 0 && match.begin == 0) new_from_start = content.size();
    replaced.append(content);
    end = match.end;
  }
  replaced.append(text, end, text.size() - end);
  text = std::move(replaced);
  from_start = new_from_start;
}

std::vector<Piece> split_pieces(const std::vector<Piece>& pieces, const Matcher& matcher,
                                SplitBehavior behavior, bool invert) {
  std::vector<Piece> parts;
  for (const Piece& piece : pieces) {
    for (const Segment& segment :
         apply_behavior(segments_of(piece.text, matcher, invert), behavior)) {
      if (segment.begin != segment.end) parts.push_back(piece.part(segment.begin, segment.end));
    }
  }
  return parts;
}

}  // namespace graft::text
