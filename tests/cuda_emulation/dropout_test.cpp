// The dropout mask of the kernels is the CPU's, bit for bit.
#include "lora_reference.h"

namespace {
using namespace graft::cuda;
using namespace graft::cuda::testing;

template <class T>
void check_mask(int64_t rows, int64_t columns, double p) {
  CAPTURE(rows, columns, p);
  const Matrix<T> x(rows, columns, 1);
  const DropoutMask mask = mask_of(p);
  DeviceArray<T> in(x.stored);
  const std::vector<T> got = in_every_order([&] {
    DeviceArray<T> out(x.stored.size());
    REQUIRE(launch_dropout(element_type<T>(), in.data(), out.data(), rows, columns, mask,
                           nullptr) == cudaSuccess);
    return out.get();
  });
  std::vector<T> wanted;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      // The CPU multiplies in fp32 and rounds to the stored type (src/ops/dropout_rows.cpp).
      const float factor = static_cast<float>(mask_factor(mask, i, j));
      const float value = static_cast<float>(x(i, j));
      wanted.push_back(from_double<T>(factor == 0 ? 0.0f : factor * value));
    }
  }
  CHECK(bytes_of(got) == bytes_of(wanted));
}
}  // namespace

TEST_CASE("dropout draws the CPU's mask", "[dropout]") {
  for (const double p : {0.0, 0.1, 0.5}) {
    for (const int64_t columns : {1, 7, 8, 40, 100}) {
      check_mask<float>(5, columns, p);
      check_mask<bf16>(5, columns, p);
      check_mask<fp16>(3, columns, p);
    }
  }
}

TEST_CASE("dropout of nothing launches nothing, and p = 1 is refused", "[dropout]") {
  CHECK(launch_dropout(ElementType::fp32, nullptr, nullptr, 0, 8, {}, nullptr) == cudaSuccess);
  CHECK(launch_dropout(ElementType::fp32, nullptr, nullptr, 8, 0, {}, nullptr) == cudaSuccess);
  CHECK(launch_dropout(ElementType::fp32, nullptr, nullptr, -1, 8, {}, nullptr) ==
        cudaErrorInvalidValue);
  CHECK(launch_dropout(ElementType::fp32, nullptr, nullptr, 8, 8, {0, 0, 0, 65536}, nullptr) ==
        cudaErrorInvalidValue);
}
