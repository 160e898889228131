/// Training text as equal chunks of token ids.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "examples/text/tokenizer.h"

namespace graft::trainer {

/// The ids of one training or evaluation batch: position t of `inputs` predicts position t of
/// `targets`.
struct Batch {
  at::Tensor inputs;   ///< [batch, seq_len - 1] int64
  at::Tensor targets;  ///< [batch, seq_len - 1] int64
};

/// A text, tokenised once as a whole without special tokens and cut into contiguous chunks: chunk k
/// holds the tokens [k seq_len, (k + 1) seq_len); an incomplete last chunk is dropped.
class TokenChunks {
 public:
  /// Throws for a file that is missing, a folder, empty, not UTF-8, or shorter than one chunk.
  static TokenChunks from_text_file(const std::string& path, const text::Tokenizer& tokenizer,
                                    int64_t seq_len);

  int64_t size() const { return static_cast<int64_t>(ids_.size()) / seq_len_; }
  int64_t seq_len() const { return seq_len_; }
  /// The first part and the last `count` chunks.
  std::pair<TokenChunks, TokenChunks> split_last(int64_t count) const;
  /// The chunks of these numbers.
  Batch batch(const std::vector<int64_t>& chunks) const;

 private:
  std::vector<int32_t> ids_;
  int64_t seq_len_ = 0;
};

/// Which chunks a micro-batch takes: in order and wrapping round, or shuffled anew in every epoch
/// by the seed. A function of the position alone, so that a resumed run sees the same data.
class ChunkOrder {
 public:
  ChunkOrder(int64_t chunks, int64_t batch_size, bool shuffle, uint64_t seed);
  /// The chunks of micro-batch number `index`, counted from the beginning of training.
  std::vector<int64_t> batch(int64_t index);

 private:
  int64_t chunk_at(int64_t position);

  int64_t chunks_, batch_size_;
  bool shuffle_;
  uint64_t seed_;
  int64_t epoch_ = -1;
  std::vector<int64_t> permutation_;
};

}  // namespace graft::trainer
