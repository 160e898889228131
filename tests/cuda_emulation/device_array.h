/// What the tests of kernels share: arrays in device memory, and the same work in every order.
#pragma once

#include "tests/support/testing.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>
// After the standard headers: CUDA's define names that those use otherwise.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels.h"
#include "memory.h"
#include "scheduler.h"

namespace graft::cuda::testing {
using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class T>
constexpr ElementType element_type() {
  if constexpr (std::is_same_v<T, bf16>) return ElementType::bf16;
  if constexpr (std::is_same_v<T, fp16>) return ElementType::fp16;
  return ElementType::fp32;
}

inline double to_double(bf16 v) {
  return __bfloat162float(v);
}
inline double to_double(fp16 v) {
  return __half2float(v);
}
inline double to_double(float v) {
  return v;
}
inline double to_double(double v) {
  return v;
}

template <class T>
T from_double(double v) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16(static_cast<float>(v));
  if constexpr (std::is_same_v<T, fp16>) return __float2half(static_cast<float>(v));
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) return static_cast<T>(v);
}

/// Device memory for `size` elements, unwritten until something is put in.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size)
      : size_(size), data_(static_cast<T*>(emulation::allocate(size * sizeof(T)))) {}
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { put(values); }
  ~DeviceArray() { emulation::release(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  void put(const std::vector<T>& values) {
    emulation::upload(data_, values.data(), values.size() * sizeof(T));
  }
  std::vector<T> get() const {
    std::vector<T> values(size_);
    emulation::download(values.data(), data_, size_ * sizeof(T));
    return values;
  }
  std::vector<double> doubles() const {
    std::vector<double> values;
    for (const T& v : get()) values.push_back(to_double(v));
    return values;
  }
  T* data() { return data_; }

 private:
  size_t size_;
  T* data_;
};

/// A matrix of normal numbers, rounded to T, and the same numbers in double.
template <class T>
struct Matrix {
  Matrix(int64_t rows_in, int64_t columns_in, unsigned seed, double deviation = 1.0)
      : rows(rows_in), columns(columns_in) {
    std::mt19937 bits(seed);
    std::normal_distribution<double> normal(0.0, deviation);
    for (int64_t i = 0; i < rows * columns; ++i) {
      stored.push_back(from_double<T>(normal(bits)));
      exact.push_back(to_double(stored.back()));
    }
  }
  double operator()(int64_t row, int64_t column) const {
    return exact[static_cast<size_t>(row * columns + column)];
  }

  int64_t rows, columns;
  std::vector<T> stored;
  std::vector<double> exact;
};

/// ||got - wanted|| / ||wanted||, NaN if a number is.
inline double relative_error(const std::vector<double>& got, const std::vector<double>& wanted) {
  REQUIRE(got.size() == wanted.size());
  double difference = 0, length = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += (got[i] - wanted[i]) * (got[i] - wanted[i]);
    length += wanted[i] * wanted[i];
  }
  return length == 0 ? std::sqrt(difference) : std::sqrt(difference / length);
}

/// Tolerances: rounding of the stored results, and of 16-bit factors inside sums kept in fp32.
template <class T>
constexpr double tolerance() {
  if constexpr (std::is_same_v<T, bf16>) return 4e-3;
  if constexpr (std::is_same_v<T, fp16>) return 6e-4;
  return 2e-6;
}

template <class T>
std::vector<char> bytes_of(const std::vector<T>& values) {
  std::vector<char> bytes(values.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

/// Runs `work`, which launches kernels and returns their output, in every order of threads and
/// blocks; the bits must not depend on it. Returns the output.
template <class Work>
auto in_every_order(const Work& work) {
  emulation::set_order(0);
  const auto first = work();
  for (int order = 1; order < emulation::kOrders; ++order) {
    emulation::set_order(order);
    INFO("order of execution " << order);
    CHECK(bytes_of(work()) == bytes_of(first));
  }
  emulation::set_order(0);
  return first;
}

template <class T>
std::vector<double> doubles(const std::vector<T>& values) {
  std::vector<double> result;
  for (const T& v : values) result.push_back(to_double(v));
  return result;
}

}  // namespace graft::cuda::testing
