// The frozen random matrices that all layers of one attached VeRA or RandLoRA have in common.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/adapters/adapter_module.h>
#include <graft/adapters/randlora.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace graft::adapters {

/// One pair of frozen matrices.
struct BasePair {
  at::Tensor A;
  at::Tensor B;
};

/// The layers of one attached adapter, as far as the size of their bases goes.
struct BaseSizes {
  int64_t out = 0;  ///< the largest of the layers
  int64_t in = 0;   ///< the largest of the layers
  at::ScalarType type = at::kFloat;
  at::Device device = at::kCPU;
};

/// The sizes of these Linear layers; throws for a weight that is not floating point.
BaseSizes base_sizes(const char* method,
                     const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers);

/// The pairs of one attached adapter: one for the method's rank, and one for each other rank that
/// some layer has. A pair is drawn when it is first asked for; every layer then holds the very same
/// tensors.
class RandomBases {
 public:
  using Draw = std::function<BasePair(int64_t rank)>;

  /// `rank` is the method's own; `draw` makes a pair on the right device, in the right type.
  RandomBases(int64_t rank, Draw draw) : rank_(rank), draw_(std::move(draw)) {}

  const BasePair& of_rank(int64_t rank);

  /// The pairs as files name them: `prefix` + "A" and `prefix` + "B", and for another rank than the
  /// method's own with ".rank_<r>" after it.
  std::vector<nn::Adapter::FileTensor> file_tensors(const std::string& prefix) const;

 private:
  int64_t rank_;
  Draw draw_;
  std::map<int64_t, BasePair> pairs_;
};

/// VeRA's A [r, in] and B [out, r], bit for bit PEFT's: LibTorch's CPU generator seeded with `key`,
/// uniform within sqrt(6 / columns), A first. Throws for more than 2^31 numbers.
BasePair draw_vera_bases(const BaseSizes& sizes, int64_t rank, int64_t key);

/// RandLoRA's A [r, 1, m] and B [M, N, r], M and m the larger and the smaller of `out` and `in`,
/// N = ceil(m / r), bit for bit PEFT's where PEFT draws in bf16 (every CPU and every GPU that has
/// bf16): LibTorch's CPU generator seeded with `key`; dense: bf16 uniform numbers, A first, then
/// the N bases one after another; sparse: fp32 uniform numbers turned into -1, 0, 1 with chances
/// 1 / (2 k) at both ends, k = 3 or sqrt(m). Each matrix is divided by its own standard deviation.
/// Throws for more than 2^31 numbers.
BasePair draw_randlora_bases(const BaseSizes& sizes, int64_t rank, int64_t key, RandLoraBases kind);

}  // namespace graft::adapters
