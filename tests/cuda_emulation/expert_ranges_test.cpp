// The low-rank products of all experts in one launch, each against its definition in fp64: experts
// without rows, with more rows than a tile or a part of a sum has, rows of nobody, masks by slot.
#include <numeric>

#include "lora_reference.h"

namespace {
using namespace graft::cuda;
using namespace graft::cuda::testing;

constexpr float kScale = 0.75f;

// Experts' rows, then rows of nobody; a row's mask is that of a slot elsewhere.
struct Rows {
  Rows(const std::vector<int>& counts, int nobodys) : offsets{0} {
    for (const int count : counts) offsets.push_back(offsets.back() + count);
    slots.resize(static_cast<size_t>(offsets.back() + nobodys));
    for (size_t i = 0; i < slots.size(); ++i)
      slots[i] = static_cast<int>((i * 7 + 3) % (2 * slots.size() + 1));
  }
  int64_t rows() const { return static_cast<int64_t>(slots.size()); }
  int experts() const { return static_cast<int>(offsets.size()) - 1; }
  // experts(): nobody's.
  int expert_of(int64_t row) const {
    int e = 0;
    while (e < experts() && row >= offsets[static_cast<size_t>(e + 1)]) ++e;
    return e;
  }
  std::vector<int> offsets, slots;
};

template <class T>
class Case {
 public:
  Case(const Rows& rows_in, int64_t columns, int rank, FactorLayout layout)
      : rows_(rows_in),
        columns_(columns),
        rank_(rank),
        layout_(layout),
        x_(rows_.rows(), columns, 1),
        hidden_(rows_.rows(), rank, 2),
        factor_(rows_.experts() * rank, columns, 3),
        offsets_(rows_.offsets),
        slots_(rows_.slots),
        x_device_(x_.stored),
        hidden_device_(padded(hidden_, rank)),
        factor_device_(stored_factors()),
        mask_(mask_of(0.25)) {
    mask_.rows = slots_.data();
  }

  void check_shrink() {
    LoraShrink args = {.type = element_type<T>(),
                       .x = x_device_.data(),
                       .factor = factor_device_.data(),
                       .layout = layout_,
                       .rows = rows_.rows(),
                       .columns = columns_,
                       .rank = rank_,
                       .scale = kScale,
                       .dropout = mask_,
                       .experts = ranges()};
    const auto got = in_every_order([&] {
      DeviceArray<float> out(static_cast<size_t>(rows_.rows() * padded_rank(rank_))),
          workspace(lora_shrink_workspace(rows_.rows(), columns_, rank_));
      args.out_fp32 = out.data();
      args.workspace = workspace.data();
      REQUIRE(launch_lora_shrink(args, nullptr) == cudaSuccess);
      return out.get();
    });
    Dense wanted(rows_.rows(), rank_);
    for_terms([&](int64_t i, int r, int64_t j, double v) {
      wanted(i, r) += kScale * x_(i, j) * factor(i, j) * v;
    });
    CHECK(relative_error(doubles(got), padded(wanted, rank_).v) < 2e-6);
  }

  void check_expand() {
    const Matrix<T> base(rows_.rows(), columns_, 4);
    DeviceArray<T> base_device(base.stored);
    LoraExpand args = {.type = element_type<T>(),
                       .hidden = hidden_device_.data(),
                       .factor = factor_device_.data(),
                       .layout = layout_,
                       .rows = rows_.rows(),
                       .columns = columns_,
                       .rank = rank_,
                       .scale = kScale,
                       .dropout = mask_,
                       .experts = ranges(),
                       .base = base_device.data(),
                       .out = nullptr};
    const auto got = in_every_order([&] {
      DeviceArray<T> out(base.stored.size());
      args.out = out.data();
      REQUIRE(launch_lora_expand(args, nullptr) == cudaSuccess);
      return out.get();
    });
    Dense wanted(base);
    for_terms([&](int64_t i, int r, int64_t j, double v) {
      wanted(i, j) += kScale * hidden_(i, r) * factor(i, j) * v;
    });
    CHECK(relative_error(doubles(got), wanted.v) < tolerance<T>());
  }

  void check_outer() {
    LoraOuter args = {.type = element_type<T>(),
                      .hidden = hidden_device_.data(),
                      .x = x_device_.data(),
                      .layout = layout_,
                      .rows = rows_.rows(),
                      .columns = columns_,
                      .rank = rank_,
                      .scale = kScale,
                      .dropout = mask_,
                      .experts = ranges(),
                      .out = nullptr,
                      .workspace = nullptr};
    const auto got = in_every_order([&] {
      DeviceArray<float> out(factor_.stored.size()),
          workspace(lora_outer_workspace(rows_.rows(), columns_, rank_, rows_.experts()));
      args.out = out.data();
      args.workspace = workspace.data();
      REQUIRE(launch_lora_outer(args, nullptr) == cudaSuccess);
      return out.get();
    });
    Doubles wanted(factor_.stored.size());
    for_terms([&](int64_t i, int r, int64_t j, double) {
      wanted[place(rows_.expert_of(i), r, j)] += kScale * hidden_(i, r) * x_(i, j) * factor(i, j);
    });
    CHECK(relative_error(doubles(got), wanted) < 2e-6);
  }

  ExpertRanges ranges() { return {offsets_.data(), rows_.experts()}; }

 private:
  // Of the mask.
  double factor(int64_t row, int64_t column) const {
    return mask_factor(mask_, rows_.slots[static_cast<size_t>(row)], column);
  }
  // Calls f(row, rank, column, V of the row's expert there).
  template <class F>
  void for_terms(const F& f) const {
    for (int64_t i = 0; i < rows_.offsets.back(); ++i)
      for (int r = 0; r < rank_; ++r)
        for (int64_t j = 0; j < columns_; ++j)
          f(i, r, j, factor_(rows_.expert_of(i) * rank_ + r, j));
  }
  // Of an expert's V[rank][column], as it is stored.
  size_t place(int expert, int r, int64_t j) const {
    const int64_t within =
        layout_ == FactorLayout::rank_by_columns ? r * columns_ + j : j * rank_ + r;
    return static_cast<size_t>(expert * rank_ * columns_ + within);
  }
  std::vector<T> stored_factors() const {
    std::vector<T> stored(factor_.stored.size());
    for (int e = 0; e < rows_.experts(); ++e)
      for (int r = 0; r < rank_; ++r)
        for (int64_t j = 0; j < columns_; ++j)
          stored[place(e, r, j)] =
              factor_.stored[static_cast<size_t>((e * rank_ + r) * columns_ + j)];
    return stored;
  }

  const Rows rows_;
  const int64_t columns_;
  const int rank_;
  const FactorLayout layout_;
  const Matrix<T> x_, hidden_, factor_;
  DeviceArray<int> offsets_, slots_;
  DeviceArray<T> x_device_, hidden_device_, factor_device_;
  DropoutMask mask_;
};

template <class T>
void check(const Rows& rows, int64_t columns, int rank) {
  for (const auto layout : {FactorLayout::rank_by_columns, FactorLayout::columns_by_rank}) {
    CAPTURE(rows.offsets, rows.rows(), columns, rank, layout == FactorLayout::rank_by_columns);
    Case<T> all(rows, columns, rank, layout);
    all.check_shrink();
    all.check_expand();
    all.check_outer();
  }
}
}  // namespace

TEST_CASE("products of all experts in one launch", "[lora][mixture]") {
  check<float>({{3, 0, 70, 64, 1}, 5}, 40, 4);
  check<bf16>({{0, 65, 0, 2}, 0}, 72, 8);
  check<fp16>({{9, 30}, 67}, 35, 5);        // rows that are no whole vectors
  check<bf16>({{20, 0, 11}, 1}, 1100, 3);   // columns in several parts
  check<float>({{7, 300, 530}, 3}, 16, 9);  // rows in several parts
  check<float>({{0, 0}, 4}, 24, 20);
  check<bf16>({{40}, 0}, 64, 64);
}

TEST_CASE("products of experts refuse ranges that make no sense", "[lora][mixture]") {
  Case<float> one({{4, 4}, 0}, 16, 4, FactorLayout::rank_by_columns);
  DeviceArray<float> x(std::vector<float>(128, 1.0f)), out(64);
  LoraShrink args = {.type = ElementType::fp32,
                     .x = x.data(),
                     .factor = x.data(),
                     .rows = 8,
                     .columns = 16,
                     .rank = 4,
                     .out_fp32 = out.data()};
  for (const ExpertRanges& ranges :
       {ExpertRanges{nullptr, 2}, ExpertRanges{one.ranges().offsets, 0},
        ExpertRanges{one.ranges().offsets, 65536}}) {
    args.experts = ranges;
    CHECK(launch_lora_shrink(args, nullptr) == cudaErrorInvalidValue);
  }
}
