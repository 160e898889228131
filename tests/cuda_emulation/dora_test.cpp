// DoRA's norm and the first step of its backward pass.
#include "lora_reference.h"

namespace {
using namespace graft::cuda;
using namespace graft::cuda::testing;

template <class T>
void check_squares(int64_t rows, int64_t columns) {
  CAPTURE(rows, columns);
  const Matrix<T> W(rows, columns, 1);
  DeviceArray<T> device(W.stored);
  const std::vector<double> got = in_every_order([&] {
    DeviceArray<double> squares(static_cast<size_t>(rows));
    REQUIRE(launch_row_squares(element_type<T>(), device.data(), squares.data(), rows, columns,
                               nullptr) == cudaSuccess);
    return squares.get();
  });
  Doubles wanted(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) wanted[static_cast<size_t>(i)] += W(i, j) * W(i, j);
  CHECK(relative_error(got, wanted) < 1e-14);
}

// The norm for a weight and factors that the caller has made.
template <class T>
void check_norm(const Matrix<T>& W, const Matrix<T>& A, const Matrix<T>& B, double s,
                double allowed) {
  const int64_t rows = W.rows, columns = W.columns;
  const int rank = static_cast<int>(A.rows);
  CAPTURE(rows, columns, rank);
  const auto n = static_cast<size_t>(rows), pitch = static_cast<size_t>(padded_rank(rank));
  DeviceArray<T> W_device(W.stored), A_device(A.stored), B_device(B.stored);
  const Matrix<float> m(1, rows, 9);
  DeviceArray<float> m_device(m.stored);
  std::vector<float> c;
  const std::vector<float> norm = in_every_order([&] {
    DeviceArray<float> P(n * pitch), gram(static_cast<size_t>(rank) * pitch), norm_device(n),
        c_device(n);
    DeviceArray<float> workspace(lora_shrink_workspace(rows, columns, rank));
    DeviceArray<double> squares(n);
    const auto type = element_type<T>();
    REQUIRE(launch_row_squares(type, W_device.data(), squares.data(), rows, columns, nullptr) ==
            cudaSuccess);
    LoraShrink shrink = {.type = type,
                         .x = W_device.data(),
                         .factor = A_device.data(),
                         .rows = rows,
                         .columns = columns,
                         .rank = rank,
                         .out_fp32 = P.data(),
                         .workspace = workspace.data()};
    REQUIRE(launch_lora_shrink(shrink, nullptr) == cudaSuccess);
    shrink.x = A_device.data();
    shrink.rows = rank;
    shrink.out_fp32 = gram.data();
    REQUIRE(launch_lora_shrink(shrink, nullptr) == cudaSuccess);
    REQUIRE(launch_dora_norm({.type = type,
                              .weight = W_device.data(),
                              .squares = squares.data(),
                              .A = A_device.data(),
                              .B = B_device.data(),
                              .product = P.data(),
                              .gram = gram.data(),
                              .magnitude = m_device.data(),
                              .rows = rows,
                              .columns = columns,
                              .rank = rank,
                              .scale = s,
                              .norm = norm_device.data(),
                              .column_scale = c_device.data()},
                             nullptr) == cudaSuccess);
    c = c_device.get();
    return norm_device.get();
  });
  const Dense change = product(B, A, s);
  Doubles wanted(n);
  for (int64_t i = 0; i < rows; ++i) {
    double square = 0;
    for (int64_t j = 0; j < columns; ++j) square += std::pow(W(i, j) + change(i, j), 2);
    wanted[static_cast<size_t>(i)] = std::sqrt(square);
  }
  for (size_t i = 0; i < n; ++i) {
    CHECK(std::abs(norm[i] - wanted[i]) <= allowed * wanted[i]);
    CHECK(c[i] == (norm[i] > 0 ? m.stored[i] / norm[i] : 1.0f));
  }
}
}  // namespace

TEST_CASE("squares of rows", "[dora]") {
  check_squares<bf16>(9, 520);
  check_squares<fp16>(5, 33);
  check_squares<float>(3, 1);
  CHECK(launch_row_squares(ElementType::fp32, nullptr, nullptr, 0, 5, nullptr) == cudaSuccess);
}

TEST_CASE("DoRA's norm agrees with fp64", "[dora]") {
  for (const int rank : {1, 5, 16, 64}) {
    check_norm<bf16>({21, 72, 1}, {rank, 72, 2}, {21, rank, 3}, 0.5, 1e-6);
    check_norm<float>({6, 35, 1}, {rank, 35, 2}, {6, rank, 3}, 0.5, 1e-6);
  }
}

TEST_CASE("rows of DoRA whose terms cancel are summed directly, and a row of zeros has c = 1",
          "[dora]") {
  // W = -s B A up to rounding in the first row: B A of rank 1 with exact products.
  Matrix<float> W(3, 40, 1), A(1, 40, 2), B(3, 1, 3);
  for (size_t j = 0; j < 40; ++j) {
    W.stored[j] = -A.stored[j] * (1.0f + 1e-3f * static_cast<float>(j % 3));
    W.exact[j] = W.stored[j];
    W.stored[40 + j] = 0;
    W.exact[40 + j] = 0;
  }
  B.stored[0] = 2;
  B.exact[0] = 2;
  B.stored[1] = 0;
  B.exact[1] = 0;
  check_norm(W, A, B, 0.5, 1e-6);
}

TEST_CASE("DoRA's backward pass scales dY and sums the magnitude's gradient", "[dora]") {
  for (const int64_t columns : {1, 40, 270}) {
    for (const bool accumulate : {false, true}) {
      CAPTURE(columns, accumulate);
      const int64_t rows = 150;
      const Matrix<bf16> dy(rows, columns, 1), z(rows, columns, 2);
      Matrix<float> c(1, columns, 3), norm(1, columns, 4), before(1, columns, 5);
      for (float& n : norm.stored) n = std::abs(n) + 0.1f;
      norm.stored[0] = 0;
      const auto n = static_cast<size_t>(columns);
      DeviceArray<bf16> dy_device(dy.stored), z_device(z.stored);
      DeviceArray<float> c_device(c.stored), norm_device(norm.stored);
      std::vector<float> dm;
      const std::vector<bf16> dz = in_every_order([&] {
        DeviceArray<bf16> dz_device(dy.stored.size());
        DeviceArray<float> dm_device(n), workspace(dora_backward_workspace(rows, columns));
        if (accumulate) dm_device.put(before.stored);
        REQUIRE(launch_dora_backward({.type = ElementType::bf16,
                                      .dy = dy_device.data(),
                                      .z = z_device.data(),
                                      .column_scale = c_device.data(),
                                      .norm = norm_device.data(),
                                      .rows = rows,
                                      .columns = columns,
                                      .accumulate = accumulate,
                                      .dz = dz_device.data(),
                                      .d_magnitude = dm_device.data(),
                                      .workspace = workspace.data()},
                                     nullptr) == cudaSuccess);
        dm = dm_device.get();
        return dz_device.get();
      });
      Dense wanted_dz(rows, columns);
      Doubles wanted_dm(n);
      for (int64_t j = 0; j < columns; ++j) {
        const auto at = static_cast<size_t>(j);
        double sum = 0;
        for (int64_t i = 0; i < rows; ++i) {
          wanted_dz(i, j) = c.exact[at] * dy(i, j);
          sum += dy(i, j) * z(i, j);
        }
        wanted_dm[at] =
            (norm.stored[at] > 0 ? sum / norm.stored[at] : 0) + (accumulate ? before.exact[at] : 0);
      }
      CHECK(relative_error(doubles(dz), wanted_dz.v) < 4e-3);
      CHECK(relative_error(doubles(dm), wanted_dm) < 2e-6);
    }
  }
}
