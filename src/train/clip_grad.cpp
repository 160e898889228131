#include "../ops/cuda_dispatch.h"
#include "../ops/tensor_rows.h"
#include "../ops/vector_math.h"

#include <graft/core/simd.h>
#include <graft/train/clip_grad.h>

#include <cmath>
#include <vector>

namespace graft::train {
namespace {

constexpr const char* kArea = "clip_grad";
constexpr int64_t kBlock = 16384;  // elements whose squares are summed on their own

template <class T>
GRAFT_INLINE double squares_body(const T* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const double value = ops::load(x[i]);
    sum += value * value;
  }
  return sum;
}

GRAFT_SIMD double squares(const float* x, int64_t n) {
  return squares_body(x, n);
}
GRAFT_SIMD double squares(const double* x, int64_t n) {
  return squares_body(x, n);
}
GRAFT_SIMD double squares(const at::BFloat16* x, int64_t n) {
  return squares_body(x, n);
}
GRAFT_SIMD double squares(const at::Half* x, int64_t n) {
  return squares_body(x, n);
}

// A piece of a gradient.
struct Block {
  const at::Tensor* gradient;
  int64_t begin, count;
};

double squares_of(const Block& block) {
  double sum = 0;
  ops::dispatch_float(block.gradient->scalar_type(), [&](auto type) {
    sum = squares(block.gradient->const_data_ptr<decltype(type)>() + block.begin, block.count);
  });
  return sum;
}

double norm_on_device(const std::vector<at::Tensor>& gradients) {
  int64_t numbers = 0;
  bool one_type = true;
  for (const at::Tensor& g : gradients) {
    ops::check_one_device(kArea, {gradients.front(), g});
    numbers += g.numel();
    one_type = one_type && g.scalar_type() == gradients.front().scalar_type();
  }
  const auto* kernels = ops::kernels_for({.op = ops::DeviceOp::grad_norm,
                                          .type = gradients.front().scalar_type(),
                                          .rows = numbers,
                                          .one_type = one_type},
                                         gradients.front().device());
  if (kernels != nullptr) return kernels->grad_norm(gradients).item<double>();
  at::Tensor total = at::zeros({}, gradients.front().options().dtype(at::kDouble));
  for (const at::Tensor& g : gradients) total.add_(g.to(at::kDouble).square().sum());
  return total.sqrt().item<double>();
}

}  // namespace

double grad_norm(const std::vector<at::Tensor>& parameters) {
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& parameter : parameters) {
    if (!parameter.defined() || !parameter.grad().defined()) continue;
    ops::check_float(parameter.grad(), kArea, "a gradient");
    // The order of elements does not matter to the sum, as long as it is always the same.
    gradients.push_back(parameter.grad().is_non_overlapping_and_dense()
                            ? parameter.grad()
                            : parameter.grad().contiguous());
  }
  if (!gradients.empty() && ops::on_device(gradients.front())) return norm_on_device(gradients);
  std::vector<Block> blocks;
  for (const at::Tensor& gradient : gradients) {
    for (int64_t begin = 0; begin < gradient.numel(); begin += kBlock) {
      blocks.push_back({&gradient, begin, std::min(kBlock, gradient.numel() - begin)});
    }
  }
  std::vector<double> sums(blocks.size());
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = squares_of(blocks[i]);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total);
}

double clip_scale(double norm, double max_norm) {
  GRAFT_CHECK(std::isfinite(norm) && norm >= 0.0, kArea, "the norm must be finite; got ", norm);
  GRAFT_CHECK(max_norm > 0.0, kArea, "max_norm must be > 0; got ", max_norm);
  return std::min(1.0, max_norm / (norm + 1e-6));
}

}  // namespace graft::train
