// The fused operations of a decoder, each against its definition in fp64 (include/graft/ops).
#include <functional>

#include "lora_reference.h"

namespace {
using namespace graft::cuda;
using namespace graft::cuda::testing;

// Two rounded results of fp32 arithmetic; fp32 itself loses a few units to expf and to sums.
template <class T>
constexpr double allowed() {
  return std::is_same_v<T, float> ? 1e-6 : 2 * tolerance<T>();
}

template <class T>
void check_rms_norm(int64_t rows, int64_t columns) {
  CAPTURE(rows, columns);
  const Matrix<T> x(rows, columns, 1), w(1, columns, 2), dy(rows, columns, 3);
  const Matrix<float> before(1, columns, 4);
  DeviceArray<T> x_device(x.stored), w_device(w.stored), dy_device(dy.stored);
  DeviceArray<float> reciprocal(static_cast<size_t>(rows));
  const RmsNorm args = {.type = element_type<T>(),
                        .x = x_device.data(),
                        .weight = w_device.data(),
                        .rows = rows,
                        .columns = columns,
                        .eps = 0.5f,
                        .reciprocal = reciprocal.data()};
  const std::vector<T> y = in_every_order([&] {
    DeviceArray<T> out(x.stored.size());
    REQUIRE(launch_rms_norm_forward(args, out.data(), nullptr) == cudaSuccess);
    return out.get();
  });
  const std::vector<T> dx = in_every_order([&] {
    DeviceArray<T> out(dy.stored);  // in place
    REQUIRE(launch_rms_norm_backward(args, out.data(), out.data(), nullptr) == cudaSuccess);
    return out.get();
  });
  const auto run_weight = [&](bool accumulate) {
    return in_every_order([&] {
      DeviceArray<float> out(before.stored.size()), workspace(rms_norm_workspace(rows, columns));
      if (accumulate) out.put(before.stored);
      REQUIRE(launch_rms_norm_weight_backward(args, dy_device.data(), out.data(), accumulate,
                                              workspace.data(), nullptr) == cudaSuccess);
      return out.get();
    });
  };
  Dense wanted_y(rows, columns), wanted_dx(rows, columns);
  Doubles dw(static_cast<size_t>(columns));
  for (int64_t t = 0; t < rows; ++t) {
    double square = 0, along = 0;
    for (int64_t j = 0; j < columns; ++j) square += x(t, j) * x(t, j);
    const double r = 1 / std::sqrt(square / static_cast<double>(columns) + 0.5f);
    for (int64_t j = 0; j < columns; ++j)
      along += w(0, j) * dy(t, j) * x(t, j) / static_cast<double>(columns);
    for (int64_t j = 0; j < columns; ++j) {
      wanted_y(t, j) = x(t, j) * r * w(0, j);
      wanted_dx(t, j) = r * (w(0, j) * dy(t, j) - x(t, j) * r * r * along);
      dw[static_cast<size_t>(j)] += dy(t, j) * x(t, j) * r;
    }
  }
  CHECK(relative_error(doubles(y), wanted_y.v) < allowed<T>());
  CHECK(relative_error(doubles(dx), wanted_dx.v) < allowed<T>());
  CHECK(relative_error(doubles(run_weight(false)), dw) < allowed<T>());
  for (size_t j = 0; j < dw.size(); ++j) dw[j] += before.exact[j];
  CHECK(relative_error(doubles(run_weight(true)), dw) < allowed<T>());
}

// gate and up as the halves of one matrix with `gap` unused columns between.
template <class T>
void check_swiglu(int64_t rows, int64_t columns, int64_t gap) {
  CAPTURE(rows, columns, gap);
  const int64_t pitch = 2 * columns + gap;
  const Matrix<T> both(rows, pitch, 1, 3.0), dy(rows, columns, 2);
  DeviceArray<T> both_device(both.stored), dy_device(dy.stored);
  const auto args_for = [&](DeviceArray<T>& inputs) {
    return Swiglu{element_type<T>(), inputs.data(), inputs.data() + columns + gap, rows,
                  columns,           pitch};
  };
  const std::vector<T> y = in_every_order([&] {
    DeviceArray<T> out(dy.stored.size());
    REQUIRE(launch_swiglu_forward(args_for(both_device), out.data(), nullptr) == cudaSuccess);
    return out.get();
  });
  const std::vector<T> gradients = in_every_order([&] {
    DeviceArray<T> out(both.stored);  // in place
    const Swiglu args = args_for(out);
    REQUIRE(launch_swiglu_backward(args, dy_device.data(), out.data(), out.data() + columns + gap,
                                   nullptr) == cudaSuccess);
    return out.get();
  });
  Dense wanted_y(rows, columns), wanted(both);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t j = 0; j < columns; ++j) {
      const double g = both(t, j), u = both(t, columns + gap + j), s = 1 / (1 + std::exp(-g));
      wanted_y(t, j) = g * s * u;
      wanted(t, j) = dy(t, j) * u * (s + g * s * (1 - s));
      wanted(t, columns + gap + j) = dy(t, j) * g * s;
    }
  }
  CHECK(relative_error(doubles(y), wanted_y.v) < allowed<T>());
  CHECK(relative_error(doubles(gradients), wanted.v) < allowed<T>());
}

template <class T>
void check_rope(int64_t batch, int64_t tokens, int64_t heads, int64_t size, bool by_batch,
                int64_t gap) {
  CAPTURE(batch, tokens, heads, size, by_batch, gap);
  const int64_t half = size / 2, token_step = heads * size + gap, batch_step = tokens * token_step;
  const Matrix<T> x(batch * tokens, token_step, 1), dy(batch * heads * tokens, size, 2);
  Matrix<float> cos((by_batch ? batch : 1) * tokens, half, 3), sin(cos.rows, half, 4);
  DeviceArray<T> x_device(x.stored), dy_device(dy.stored);
  DeviceArray<float> cos_device(cos.stored), sin_device(sin.stored);
  const Rope args = {element_type<T>(), batch,   tokens, heads, size, cos_device.data(),
                     sin_device.data(), by_batch};
  const std::vector<T> y = in_every_order([&] {
    DeviceArray<T> out(dy.stored.size());
    REQUIRE(launch_rope_forward(args, x_device.data(), batch_step, token_step, out.data(),
                                nullptr) == cudaSuccess);
    return out.get();
  });
  const std::vector<T> dx = in_every_order([&] {
    DeviceArray<T> out(dy.stored.size());
    REQUIRE(launch_rope_backward(args, dy_device.data(), out.data(), nullptr) == cudaSuccess);
    return out.get();
  });
  Dense wanted_y(batch * heads * tokens, size), wanted_dx(batch * tokens * heads, size);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t in_attention = (b * heads + h) * tokens + t, in_x = b * tokens + t,
                      in_dx = in_x * heads + h;
        for (int64_t i = 0; i < half; ++i) {
          const double c = cos(by_batch ? in_x : t, i), s = sin(by_batch ? in_x : t, i);
          const double low = x(in_x, h * size + i), high = x(in_x, h * size + half + i);
          wanted_y(in_attention, i) = low * c - high * s;
          wanted_y(in_attention, half + i) = high * c + low * s;
          wanted_dx(in_dx, i) = dy(in_attention, i) * c + dy(in_attention, half + i) * s;
          wanted_dx(in_dx, half + i) = dy(in_attention, half + i) * c - dy(in_attention, i) * s;
        }
      }
    }
  }
  CHECK(relative_error(doubles(y), wanted_y.v) < tolerance<T>());
  CHECK(relative_error(doubles(dx), wanted_dx.v) < tolerance<T>());
}
}  // namespace

TEST_CASE("RMS normalisation agrees with fp64", "[decoder]") {
  for (const int64_t columns : {1, 7, 64, 576, 2100}) {
    check_rms_norm<bf16>(3, columns);
    check_rms_norm<float>(2, columns);
  }
  check_rms_norm<fp16>(70, 24);
  check_rms_norm<float>(0, 24);
}

TEST_CASE("SwiGLU agrees with fp64", "[decoder]") {
  for (const int64_t columns : {1, 8, 37, 72}) {
    check_swiglu<bf16>(5, columns, 0);
    check_swiglu<fp16>(3, columns, 8);
    check_swiglu<float>(3, columns, 3);
  }
  check_swiglu<bf16>(0, 8, 0);
  check_swiglu<bf16>(4, 0, 0);
}

TEST_CASE("RoPE agrees with fp64", "[decoder]") {
  check_rope<bf16>(2, 5, 3, 16, false, 0);
  check_rope<bf16>(2, 3, 2, 64, true, 8);
  check_rope<fp16>(1, 4, 2, 10, false, 3);
  check_rope<float>(3, 2, 1, 2, true, 0);
  check_rope<float>(2, 0, 3, 16, false, 0);
  Rope odd = {ElementType::bf16, 1, 1, 1, 7, nullptr, nullptr};
  CHECK(launch_rope_backward(odd, nullptr, nullptr, nullptr) == cudaErrorInvalidValue);
}
