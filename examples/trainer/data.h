/// Training data as rows of token ids: a text in equal chunks, or examples of a .jsonl file.
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
  at::Tensor inputs;    ///< [batch, length] int64
  at::Tensor targets;   ///< [batch, length] int64; -100: not counted
  at::Tensor segments;  ///< [batch, length] int64: which example a position belongs to; undefined
                        ///< where every row is one piece
  at::Tensor valid;     ///< [batch, length] bool: false for padding; undefined where there is none
  int64_t counted = 0;  ///< how many targets count
};

/// One example of a .jsonl file: its tokens, and which of them are to be learnt.
struct Example {
  std::vector<int32_t> ids;
  std::vector<bool> learnt;
};

/// Rows of at most seq_len tokens.
///
/// .txt: the text, tokenised once as a whole without special tokens and cut into contiguous chunks:
/// row k holds the tokens [k seq_len, (k + 1) seq_len); an incomplete last chunk is dropped.
///
/// .jsonl: one example a line (examples.h). Packed, a row takes examples in file order as long as
/// they fit whole, and attention stays inside each; else every example is a row. A batch's rows are
/// padded to the longest of them.
class TokenData {
 public:
  /// Throws for a file that is missing, a folder, empty or not UTF-8, for a text shorter than one
  /// chunk, and for a line that is no example, with its number.
  static TokenData from_file(const std::string& path, const text::Tokenizer& tokenizer,
                             int64_t seq_len, bool packing);

  int64_t size() const { return static_cast<int64_t>(begins_.size()) - 1; }
  int64_t seq_len() const { return seq_len_; }
  /// All tokens of all rows.
  int64_t tokens() const { return static_cast<int64_t>(ids_.size()); }
  /// How many examples were longer than seq_len and lost their end.
  int64_t cut() const { return cut_; }
  /// The first part and the last `count` rows.
  std::pair<TokenData, TokenData> split_last(int64_t count) const;
  /// The rows of these numbers.
  Batch batch(const std::vector<int64_t>& rows) const;

 private:
  explicit TokenData(int64_t seq_len) : seq_len_(seq_len) {}
  static TokenData from_text(const std::string& text, const text::Tokenizer& tokenizer,
                             int64_t seq_len);
  static TokenData from_examples(const std::vector<Example>& examples, int64_t seq_len,
                                 bool packing);
  TokenData rows(int64_t first, int64_t last) const;

  int64_t seq_len_;
  int64_t cut_ = 0;
  std::vector<int32_t> ids_;
  // Of every token: the example it belongs to, and whether it is learnt. Empty for a text, whose
  // rows are one piece and learnt whole.
  std::vector<int32_t> segments_;
  std::vector<bool> learnt_;
  std::vector<int64_t> begins_ = {0};  // of the rows in ids_, and the end
};

/// Which rows a micro-batch takes: in order and wrapping round, or shuffled anew in every epoch by
/// the seed. A function of the position alone, so that a resumed run sees the same data.
class RowOrder {
 public:
  RowOrder(int64_t rows, int64_t batch_size, bool shuffle, uint64_t seed);
  /// The rows of micro-batch number `index`, counted from the beginning of training.
  std::vector<int64_t> batch(int64_t index);

 private:
  int64_t row_at(int64_t position);

  int64_t rows_, batch_size_;
  bool shuffle_;
  uint64_t seed_;
  int64_t epoch_ = -1;
  std::vector<int64_t> permutation_;
};

}  // namespace graft::trainer
