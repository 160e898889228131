// The low-rank products, each against its definition in fp64.
#include "lora_reference.h"

namespace {
using namespace graft::cuda;
using namespace graft::cuda::testing;

// Stored factor [rank, columns] or [columns, rank]; `v` as [rank, columns].
template <class T>
struct Factor {
  Factor(int rank, int64_t columns, FactorLayout layout_in, unsigned seed)
      : layout(layout_in),
        stored(layout_in == FactorLayout::rank_by_columns ? Matrix<T>(rank, columns, seed)
                                                          : Matrix<T>(columns, rank, seed)),
        v(layout_in == FactorLayout::rank_by_columns ? Dense(stored) : transpose(stored)) {}
  FactorLayout layout;
  Matrix<T> stored;
  Dense v;
};

constexpr auto kRankByColumns = FactorLayout::rank_by_columns,
               kColumnsByRank = FactorLayout::columns_by_rank;

template <class T>
void check_shrink(int64_t rows, int64_t columns, int rank, double p, FactorLayout layout,
                  bool to_fp32 = false) {
  CAPTURE(rows, columns, rank, p, layout == kRankByColumns, to_fp32);
  const Matrix<T> x(rows, columns, 1);
  const Factor<T> factor(rank, columns, layout, 2);
  DeviceArray<T> x_device(x.stored), factor_device(factor.stored.stored);
  LoraShrink args = {.type = element_type<T>(),
                     .x = x_device.data(),
                     .factor = factor_device.data(),
                     .layout = layout,
                     .rows = rows,
                     .columns = columns,
                     .rank = rank,
                     .scale = 0.75f,
                     .dropout = mask_of(p)};
  const auto run = [&](auto zero) {
    using Out = decltype(zero);
    DeviceArray<Out> out(static_cast<size_t>(rows * padded_rank(rank)));
    DeviceArray<float> workspace(lora_shrink_workspace(rows, columns, rank));
    args.workspace = workspace.data();
    if constexpr (std::is_same_v<Out, T>) args.out = out.data();
    if (to_fp32) args.out_fp32 = reinterpret_cast<float*>(out.data());
    REQUIRE(launch_lora_shrink(args, nullptr) == cudaSuccess);
    return out.get();
  };
  const Dense wanted = padded(product(dropped(x, args.dropout), transpose(factor.v), 0.75), rank);
  if (to_fp32) {
    CHECK(relative_error(doubles(in_every_order([&] { return run(float{}); })), wanted.v) < 2e-6);
  } else {
    CHECK(relative_error(doubles(in_every_order([&] { return run(T{}); })), wanted.v) <
          tolerance<T>());
  }
}

template <class T>
void check_expand(int64_t rows, int64_t columns, int rank, double p, FactorLayout layout,
                  bool in_place) {
  CAPTURE(rows, columns, rank, p, layout == kRankByColumns, in_place);
  const Matrix<T> hidden(rows, rank, 1), base(rows, columns, 3);
  const Factor<T> factor(rank, columns, layout, 2);
  DeviceArray<T> hidden_device(padded(hidden, rank)), factor_device(factor.stored.stored);
  LoraExpand args = {.type = element_type<T>(),
                     .hidden = hidden_device.data(),
                     .factor = factor_device.data(),
                     .layout = layout,
                     .rows = rows,
                     .columns = columns,
                     .rank = rank,
                     .scale = 0.75f,
                     .dropout = mask_of(p),
                     .out = nullptr};
  const std::vector<T> got = in_every_order([&] {
    DeviceArray<T> out(base.stored.size());
    args.out = out.data();
    if (in_place) {
      out.put(base.stored);
      args.base = out.data();
    }
    REQUIRE(launch_lora_expand(args, nullptr) == cudaSuccess);
    return out.get();
  });
  Dense wanted = dropped(product(hidden, factor.v, 0.75), args.dropout);
  if (in_place) {
    for (size_t i = 0; i < wanted.v.size(); ++i) wanted.v[i] += base.exact[i];
  }
  CHECK(relative_error(doubles(got), wanted.v) < tolerance<T>());
}

// dV as the kernels store it, from [rank, columns].
Dense in_layout(const Dense& v, FactorLayout layout) {
  return layout == kRankByColumns ? v : transpose(v);
}

template <class T>
void check_outer(int64_t rows, int64_t columns, int rank, double p, FactorLayout layout,
                 bool accumulate) {
  CAPTURE(rows, columns, rank, p, layout == kRankByColumns, accumulate);
  const Matrix<T> hidden(rows, rank, 1), x(rows, columns, 2);
  const Matrix<float> before(rank, columns, 3);
  DeviceArray<T> hidden_device(padded(hidden, rank)), x_device(x.stored);
  LoraOuter args = {.type = element_type<T>(),
                    .hidden = hidden_device.data(),
                    .x = x_device.data(),
                    .layout = layout,
                    .rows = rows,
                    .columns = columns,
                    .rank = rank,
                    .scale = 0.75f,
                    .dropout = mask_of(p),
                    .accumulate = accumulate,
                    .out = nullptr,
                    .workspace = nullptr};
  const std::vector<float> got = in_every_order([&] {
    DeviceArray<float> out(before.stored.size()),
        workspace(lora_outer_workspace(rows, columns, rank));
    args.out = out.data();
    args.workspace = workspace.data();
    if (accumulate) out.put(before.stored);
    REQUIRE(launch_lora_outer(args, nullptr) == cudaSuccess);
    return out.get();
  });
  Dense wanted = in_layout(product(transpose(hidden), dropped(x, args.dropout), 0.75), layout);
  if (accumulate) {
    for (size_t i = 0; i < wanted.v.size(); ++i) wanted.v[i] += before.exact[i];
  }
  CHECK(relative_error(doubles(got), wanted.v) < 2e-6);
}

template <class T>
void check_backward(int64_t rows, int64_t columns, int rank, bool accumulate) {
  CAPTURE(rows, columns, rank, accumulate);
  const Matrix<T> dy(rows, columns, 1), hidden(rows, rank, 2), B(columns, rank, 3);
  const Matrix<float> before(columns, rank, 4);
  DeviceArray<T> dy_device(dy.stored), hidden_device(padded(hidden, rank)), B_device(B.stored);
  LoraBackward args = {.type = element_type<T>(),
                       .dy = dy_device.data(),
                       .hidden = hidden_device.data(),
                       .B = B_device.data(),
                       .rows = rows,
                       .columns = columns,
                       .rank = rank,
                       .scale = 0.75f,
                       .accumulate = accumulate,
                       .d_hidden = nullptr,
                       .dB = nullptr,
                       .workspace = nullptr};
  std::vector<float> dB;
  const std::vector<T> d_hidden = in_every_order([&] {
    DeviceArray<T> d_hidden_device(static_cast<size_t>(rows * padded_rank(rank)));
    DeviceArray<float> dB_device(before.stored.size());
    DeviceArray<float> workspace(lora_backward_workspace(args.type, rows, columns, rank));
    args.d_hidden = d_hidden_device.data();
    args.dB = dB_device.data();
    args.workspace = workspace.data();
    if (accumulate) dB_device.put(before.stored);
    REQUIRE(launch_lora_backward(args, nullptr) == cudaSuccess);
    const std::vector<float> got = dB_device.get();
    if (!dB.empty()) CHECK(bytes_of(got) == bytes_of(dB));
    dB = got;
    return d_hidden_device.get();
  });
  CHECK(relative_error(doubles(d_hidden), padded(product(dy, B, 0.75), rank).v) < tolerance<T>());
  Dense wanted = product(transpose(dy), hidden, 0.75);
  if (accumulate) {
    for (size_t i = 0; i < wanted.v.size(); ++i) wanted.v[i] += before.exact[i];
  }
  CHECK(relative_error(doubles(dB), wanted.v) < 2e-6);
}
}  // namespace

TEST_CASE("shrink agrees with fp64 for every type, rank and layout", "[lora][shrink]") {
  for (const int rank : {1, 8, 11, 16, 32, 64}) {
    check_shrink<bf16>(21, 72, rank, 0.0, kRankByColumns);
    check_shrink<fp16>(21, 72, rank, 0.2, kColumnsByRank);
  }
  for (const int rank : {3, 16, 64}) check_shrink<float>(17, 72, rank, 0.2, kRankByColumns);
}

TEST_CASE("shrink takes odd sizes", "[lora][shrink]") {
  for (const int64_t columns : {1, 9, 33, 131}) {
    check_shrink<bf16>(1, columns, 5, 0.3, kColumnsByRank);
    check_shrink<float>(67, columns, 8, 0.3, kRankByColumns);
  }
}

TEST_CASE("shrink divides long rows among blocks", "[lora][shrink]") {
  REQUIRE(lora_shrink_workspace(5, 1100, 16) == 3 * 5 * 16);
  check_shrink<bf16>(5, 1100, 16, 0.1, kRankByColumns);
  check_shrink<fp16>(5, 1101, 8, 0.1, kColumnsByRank);
  check_shrink<float>(5, 1100, 16, 0.1, kRankByColumns);
}

TEST_CASE("shrink takes the factor in several chunks", "[lora][shrink]") {
  check_shrink<bf16>(18, 600, 64, 0.1, kRankByColumns);
  check_shrink<fp16>(3, 515, 64, 0.0, kColumnsByRank);
  check_shrink<float>(18, 300, 64, 0.1, kRankByColumns);
}

TEST_CASE("shrink can leave its sums in fp32", "[lora][shrink]") {
  check_shrink<bf16>(19, 64, 16, 0.0, kRankByColumns, true);
  check_shrink<bf16>(3, 1030, 16, 0.0, kRankByColumns, true);
}

TEST_CASE("shrink of nothing", "[lora][shrink]") {
  check_shrink<bf16>(4, 0, 16, 0.0, kRankByColumns);
  check_shrink<bf16>(0, 24, 16, 0.0, kRankByColumns);
  LoraShrink args = {.type = ElementType::bf16,
                     .x = nullptr,
                     .factor = nullptr,
                     .rows = 8,
                     .columns = 8,
                     .rank = 65};
  CHECK(launch_lora_shrink(args, nullptr) == cudaErrorInvalidValue);
  args.rank = 0;
  CHECK(launch_lora_shrink(args, nullptr) == cudaErrorInvalidValue);
}

TEST_CASE("expand agrees with fp64 for every type, rank and layout", "[lora][expand]") {
  for (const int rank : {1, 8, 11, 16, 32, 64}) {
    check_expand<bf16>(21, 72, rank, 0.0, kColumnsByRank, true);
    check_expand<fp16>(21, 72, rank, 0.2, kRankByColumns, false);
  }
  for (const int rank : {3, 16, 64}) check_expand<float>(17, 72, rank, 0.2, kColumnsByRank, true);
}

TEST_CASE("expand takes odd sizes", "[lora][expand]") {
  for (const int64_t columns : {1, 9, 33, 131}) {
    check_expand<bf16>(1, columns, 5, 0.3, kRankByColumns, true);
    check_expand<float>(67, columns, 8, 0.3, kColumnsByRank, true);
  }
}

TEST_CASE("expand of nothing", "[lora][expand]") {
  check_expand<bf16>(4, 0, 16, 0.0, kRankByColumns, false);
  check_expand<bf16>(0, 24, 16, 0.0, kRankByColumns, false);
}

TEST_CASE("outer agrees with fp64 for every type, rank and layout", "[lora][outer]") {
  for (const int rank : {1, 8, 11, 16, 32, 64}) {
    check_outer<bf16>(37, 72, rank, 0.0, kRankByColumns, false);
    check_outer<fp16>(37, 72, rank, 0.2, kColumnsByRank, true);
  }
  for (const int rank : {3, 16, 64}) check_outer<float>(37, 72, rank, 0.2, kRankByColumns, true);
}

TEST_CASE("outer takes odd sizes", "[lora][outer]") {
  for (const int64_t columns : {1, 9, 33, 131}) {
    check_outer<bf16>(1, columns, 5, 0.3, kColumnsByRank, true);
    check_outer<float>(67, columns, 8, 0.3, kRankByColumns, false);
  }
}

TEST_CASE("outer divides many rows among blocks", "[lora][outer]") {
  REQUIRE(lora_outer_workspace(700, 9, 16) == 3 * 16 * 9);
  check_outer<bf16>(700, 9, 16, 0.1, kRankByColumns, true);
  check_outer<fp16>(520, 16, 64, 0.1, kColumnsByRank, false);
  check_outer<float>(700, 8, 16, 0.1, kRankByColumns, false);
}

TEST_CASE("outer of nothing is zero", "[lora][outer]") {
  check_outer<bf16>(0, 24, 16, 0.0, kRankByColumns, false);
  check_outer<bf16>(0, 24, 16, 0.0, kRankByColumns, true);
  check_outer<bf16>(4, 0, 16, 0.0, kRankByColumns, false);
}

TEST_CASE("the backward pass of B and S agrees with fp64", "[lora][backward]") {
  for (const int rank : {1, 8, 11, 16, 32}) {
    check_backward<bf16>(37, 136, rank, false);
    check_backward<fp16>(37, 72, rank, true);
  }
  for (const int rank : {3, 16}) check_backward<float>(37, 72, rank, true);
}

TEST_CASE("the backward pass of B and S takes odd sizes, several blocks and large ranks",
          "[lora][backward]") {
  for (const int64_t columns : {1, 9, 33}) check_backward<bf16>(3, columns, 5, true);
  check_backward<bf16>(20, 1030, 16, false);  // three blocks of columns
  check_backward<fp16>(300, 40, 16, true);    // three ranges of rows
  check_backward<float>(140, 520, 8, false);
  check_backward<bf16>(20, 48, 64, true);  // in two kernels
  check_backward<float>(20, 48, 32, true);
}

TEST_CASE("the backward pass of nothing", "[lora][backward]") {
  check_backward<bf16>(0, 24, 16, true);
  check_backward<bf16>(0, 24, 16, false);
  check_backward<bf16>(5, 0, 16, false);
}
