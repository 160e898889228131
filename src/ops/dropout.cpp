#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <graft/core/error.h>
#include <graft/core/philox.h>
#include <graft/core/simd.h>
#include <graft/ops/dropout.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tensor_rows.h"

namespace graft::ops {
namespace {

constexpr int kBlocks = 16;         // Philox counters worked on side by side, for the vector units
constexpr int kBits = 8 * kBlocks;  // elements they decide

// The 16-bit words of `kBlocks` consecutive counters. The same arithmetic as philox4x32, laid out
// by words instead of by counters; a test holds the two together.
inline void random_bits(uint32_t block, uint32_t row, const random::MaskKey& key, uint32_t* out) {
  uint32_t x[kBlocks], y[kBlocks], z[kBlocks], w[kBlocks];
  for (int i = 0; i < kBlocks; ++i) {
    x[i] = block + static_cast<uint32_t>(i);
    y[i] = row;
    z[i] = key.site;
    w[i] = key.step;
  }
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < kBlocks; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53} * x[i];
      const uint64_t p1 = uint64_t{0xCD9E8D57} * z[i];
      x[i] = static_cast<uint32_t>(p1 >> 32) ^ y[i] ^ k0;
      y[i] = static_cast<uint32_t>(p1);
      z[i] = static_cast<uint32_t>(p0 >> 32) ^ w[i] ^ k1;
      w[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  for (int i = 0; i < kBlocks; ++i) {
    out[4 * i] = x[i];
    out[4 * i + 1] = y[i];
    out[4 * i + 2] = z[i];
    out[4 * i + 3] = w[i];
  }
}

// What one row's functions need besides the data.
struct RowMask {
  random::MaskKey key;
  uint32_t row;
  uint32_t threshold;
  double scale;
};

// target[j] (+)= keep(j) ? scale * x[j] : 0
template <bool Accumulate, typename T>
inline void mask_row(T* target, const T* x, int64_t columns, const RowMask& mask) {
  alignas(64) uint32_t words[kBits / 2];
  alignas(64) uint16_t bits[kBits];
  const T scale = static_cast<T>(mask.scale);
  for (int64_t begin = 0; begin < columns; begin += kBits) {
    random_bits(static_cast<uint32_t>(begin / 8), mask.row, mask.key, words);
    std::memcpy(bits, words, sizeof(bits));  // little endian: low half first
    const int64_t count = std::min<int64_t>(kBits, columns - begin);
    for (int64_t j = 0; j < count; ++j) {
      const T value = bits[j] >= mask.threshold ? scale * x[begin + j] : T{0};
      target[begin + j] = Accumulate ? target[begin + j] + value : value;
    }
  }
}

GRAFT_SIMD void mask_row_f32(float* target, const float* x, int64_t columns, const RowMask& mask) {
  mask_row<false>(target, x, columns, mask);
}
GRAFT_SIMD void mask_row_f64(double* target, const double* x, int64_t columns,
                             const RowMask& mask) {
  mask_row<false>(target, x, columns, mask);
}
GRAFT_SIMD void add_row_f32(float* target, const float* x, int64_t columns, const RowMask& mask) {
  mask_row<true>(target, x, columns, mask);
}
GRAFT_SIMD void add_row_f64(double* target, const double* x, int64_t columns, const RowMask& mask) {
  mask_row<true>(target, x, columns, mask);
}

template <typename T>
void for_rows(at::Tensor& target, const at::Tensor& x, const Dropout& dropout,
              void (*row_function)(T*, const T*, int64_t, const RowMask&)) {
  const int64_t columns = x.dim() == 0 ? 1 : x.size(-1);
  if (x.numel() == 0) return;
  const int64_t rows = x.numel() / columns;
  T* out = target.mutable_data_ptr<T>();
  const T* in = x.const_data_ptr<T>();
  const uint32_t threshold = dropout.threshold();
  const double scale = dropout.scale();
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      row_function(out + row * columns, in + row * columns, columns,
                   {dropout.key, static_cast<uint32_t>(row), threshold, scale});
    }
  });
}

class DropoutFunction : public torch::autograd::Function<DropoutFunction> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const Dropout& dropout) {
    ctx->saved_data["p"] = dropout.p;
    ctx->saved_data["seed"] = static_cast<int64_t>(dropout.key.seed);
    ctx->saved_data["site"] = static_cast<int64_t>(dropout.key.site);
    ctx->saved_data["step"] = static_cast<int64_t>(dropout.key.step);
    return apply_dropout(x, dropout);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    refuse_double_backward("dropout");
    const Dropout dropout{ctx->saved_data["p"].toDouble(),
                          {static_cast<uint64_t>(ctx->saved_data["seed"].toInt()),
                           static_cast<uint32_t>(ctx->saved_data["site"].toInt()),
                           static_cast<uint32_t>(ctx->saved_data["step"].toInt())}};
    return {apply_dropout(grads[0], dropout), at::Tensor()};
  }
};

}  // namespace

uint32_t Dropout::threshold() const {
  return static_cast<uint32_t>(std::lround(65536.0 * p));
}

double Dropout::scale() const {
  return 65536.0 / (65536.0 - threshold());
}

void check_dropout(double p, const char* area, const std::string& place) {
  GRAFT_CHECK(p >= 0.0 && p < 1.0 && std::lround(65536.0 * p) < 65536, area,
              "dropout must be in [0, 1); got ", p, place.empty() ? "" : " (" + place + ")");
}

at::Tensor apply_dropout(const at::Tensor& x, const Dropout& dropout) {
  check_dropout(dropout.p, "dropout");
  if (!dropout.active()) return x;
  GRAFT_CHECK(x.is_cpu(), "dropout", "the input must be on the CPU; got ", x.device().str());
  if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kDouble)
    return apply_dropout(x.to(at::kFloat), dropout).to(x.scalar_type());
  const at::Tensor in = x.contiguous();
  at::Tensor out = at::empty_like(in);
  if (x.scalar_type() == at::kFloat)
    for_rows<float>(out, in, dropout, mask_row_f32);
  else
    for_rows<double>(out, in, dropout, mask_row_f64);
  return out;
}

void add_dropped_(at::Tensor& target, const at::Tensor& x, const Dropout& dropout) {
  GRAFT_CHECK(target.is_contiguous() && x.is_contiguous() && target.sizes() == x.sizes() &&
                  target.scalar_type() == x.scalar_type(),
              "dropout", "target and input must be contiguous and alike; got ", target.sizes(),
              " and ", x.sizes());
  if (x.scalar_type() == at::kFloat)
    for_rows<float>(target, x, dropout, add_row_f32);
  else
    for_rows<double>(target, x, dropout, add_row_f64);
}

at::Tensor dropout(const at::Tensor& x, const Dropout& dropout) {
  check_dropout(dropout.p, "dropout");
  return dropout.active() ? DropoutFunction::apply(x, dropout) : x;
}

}  // namespace graft::ops
