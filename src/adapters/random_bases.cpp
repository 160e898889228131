#include "random_bases.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/core/error.h>

#include <algorithm>
#include <cmath>

#include "low_rank.h"

namespace graft::adapters {
namespace {

void check_size(const char* method, double numbers, int64_t rank) {
  GRAFT_CHECK(numbers <= 2147483648.0, method,
              "the shared bases must hold at most 2^31 numbers; got ", numbers, " for rank=", rank);
}

at::Tensor uniform(at::IntArrayRef shape, at::ScalarType type, double low, double high,
                   const at::Generator& generator) {
  return at::empty(shape, at::TensorOptions(type)).uniform_(low, high, generator);
}

BasePair on_device(const BaseSizes& sizes, const at::Tensor& A, const at::Tensor& B) {
  const auto options = at::TensorOptions(sizes.type).device(sizes.device);
  return {A.to(options), B.to(options)};
}

// -1 below `chance`, 1 above 1 - `chance`, 0 between.
at::Tensor signs(const at::Tensor& numbers, double chance) {
  return (numbers > 1.0 - chance).to(at::kFloat).sub_((numbers < chance).to(at::kFloat));
}

}  // namespace

BaseSizes base_sizes(const char* method,
                     const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers) {
  BaseSizes sizes;
  sizes.device = nn::weight_of(layers.front().second).device();
  for (const auto& [name, layer] : layers) {
    const auto type = nn::weight_of(layer).scalar_type();
    GRAFT_CHECK(at::isFloatingType(type), method, "the base weight must be floating point; got ",
                type, " (layer '", name, "')");
    const auto [out, in] = dense_sizes(layer);
    sizes.out = std::max(sizes.out, out);
    sizes.in = std::max(sizes.in, in);
    if (master_type(layer) == at::kDouble) sizes.type = at::kDouble;
  }
  return sizes;
}

const BasePair& RandomBases::of_rank(int64_t rank) {
  const auto it = pairs_.find(rank);
  if (it != pairs_.end()) return it->second;
  const at::NoGradGuard no_grad;
  return pairs_.emplace(rank, draw_(rank)).first->second;
}

std::vector<nn::Adapter::FileTensor> RandomBases::file_tensors(const std::string& prefix) const {
  std::vector<nn::Adapter::FileTensor> tensors;
  for (const auto& [rank, pair] : pairs_) {
    const std::string suffix = rank == rank_ ? "" : concat(".rank_", rank);
    tensors.push_back({prefix + "A" + suffix, pair.A});
    tensors.push_back({prefix + "B" + suffix, pair.B});
  }
  return tensors;
}

BasePair draw_vera_bases(const BaseSizes& sizes, int64_t rank, int64_t key) {
  check_size("vera", static_cast<double>(rank) * static_cast<double>(sizes.in + sizes.out), rank);
  const auto generator = at::detail::createCPUGenerator(static_cast<uint64_t>(key));
  const auto draw = [&](int64_t rows, int64_t columns) {
    // Step by step as PEFT computes it: another order of roundings may give another last bit.
    const double deviation = std::sqrt(2.0) / std::sqrt(static_cast<double>(columns));
    const double bound = std::sqrt(3.0) * deviation;
    return uniform({rows, columns}, at::kFloat, -bound, bound, generator);
  };
  const at::Tensor A = draw(rank, sizes.in);
  return on_device(sizes, A, draw(sizes.out, rank));
}

BasePair draw_randlora_bases(const BaseSizes& sizes, int64_t rank, int64_t key,
                             RandLoraBases kind) {
  const int64_t longer = std::max(sizes.out, sizes.in), shorter = std::min(sizes.out, sizes.in);
  const int64_t bases = (shorter + rank - 1) / rank;
  check_size("randlora", static_cast<double>(longer) * static_cast<double>(bases * rank), rank);
  const auto generator = at::detail::createCPUGenerator(static_cast<uint64_t>(key));
  at::Tensor A, B;
  if (kind == RandLoraBases::dense) {
    const auto draw = [&](int64_t rows, int64_t columns) {
      const double gain = std::sqrt(2.0 / 6.0);  // of a leaky rectifier with slope sqrt(5)
      const double deviation = gain / std::sqrt(static_cast<double>(columns));
      const double bound = std::sqrt(3.0) * deviation;
      return uniform({rows, 1, columns}, at::kBFloat16, -bound, bound, generator);
    };
    A = draw(rank, shorter);
    std::vector<at::Tensor> pieces;
    for (int64_t i = 0; i < bases; ++i) pieces.push_back(draw(longer, rank));
    B = at::cat(pieces, 1);
  } else {
    const double k = kind == RandLoraBases::sparse ? 3.0 : std::sqrt(static_cast<double>(shorter));
    A = uniform({rank, 1, shorter}, at::kFloat, 0.0, 1.0, generator);
    B = uniform({longer, bases, rank}, at::kFloat, 0.0, 1.0, generator);
    A = signs(A, 1.0 / (2.0 * k));
    B = signs(B, 1.0 / (2.0 * k));
  }
  const auto spread = [&](const at::Tensor& basis) {
    const at::Tensor deviation = basis.numel() > 1 ? basis.std() : at::zeros({});
    GRAFT_CHECK(deviation.item<double>() > 0, "randlora",
                "the drawn bases must not be constant; got rank=", rank, " for ", longer, " by ",
                shorter, " with projection_prng_key=", key);
    return deviation;
  };
  return on_device(sizes, A / spread(A), B / spread(B));
}

}  // namespace graft::adapters
