#include "examples/trainer/data.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/core/philox.h>

#include <algorithm>
#include <numeric>

#include "examples/trainer/examples.h"
#include "examples/trainer/program.h"

namespace graft::trainer {

TokenData TokenData::from_file(const std::string& path, const text::Tokenizer& tokenizer,
                               int64_t seq_len, bool packing) {
  GRAFT_CHECK(seq_len >= 2, "data", "seq-len must be at least 2; got ", seq_len);
  const std::string text = read_file(path, "data");
  GRAFT_CHECK(!text.empty(), "data", "the text must not be empty; got '", path, "'");
  try {
    return path.ends_with(".jsonl")
               ? from_examples(read_examples(text, tokenizer), seq_len, packing)
               : from_text(text, tokenizer, seq_len);
  } catch (const Error& error) {
    throw Error(std::string(error.what()) + " (file '" + path + "')");
  }
}

TokenData TokenData::from_text(const std::string& text, const text::Tokenizer& tokenizer,
                               int64_t seq_len) {
  TokenData data(seq_len);
  data.ids_ = tokenizer.encode(text);
  const auto all = static_cast<int64_t>(data.ids_.size());
  GRAFT_CHECK(all >= seq_len, "data",
              "the text must hold at least one chunk of seq-len tokens; got ", all,
              " tokens for seq-len ", seq_len);
  for (int64_t end = seq_len; end <= all; end += seq_len) data.begins_.push_back(end);
  data.ids_.resize(static_cast<size_t>(data.begins_.back()));
  return data;
}

TokenData TokenData::from_examples(const std::vector<Example>& examples, int64_t seq_len,
                                   bool packing) {
  TokenData data(seq_len);
  int64_t learnt = 0;
  for (size_t i = 0; i < examples.size(); ++i) {
    const Example& example = examples[i];
    const auto length = std::min(static_cast<int64_t>(example.ids.size()), seq_len);
    data.cut_ += length < static_cast<int64_t>(example.ids.size());
    const int64_t in_row = data.tokens() - data.begins_.back();
    if (in_row > 0 && (!packing || in_row + length > seq_len))
      data.begins_.push_back(data.tokens());
    data.ids_.insert(data.ids_.end(), example.ids.begin(), example.ids.begin() + length);
    data.learnt_.insert(data.learnt_.end(), example.learnt.begin(),
                        example.learnt.begin() + length);
    data.segments_.insert(data.segments_.end(), static_cast<size_t>(length),
                          static_cast<int32_t>(i));
    learnt += std::count(example.learnt.begin() + 1, example.learnt.begin() + length, true);
  }
  data.begins_.push_back(data.tokens());
  GRAFT_CHECK(learnt > 0, "data", "some token within seq-len must be learnt; got none in ",
              examples.size(), " examples for seq-len ", seq_len);
  return data;
}

TokenData TokenData::rows(int64_t first, int64_t last) const {
  TokenData part(seq_len_);
  const auto begin = begins_[static_cast<size_t>(first)], end = begins_[static_cast<size_t>(last)];
  part.ids_.assign(ids_.begin() + begin, ids_.begin() + end);
  if (!segments_.empty()) {
    part.segments_.assign(segments_.begin() + begin, segments_.begin() + end);
    part.learnt_.assign(learnt_.begin() + begin, learnt_.begin() + end);
  }
  for (int64_t row = first + 1; row <= last; ++row)
    part.begins_.push_back(begins_[static_cast<size_t>(row)] - begin);
  return part;
}

std::pair<TokenData, TokenData> TokenData::split_last(int64_t count) const {
  std::pair parts(rows(0, size() - count), rows(size() - count, size()));
  parts.first.cut_ = cut_;
  return parts;
}

Batch TokenData::batch(const std::vector<int64_t>& rows) const {
  int64_t longest = 0;
  for (const int64_t row : rows)
    longest = std::max(longest,
                       begins_[static_cast<size_t>(row) + 1] - begins_[static_cast<size_t>(row)]);
  const auto count = static_cast<int64_t>(rows.size());
  Batch batch;
  batch.inputs = at::zeros({count, longest - 1}, at::kLong);
  batch.targets = at::full({count, longest - 1}, -100, at::kLong);
  at::Tensor segments = at::full({count, longest - 1}, -1, at::kLong);
  at::Tensor valid = at::ones({count, longest - 1}, at::kBool);
  bool padded = false;  // whether some row is shorter
  bool pieces = false;  // whether some row holds several
  for (int64_t i = 0; i < count; ++i) {
    const auto row = static_cast<size_t>(rows[static_cast<size_t>(i)]);
    const int64_t begin = begins_[row], length = begins_[row + 1] - begin;
    auto* input = batch.inputs.mutable_data_ptr<int64_t>() + i * (longest - 1);
    auto* target = batch.targets.mutable_data_ptr<int64_t>() + i * (longest - 1);
    auto* segment = segments.mutable_data_ptr<int64_t>() + i * (longest - 1);
    if (length < longest) {
      padded = true;
      valid[i].narrow(0, length - 1, longest - length).fill_(false);
    }
    for (int64_t t = 0; t + 1 < length; ++t) {
      const auto at = static_cast<size_t>(begin + t);
      input[t] = ids_[at];
      const bool same = segments_.empty() || segments_[at] == segments_[at + 1];
      if (!segments_.empty()) segment[t] = segments_[at];
      pieces = pieces || !same;
      if (!same || !(learnt_.empty() || learnt_[at + 1])) continue;
      target[t] = ids_[at + 1];
      ++batch.counted;
    }
  }
  if (pieces) batch.segments = segments;
  if (padded) batch.valid = valid;
  return batch;
}

RowOrder::RowOrder(int64_t rows, int64_t batch_size, bool shuffle, uint64_t seed)
    : rows_(rows), batch_size_(batch_size), shuffle_(shuffle), seed_(seed) {}

std::vector<int64_t> RowOrder::batch(int64_t index) {
  std::vector<int64_t> found;
  for (int64_t j = 0; j < batch_size_; ++j) found.push_back(row_at(index * batch_size_ + j));
  return found;
}

int64_t RowOrder::row_at(int64_t position) {
  const int64_t within = position % rows_;
  if (!shuffle_) return within;
  if (const int64_t epoch = position / rows_; epoch != epoch_) {
    epoch_ = epoch;
    permutation_.resize(static_cast<size_t>(rows_));
    std::iota(permutation_.begin(), permutation_.end(), 0);
    for (int64_t i = rows_ - 1; i > 0; --i) {  // Fisher-Yates
      const Philox4 bits = philox4x32<10>(
          {static_cast<uint32_t>(i), static_cast<uint32_t>(epoch), 0, 0x5eed}, seed_);
      const uint64_t draw = (uint64_t{bits.x} << 32 | bits.y) % static_cast<uint64_t>(i + 1);
      std::swap(permutation_[static_cast<size_t>(i)], permutation_[draw]);
    }
  }
  return permutation_[static_cast<size_t>(within)];
}

}  // namespace graft::trainer
