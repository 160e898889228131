#include "examples/trainer/data.h"

#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/core/philox.h>

#include <numeric>

#include "examples/trainer/program.h"

namespace graft::trainer {

TokenChunks TokenChunks::from_text_file(const std::string& path, const text::Tokenizer& tokenizer,
                                        int64_t seq_len) {
  GRAFT_CHECK(seq_len >= 2, "data", "seq-len must be at least 2; got ", seq_len);
  GRAFT_CHECK(!path.ends_with(".jsonl"), "data", "training data must be a plain text; got '", path,
              "'");
  const std::string text = read_file(path, "data");
  GRAFT_CHECK(!text.empty(), "data", "the text must not be empty; got '", path, "'");
  TokenChunks chunks;
  chunks.seq_len_ = seq_len;
  try {
    chunks.ids_ = tokenizer.encode(text);
  } catch (const Error& error) {
    throw Error(std::string(error.what()) + " (file '" + path + "')");
  }
  GRAFT_CHECK(chunks.size() >= 1, "data",
              "the text must hold at least one chunk of seq-len tokens; got ", chunks.ids_.size(),
              " tokens for seq-len ", seq_len, " (file '", path, "')");
  chunks.ids_.resize(static_cast<size_t>(chunks.size() * seq_len));
  return chunks;
}

std::pair<TokenChunks, TokenChunks> TokenChunks::split_last(int64_t count) const {
  TokenChunks first, last;
  first.seq_len_ = last.seq_len_ = seq_len_;
  const auto middle = ids_.end() - count * seq_len_;
  first.ids_.assign(ids_.begin(), middle);
  last.ids_.assign(middle, ids_.end());
  return {std::move(first), std::move(last)};
}

Batch TokenChunks::batch(const std::vector<int64_t>& chunks) const {
  const auto rows = static_cast<int64_t>(chunks.size());
  at::Tensor ids = at::empty({rows, seq_len_}, at::kLong);
  auto* out = ids.mutable_data_ptr<int64_t>();
  for (const int64_t chunk : chunks)
    for (int64_t t = 0; t < seq_len_; ++t) *out++ = ids_[static_cast<size_t>(chunk * seq_len_ + t)];
  return {ids.narrow(1, 0, seq_len_ - 1), ids.narrow(1, 1, seq_len_ - 1)};
}

ChunkOrder::ChunkOrder(int64_t chunks, int64_t batch_size, bool shuffle, uint64_t seed)
    : chunks_(chunks), batch_size_(batch_size), shuffle_(shuffle), seed_(seed) {}

std::vector<int64_t> ChunkOrder::batch(int64_t index) {
  std::vector<int64_t> found;
  for (int64_t j = 0; j < batch_size_; ++j) found.push_back(chunk_at(index * batch_size_ + j));
  return found;
}

int64_t ChunkOrder::chunk_at(int64_t position) {
  const int64_t within = position % chunks_;
  if (!shuffle_) return within;
  if (const int64_t epoch = position / chunks_; epoch != epoch_) {
    epoch_ = epoch;
    permutation_.resize(static_cast<size_t>(chunks_));
    std::iota(permutation_.begin(), permutation_.end(), 0);
    for (int64_t i = chunks_ - 1; i > 0; --i) {  // Fisher-Yates
      const Philox4 bits = philox4x32<10>(
          {static_cast<uint32_t>(i), static_cast<uint32_t>(epoch), 0, 0x5eed}, seed_);
      const uint64_t draw = (uint64_t{bits.x} << 32 | bits.y) % static_cast<uint64_t>(i + 1);
      std::swap(permutation_[static_cast<size_t>(i)], permutation_[draw]);
    }
  }
  return permutation_[static_cast<size_t>(within)];
}

}  // namespace graft::trainer
