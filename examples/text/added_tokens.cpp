#include "examples/text/added_tokens.h"

#include <graft/core/error.h>

#include <algorithm>

#include "examples/text/unicode.h"

namespace graft::text {
namespace {

size_t whitespace_start(std::string_view text, size_t end) {
  while (end > 0 && is_whitespace(code_point_before(text, end))) {
    end = previous_position(text, end);
  }
  return end;
}

size_t whitespace_end(std::string_view text, size_t begin) {
  while (begin < text.size() && is_whitespace(code_point_at(text, begin)))
    begin += utf8_length(text[begin]);
  return begin;
}

bool touches_word(std::string_view text, size_t begin, size_t end) {
  return (begin > 0 && is_word(code_point_before(text, begin))) ||
         (end < text.size() && is_word(code_point_at(text, end)));
}

}  // namespace

void StringSet::add(std::string_view text, size_t index) {
  if (text.empty()) return;
  starts_[static_cast<unsigned char>(text[0])] = true;
  uint32_t node = 0;
  for (const char byte : text) {
    const uint64_t key = uint64_t{node} << 8 | static_cast<unsigned char>(byte);
    const auto [edge, is_new] = edges_.emplace(key, static_cast<uint32_t>(ends_.size()));
    if (is_new) ends_.push_back(kNone);
    node = edge->second;
  }
  if (ends_[node] == kNone) ends_[node] = index;
}

std::optional<StringSet::Match> StringSet::find(std::string_view text, size_t position) const {
  if (edges_.empty()) return std::nullopt;
  for (size_t begin = position; begin < text.size(); ++begin) {
    if (!starts_[static_cast<unsigned char>(text[begin])]) continue;
    std::optional<Match> longest;
    uint32_t node = 0;
    for (size_t end = begin; end < text.size(); ++end) {
      const auto edge = edges_.find(uint64_t{node} << 8 | static_cast<unsigned char>(text[end]));
      if (edge == edges_.end()) break;
      node = edge->second;
      if (ends_[node] != kNone) longest = {begin, end + 1, ends_[node]};
    }
    if (longest) return longest;
  }
  return std::nullopt;
}

AddedTokens::AddedTokens(std::vector<AddedToken> tokens, const Normalizer* normalizer)
    : tokens_(std::move(tokens)) {
  // Where two normalized spellings coincide a special token wins over a plain one.
  std::stable_partition(tokens_.begin(), tokens_.end(),
                        [](const AddedToken& token) { return token.special; });
  for (size_t i = 0; i < tokens_.size(); ++i) {
    AddedToken& token = tokens_[i];
    token.spelling = token.content;
    by_id_.emplace(token.id, i);
    by_content_.emplace(token.content, i);
    if (!token.normalized) {
      raw_.add(token.content, i);
      continue;
    }
    Piece spelling{token.content, 0};
    if (normalizer != nullptr) normalizer->apply(spelling);
    normalized_.add(spelling.text, i);
    token.spelling = std::move(spelling.text);
  }
}

void AddedTokens::cut(const Piece& piece, const StringSet& set,
                      std::vector<Fragment>& fragments) const {
  const std::string& text = piece.text;
  size_t done = 0;
  for (auto match = set.find(text, 0); match; match = set.find(text, match->end)) {
    const AddedToken& token = tokens_[match->index];
    auto [begin, end, index] = *match;
    if (token.single_word && touches_word(text, begin, end)) continue;
    // White space that an earlier token swallowed is not there any more.
    if (token.lstrip) begin = std::max(whitespace_start(text, begin), done);
    if (token.rstrip) end = whitespace_end(text, end);
    if (done < begin) fragments.push_back({piece.part(done, begin), std::nullopt});
    fragments.push_back({{}, token.id});
    done = end;
  }
  if (done < text.size()) fragments.push_back({piece.part(done, text.size()), std::nullopt});
}

std::vector<Fragment> AddedTokens::split(std::string_view text,
                                         const Normalizer* normalizer) const {
  if (text.empty()) return {};
  std::vector<Fragment> raw;
  cut({std::string(text), utf8_length(text[0])}, raw_, raw);
  std::vector<Fragment> fragments;
  for (Fragment& fragment : raw) {
    if (fragment.id) {
      fragments.push_back(std::move(fragment));
      continue;
    }
    if (normalizer != nullptr) normalizer->apply(fragment.piece);
    cut(fragment.piece, normalized_, fragments);
  }
  return fragments;
}

const AddedToken* AddedTokens::find(int32_t id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : &tokens_[found->second];
}

const AddedToken* AddedTokens::find(std::string_view content) const {
  const auto found = by_content_.find(content);
  return found == by_content_.end() ? nullptr : &tokens_[found->second];
}

int64_t AddedTokens::end_id() const {
  int64_t end = 0;
  for (const AddedToken& token : tokens_) end = std::max<int64_t>(end, int64_t{token.id} + 1);
  return end;
}

std::vector<AddedToken> read_added_tokens(const JsonNode& node, const Bpe& model) {
  std::vector<AddedToken> tokens;
  StringMap<size_t> seen;
  auto next_id = static_cast<int64_t>(model.size());
  for (const JsonNode& item : node.items()) {
    item.allow_only({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
    AddedToken token;
    token.content = item.at("content").string();
    token.special = item.at("special").boolean();
    token.single_word = item.boolean_or("single_word", false);
    token.lstrip = item.boolean_or("lstrip", false);
    token.rstrip = item.boolean_or("rstrip", false);
    token.normalized = item.boolean_or("normalized", !token.special);
    if (token.content.empty()) item.refuse("an added token must not be empty");
    if (!seen.emplace(token.content, tokens.size()).second)
      item.refuse("an added token must occur once");
    const auto known = model.id(token.content);
    const int64_t id = known ? int64_t{*known} : next_id++;
    if (item.at("id").integer() != id)
      item.refuse(concat("an added token's id must follow the vocabulary, here ", id));
    if (!known && model.token(static_cast<int32_t>(id)) != nullptr)
      item.refuse("an added token's id must be free");
    token.id = static_cast<int32_t>(id);
    tokens.push_back(std::move(token));
  }
  return tokens;
}

}  // namespace graft::text
