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

// The bytes that each launch with a mask leaves: dropout, shrink, expand, outer.
template <class T>
std::vector<std::vector<char>> masked_results(const DropoutMask& mask) {
  constexpr int64_t kRows = 37, kColumns = 72;
  constexpr int kRank = 8;
  const Matrix<T> x(kRows, kColumns, 1), factor(kRank, kColumns, 2), hidden(kRows, kRank, 3);
  DeviceArray<T> x_device(x.stored), factor_device(factor.stored), hidden_device(hidden.stored);
  const auto result_of = [](size_t size, const auto& launch) {
    DeviceArray<float> out(size);  // large enough for T
    out.put(std::vector<float>(size));
    REQUIRE(launch(out.data()) == cudaSuccess);
    return bytes_of(out.get());
  };
  const auto type = element_type<T>();
  const auto layout = FactorLayout::rank_by_columns;
  return {result_of(kRows * kColumns,
                    [&](void* out) {
                      return launch_dropout(type, x_device.data(), out, kRows, kColumns, mask,
                                            nullptr);
                    }),
          result_of(kRows * kRank,
                    [&](void* out) {
                      DeviceArray<float> space(lora_shrink_workspace(kRows, kColumns, kRank));
                      return launch_lora_shrink({.type = type,
                                                 .x = x_device.data(),
                                                 .factor = factor_device.data(),
                                                 .layout = layout,
                                                 .rows = kRows,
                                                 .columns = kColumns,
                                                 .rank = kRank,
                                                 .dropout = mask,
                                                 .out = out,
                                                 .workspace = space.data()},
                                                nullptr);
                    }),
          result_of(kRows * kColumns,
                    [&](void* out) {
                      return launch_lora_expand({.type = type,
                                                 .hidden = hidden_device.data(),
                                                 .factor = factor_device.data(),
                                                 .layout = layout,
                                                 .rows = kRows,
                                                 .columns = kColumns,
                                                 .rank = kRank,
                                                 .dropout = mask,
                                                 .out = out},
                                                nullptr);
                    }),
          result_of(kRank * kColumns, [&](float* out) {
            DeviceArray<float> space(lora_outer_workspace(kRows, kColumns, kRank));
            return launch_lora_outer({.type = type,
                                      .hidden = hidden_device.data(),
                                      .x = x_device.data(),
                                      .layout = layout,
                                      .rows = kRows,
                                      .columns = kColumns,
                                      .rank = kRank,
                                      .dropout = mask,
                                      .out = out,
                                      .workspace = space.data()},
                                     nullptr);
          })};
}

template <class T>
void check_later() {
  DropoutMask mask = mask_of(0.3);
  DeviceArray<uint32_t> later(std::vector<uint32_t>{5});
  const auto now = masked_results<T>(mask);
  mask.later = later.data();
  const auto repeated = masked_results<T>(mask);
  mask.later = nullptr;
  mask.step += 5;
  const auto wanted = masked_results<T>(mask);
  for (size_t i = 0; i < wanted.size(); ++i) {
    INFO("launch " << i);
    CHECK((repeated[i] == wanted[i]));
    CHECK((repeated[i] != now[i]));
  }
}
}  // namespace

TEST_CASE("a launch that a graph repeats draws the mask of a later step", "[dropout][graph]") {
  check_later<float>();
  check_later<bf16>();
}

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
