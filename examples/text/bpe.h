/// Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909): a word starts as single characters,
/// and the adjacent pair with the best-ranked merge, the leftmost one among equals, is joined until
/// no pair has a merge.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace graft::text {

/// Hashes strings and views alike, so that a map can be asked with a view.
struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};

/// A map from token spellings.
template <class Value>
using StringMap = std::unordered_map<std::string, Value, StringHash, std::equal_to<>>;

/// What makes a BPE model.
struct BpeOptions {
  std::vector<std::pair<std::string, int32_t>> vocabulary;  ///< Spelling and id; each at most once.
  std::vector<std::pair<std::string, std::string>> merges;  ///< Left and right part, best first.
  std::optional<std::string> unknown_token;  ///< Stands for characters outside the vocabulary.
  bool fuse_unknown = false;  ///< A run of unknown characters becomes one unknown token.
  bool byte_fallback =
      false;  ///< Unknown characters become their bytes, tokens "<0x00>" to "<0xFF>".
  bool ignore_merges = false;  ///< A word that is a token is taken whole, whatever the merges say.
  std::string source;          ///< Where it comes from, for errors.
};

/// Merges by the ids of a pair: open addressing, since one lookup per candidate pair is the cost of
/// encoding.
class MergeTable {
 public:
  struct Merge {
    uint32_t rank;
    int32_t id;  // of the joined token
  };

  explicit MergeTable(size_t count);
  void set(int32_t left, int32_t right, Merge merge);  ///< Overwrites what the pair had.
  const Merge* find(int32_t left, int32_t right) const;

 private:
  struct Slot {
    uint64_t key;
    Merge merge;
  };
  size_t slot_of(uint64_t key) const;

  std::vector<Slot> slots_;
  size_t mask_;
};

/// A BPE model; immutable apart from its cache of words, and safe to use from several threads.
class Bpe {
 public:
  /// Throws when a merge names a token that is not in the vocabulary, or an id occurs twice or is
  /// far too large.
  explicit Bpe(BpeOptions options);

  /// Appends the ids of one word. Characters that are neither in the vocabulary nor covered by byte
  /// fallback or an unknown token are dropped, as the reference does. O(n log n) in the length of
  /// the word.
  void encode(std::string_view word, std::vector<int32_t>& ids) const;

  std::optional<int32_t> id(std::string_view token) const;
  const std::string* token(int32_t id) const;  ///< Null when there is no such id.
  size_t size() const { return ids_.size(); }  ///< The number of tokens.
  int64_t end_id() const { return static_cast<int64_t>(tokens_.size()); }  ///< Largest id + 1.

 private:
  std::vector<int32_t> characters(std::string_view word) const;
  bool append_bytes(std::string_view character, std::vector<int32_t>& ids) const;
  void encode_uncached(std::string_view word, std::vector<int32_t>& ids) const;

  BpeOptions options_;  // without the vocabulary and the merges, which live in the members below
  StringMap<int32_t> ids_;
  std::vector<std::optional<std::string>> tokens_;
  MergeTable merges_;
  std::optional<int32_t> unknown_id_;
  std::vector<std::optional<int32_t>> byte_ids_;

  mutable std::mutex cache_mutex_;
  mutable StringMap<std::vector<int32_t>> cache_;
};

}  // namespace graft::text
