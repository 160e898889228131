#include "examples/text/bpe.h"

#include <graft/core/error.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <queue>
#include <tuple>

#include "examples/text/unicode.h"

namespace graft::text {
namespace {

constexpr size_t kCachedWords = 1 << 16;
constexpr size_t kCachedWordBytes = 64;
constexpr uint64_t kNoKey = ~uint64_t{0};  // ids are below 2^31, so no pair has it

uint64_t key_of(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

/// A token of the word under work, in a doubly linked list that merging shortens.
struct Symbol {
  int32_t id;  // -1: merged into the one before it
  int32_t previous, next;
};

/// A pair that could be merged. It may be out of date by the time it is the best one.
struct Candidate {
  uint32_t rank;
  int32_t position;
  int32_t id;
  bool operator>(const Candidate& other) const {
    return std::tie(rank, position) > std::tie(other.rank, other.position);
  }
};

void merge_all(std::vector<int32_t>& ids, const MergeTable& merges) {
  const auto count = static_cast<int32_t>(ids.size());
  std::vector<Symbol> symbols(ids.size());
  std::vector<Candidate> found;
  for (int32_t i = 0; i < count; ++i) {
    symbols[static_cast<size_t>(i)] = {ids[static_cast<size_t>(i)], i - 1,
                                       i + 1 < count ? i + 1 : -1};
    const auto* merge =
        i + 1 < count ? merges.find(ids[static_cast<size_t>(i)], ids[static_cast<size_t>(i) + 1])
                      : nullptr;
    if (merge != nullptr) found.push_back({merge->rank, i, merge->id});
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue(std::greater<>(),
                                                                               std::move(found));
  const auto at = [&](int32_t position) -> Symbol& {
    return symbols[static_cast<size_t>(position)];
  };
  const auto offer = [&](int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    const auto* merge = merges.find(at(left).id, at(right).id);
    if (merge != nullptr) queue.push({merge->rank, left, merge->id});
  };
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = at(best.position);
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = at(left.next);
    const auto* merge = merges.find(left.id, right.id);
    if (merge == nullptr || merge->id != best.id) continue;
    left.id = best.id;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) at(left.next).previous = best.position;
    offer(left.previous, best.position);
    offer(best.position, left.next);
  }
  ids.clear();
  for (int32_t i = count > 0 ? 0 : -1; i >= 0; i = at(i).next) ids.push_back(at(i).id);
}

std::string byte_token(size_t byte) {
  constexpr char kDigits[] = "0123456789ABCDEF";
  return concat("<0x", kDigits[byte >> 4], kDigits[byte & 15], ">");
}

}  // namespace

MergeTable::MergeTable(size_t count)
    : slots_(std::bit_ceil(2 * count + 2), Slot{kNoKey, {0, 0}}), mask_(slots_.size() - 1) {}

size_t MergeTable::slot_of(uint64_t key) const {
  size_t slot = (key * 0x9E3779B97F4A7C15ull) >> 20 & mask_;
  while (slots_[slot].key != key && slots_[slot].key != kNoKey) slot = (slot + 1) & mask_;
  return slot;
}

void MergeTable::set(int32_t left, int32_t right, Merge merge) {
  const uint64_t key = key_of(left, right);
  slots_[slot_of(key)] = {key, merge};
}

const MergeTable::Merge* MergeTable::find(int32_t left, int32_t right) const {
  const uint64_t key = key_of(left, right);
  const Slot& slot = slots_[slot_of(key)];
  return slot.key == key ? &slot.merge : nullptr;
}

Bpe::Bpe(BpeOptions options)
    : options_(std::move(options)), merges_(options_.merges.size()), byte_ids_(256) {
  const std::string place = concat(" (", options_.source, ")");
  // A table by id must not be sized by one absurd id.
  const int64_t limit = 4 * static_cast<int64_t>(options_.vocabulary.size()) + 65536;
  ids_.reserve(options_.vocabulary.size());
  for (auto& [token, id] : options_.vocabulary) {
    GRAFT_CHECK(id >= 0 && id < limit, "tokenizer", "a token's id must be in [0, ", limit, ") for ",
                options_.vocabulary.size(), " tokens; got ", id, " for '", token, "'", place);
    const auto index = static_cast<size_t>(id);
    if (index >= tokens_.size()) tokens_.resize(index + 1);
    GRAFT_CHECK(!tokens_[index], "tokenizer", "every id must name one token; got ", id,
                " twice, for '", token, "'", place);
    GRAFT_CHECK(ids_.emplace(token, id).second, "tokenizer", "every token must occur once; got '",
                token, "' twice", place);
    tokens_[index] = std::move(token);
  }
  uint32_t rank = 0;
  for (const auto& [left, right] : options_.merges) {
    const auto left_id = id(left);
    const auto right_id = id(right);
    const auto joined_id = id(left + right);
    GRAFT_CHECK(left_id && right_id && joined_id, "tokenizer",
                "both parts of a merge and their join must be tokens; got '", left, "' + '", right,
                "'", place);
    merges_.set(*left_id, *right_id, {rank++, *joined_id});
  }
  if (options_.unknown_token) {
    unknown_id_ = id(*options_.unknown_token);
    GRAFT_CHECK(unknown_id_, "tokenizer", "the unknown token must be in the vocabulary; got '",
                *options_.unknown_token, "'", place);
  }
  for (size_t byte = 0; byte < 256; ++byte) byte_ids_[byte] = id(byte_token(byte));
  options_.vocabulary = {};
  options_.merges = {};
}

std::optional<int32_t> Bpe::id(std::string_view token) const {
  const auto found = ids_.find(token);
  return found == ids_.end() ? std::nullopt : std::optional<int32_t>(found->second);
}

const std::string* Bpe::token(int32_t id) const {
  if (id < 0 || id >= end_id() || !tokens_[static_cast<size_t>(id)]) return nullptr;
  return &*tokens_[static_cast<size_t>(id)];
}

bool Bpe::append_bytes(std::string_view character, std::vector<int32_t>& ids) const {
  const auto byte_id = [&](char byte) { return byte_ids_[static_cast<unsigned char>(byte)]; };
  if (!std::all_of(character.begin(), character.end(),
                   [&](char byte) { return byte_id(byte).has_value(); }))
    return false;
  for (const char byte : character) ids.push_back(*byte_id(byte));
  return true;
}

std::vector<int32_t> Bpe::characters(std::string_view word) const {
  std::vector<int32_t> ids;
  ids.reserve(word.size());
  bool unknown_pending = false;  // the unknown token is added late, so that a run can become one
  for (size_t at = 0; at < word.size();) {
    const std::string_view character = word.substr(at, utf8_length(word[at]));
    at += character.size();
    if (const auto known = id(character)) {
      if (unknown_pending) ids.push_back(*unknown_id_);
      unknown_pending = false;
      ids.push_back(*known);
    } else if (!(options_.byte_fallback && append_bytes(character, ids)) && unknown_id_) {
      if (unknown_pending && !options_.fuse_unknown) ids.push_back(*unknown_id_);
      unknown_pending = true;
    }
  }
  if (unknown_pending) ids.push_back(*unknown_id_);
  return ids;
}

void Bpe::encode_uncached(std::string_view word, std::vector<int32_t>& ids) const {
  const auto whole = options_.ignore_merges ? id(word) : std::nullopt;
  if (whole) {
    ids = {*whole};
    return;
  }
  ids = characters(word);
  merge_all(ids, merges_);
}

void Bpe::encode(std::string_view word, std::vector<int32_t>& ids) const {
  GRAFT_CHECK(word.size() < static_cast<size_t>(std::numeric_limits<int32_t>::max()), "tokenizer",
              "a word must be shorter than 2 GiB; got ", word.size(), " bytes");
  const bool cacheable = word.size() <= kCachedWordBytes;
  if (cacheable) {
    const std::lock_guard lock(cache_mutex_);
    const auto found = cache_.find(word);
    if (found != cache_.end()) {
      ids.insert(ids.end(), found->second.begin(), found->second.end());
      return;
    }
  }
  std::vector<int32_t> encoded;
  encode_uncached(word, encoded);
  ids.insert(ids.end(), encoded.begin(), encoded.end());
  if (cacheable) {
    const std::lock_guard lock(cache_mutex_);
    if (cache_.size() < kCachedWords) cache_.emplace(word, std::move(encoded));
  }
}

}  // namespace graft::text
