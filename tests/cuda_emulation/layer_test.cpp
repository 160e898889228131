// Whole adapted layers from the kernels, forward and backward with dropout, against fp64. The
// frozen product stands in for cuBLASLt: summed exactly, rounded once to the stored type.
#include "lora_reference.h"

namespace {
using namespace graft::cuda;
using namespace graft::cuda::testing;

constexpr auto kRankByColumns = FactorLayout::rank_by_columns,
               kColumnsByRank = FactorLayout::columns_by_rank;

struct Sizes {
  int64_t tokens, inputs, outputs;
  int rank;
};

// One layer's numbers, rounded to T where they are stored as T.
template <class T>
struct Layer {
  explicit Layer(Sizes s)
      : sizes(s),
        x(s.tokens, s.inputs, 1),
        W(s.outputs, s.inputs, 2, 1 / std::sqrt(s.inputs)),
        A(s.rank, s.inputs, 3, 1 / std::sqrt(s.inputs)),
        B(s.outputs, s.rank, 4, 0.3),
        dY(s.tokens, s.outputs, 5),
        bias(1, s.outputs, 6),
        magnitude(1, s.outputs, 7) {
    for (size_t i = 0; i < magnitude.exact.size(); ++i) {
      magnitude.stored[i] = std::abs(magnitude.stored[i]) + 0.5f;
      magnitude.exact[i] = magnitude.stored[i];
    }
  }
  Sizes sizes;
  Matrix<T> x, W, A, B, dY, bias;
  Matrix<float> magnitude;
  double s = 1.5;
  DropoutMask mask = mask_of(0.25);
};

// a b (+ before) as a matrix library leaves it.
template <class T>
std::vector<T> library_product(const Dense& a, const Dense& b, const std::vector<T>& before = {}) {
  const Dense c = product(a, b);
  std::vector<T> stored;
  for (size_t i = 0; i < c.v.size(); ++i)
    stored.push_back(from_double<T>(c.v[i] + (before.empty() ? 0.0 : to_double(before[i]))));
  return stored;
}

template <class T>
Dense dense(const std::vector<T>& values, int64_t rows, int64_t columns) {
  Dense d(rows, columns);
  d.v = doubles(values);
  return d;
}

// What a layer returns: in double, and the bits of everything for the comparison of orders.
struct Results {
  Doubles y, dx, dA, dB, dm;
  Doubles all() const {
    Doubles list;
    for (const Doubles* part : {&y, &dx, &dA, &dB, &dm})
      list.insert(list.end(), part->begin(), part->end());
    return list;
  }
};

template <class T>
struct Workspace {
  explicit Workspace(Sizes s)
      : numbers(std::max({lora_shrink_workspace(s.tokens, s.inputs, s.rank),
                          lora_shrink_workspace(s.outputs, s.inputs, s.rank),
                          lora_outer_workspace(s.tokens, s.inputs, s.rank),
                          lora_backward_workspace(element_type<T>(), s.tokens, s.outputs, s.rank),
                          dora_backward_workspace(s.tokens, s.outputs)})) {}
  DeviceArray<float> numbers;
};

// S = drop(x) A^T
template <class T>
void shrink_input(const Layer<T>& layer, DeviceArray<T>& x, DeviceArray<T>& A, DeviceArray<T>& S,
                  float* workspace) {
  const Sizes n = layer.sizes;
  REQUIRE(launch_lora_shrink({.type = element_type<T>(),
                              .x = x.data(),
                              .factor = A.data(),
                              .rows = n.tokens,
                              .columns = n.inputs,
                              .rank = n.rank,
                              .dropout = layer.mask,
                              .out = S.data(),
                              .workspace = workspace},
                             nullptr) == cudaSuccess);
}

// From dz, the gradient at x W^T + s S B^T: dA, dB and dx.
template <class T>
void lora_backward(const Layer<T>& layer, DeviceArray<T>& x, DeviceArray<T>& A, DeviceArray<T>& B,
                   DeviceArray<T>& S, DeviceArray<T>& dz, float* workspace, Results& results) {
  const Sizes n = layer.sizes;
  const auto s = static_cast<float>(layer.s);
  const auto type = element_type<T>();
  DeviceArray<T> dS(layer.x.stored.size() / static_cast<size_t>(n.inputs) *
                    static_cast<size_t>(padded_rank(n.rank)));
  DeviceArray<float> dA(layer.A.stored.size()), dB(layer.B.stored.size());
  DeviceArray<T> dx(layer.x.stored.size());
  REQUIRE(launch_lora_backward({.type = type,
                                .dy = dz.data(),
                                .hidden = S.data(),
                                .B = B.data(),
                                .rows = n.tokens,
                                .columns = n.outputs,
                                .rank = n.rank,
                                .scale = s,
                                .d_hidden = dS.data(),
                                .dB = dB.data(),
                                .workspace = workspace},
                               nullptr) == cudaSuccess);
  REQUIRE(launch_lora_outer({.type = type,
                             .hidden = dS.data(),
                             .x = x.data(),
                             .layout = kRankByColumns,
                             .rows = n.tokens,
                             .columns = n.inputs,
                             .rank = n.rank,
                             .dropout = layer.mask,
                             .out = dA.data(),
                             .workspace = workspace},
                            nullptr) == cudaSuccess);
  REQUIRE(launch_lora_expand({.type = type,
                              .hidden = dS.data(),
                              .factor = A.data(),
                              .layout = kRankByColumns,
                              .rows = n.tokens,
                              .columns = n.inputs,
                              .rank = n.rank,
                              .dropout = layer.mask,
                              .out = dx.data()},
                             nullptr) == cudaSuccess);
  results.dA = dA.doubles();
  results.dB = dB.doubles();
  results.dx = doubles(library_product<T>(dense(dz.get(), n.tokens, n.outputs), layer.W, dx.get()));
}

template <class T>
Results run_lora(const Layer<T>& layer) {
  const Sizes n = layer.sizes;
  DeviceArray<T> x(layer.x.stored), A(layer.A.stored), B(layer.B.stored), dY(layer.dY.stored);
  DeviceArray<T> S(static_cast<size_t>(n.tokens * padded_rank(n.rank))), y(layer.dY.stored.size());
  Workspace<T> workspace(n);
  Results results;
  shrink_input(layer, x, A, S, workspace.numbers.data());
  REQUIRE(launch_lora_expand({.type = element_type<T>(),
                              .hidden = S.data(),
                              .factor = B.data(),
                              .layout = kColumnsByRank,
                              .rows = n.tokens,
                              .columns = n.outputs,
                              .rank = n.rank,
                              .scale = static_cast<float>(layer.s),
                              .out = y.data()},
                             nullptr) == cudaSuccess);
  results.y = doubles(library_product<T>(layer.x, transpose(layer.W), y.get()));
  lora_backward(layer, x, A, B, S, dY, workspace.numbers.data(), results);
  return results;
}

template <class T>
Results run_dora(const Layer<T>& layer) {
  const Sizes n = layer.sizes;
  const auto type = element_type<T>();
  const auto outputs = static_cast<size_t>(n.outputs),
             pitch = static_cast<size_t>(padded_rank(n.rank));
  DeviceArray<T> x(layer.x.stored), W(layer.W.stored), A(layer.A.stored), B(layer.B.stored),
      dY(layer.dY.stored);
  DeviceArray<T> bias(layer.bias.stored);
  DeviceArray<float> m(layer.magnitude.stored), norm(outputs), c(outputs), dm(outputs);
  DeviceArray<float> P(outputs * pitch), gram(static_cast<size_t>(n.rank) * pitch);
  DeviceArray<double> squares(outputs);
  DeviceArray<T> S(static_cast<size_t>(n.tokens) * pitch), y(layer.dY.stored.size());
  DeviceArray<T> z(library_product<T>(layer.x, transpose(layer.W))), dz(layer.dY.stored.size());
  Workspace<T> workspace(n);
  float* numbers = workspace.numbers.data();
  Results results;

  REQUIRE(launch_row_squares(type, W.data(), squares.data(), n.outputs, n.inputs, nullptr) ==
          cudaSuccess);
  LoraShrink shrink = {.type = type,
                       .x = W.data(),
                       .factor = A.data(),
                       .rows = n.outputs,
                       .columns = n.inputs,
                       .rank = n.rank,
                       .out_fp32 = P.data(),
                       .workspace = numbers};
  REQUIRE(launch_lora_shrink(shrink, nullptr) == cudaSuccess);
  shrink.x = A.data();
  shrink.rows = n.rank;
  shrink.out_fp32 = gram.data();
  REQUIRE(launch_lora_shrink(shrink, nullptr) == cudaSuccess);
  REQUIRE(launch_dora_norm({.type = type,
                            .weight = W.data(),
                            .squares = squares.data(),
                            .A = A.data(),
                            .B = B.data(),
                            .product = P.data(),
                            .gram = gram.data(),
                            .magnitude = m.data(),
                            .rows = n.outputs,
                            .columns = n.inputs,
                            .rank = n.rank,
                            .scale = layer.s,
                            .norm = norm.data(),
                            .column_scale = c.data()},
                           nullptr) == cudaSuccess);
  shrink_input(layer, x, A, S, numbers);
  REQUIRE(launch_lora_expand({.type = type,
                              .hidden = S.data(),
                              .factor = B.data(),
                              .layout = kColumnsByRank,
                              .rows = n.tokens,
                              .columns = n.outputs,
                              .rank = n.rank,
                              .scale = static_cast<float>(layer.s),
                              .base = z.data(),
                              .column_scale = c.data(),
                              .bias = bias.data(),
                              .unscaled = z.data(),
                              .out = y.data()},
                             nullptr) == cudaSuccess);
  results.y = y.doubles();
  REQUIRE(launch_dora_backward({.type = type,
                                .dy = dY.data(),
                                .z = z.data(),
                                .column_scale = c.data(),
                                .norm = norm.data(),
                                .rows = n.tokens,
                                .columns = n.outputs,
                                .dz = dz.data(),
                                .d_magnitude = dm.data(),
                                .workspace = numbers},
                               nullptr) == cudaSuccess);
  results.dm = dm.doubles();
  lora_backward(layer, x, A, B, S, dz, numbers, results);
  return results;
}

// The definitions of lora_linear.h and dora_linear.h (with c and b of DoRA, or without) in fp64.
template <class T>
Results reference(const Layer<T>& layer, bool dora) {
  const Sizes n = layer.sizes;
  const Dense x(layer.x), W(layer.W), A(layer.A), B(layer.B);
  const Dense S = product(dropped(x, layer.mask), transpose(A));
  Dense z = product(x, transpose(W));
  const Dense term = product(S, transpose(B), layer.s), change = product(B, A, layer.s);
  for (size_t i = 0; i < z.v.size(); ++i) z.v[i] += term.v[i];
  Doubles norm(static_cast<size_t>(n.outputs), 1.0), c(norm), m_gradient;
  Dense y = z, dz(layer.dY);
  for (int64_t i = 0; dora && i < n.outputs; ++i) {
    const auto at = static_cast<size_t>(i);
    double square = 0, sum = 0;
    for (int64_t j = 0; j < n.inputs; ++j) square += std::pow(W(i, j) + change(i, j), 2);
    norm[at] = std::sqrt(square);
    c[at] = layer.magnitude.exact[at] / norm[at];
    for (int64_t t = 0; t < n.tokens; ++t) {
      sum += layer.dY(t, i) * z(t, i);
      y(t, i) = layer.bias.exact[at] + c[at] * z(t, i);
      dz(t, i) = c[at] * layer.dY(t, i);
    }
    m_gradient.push_back(sum / norm[at]);
  }
  const Dense dS = product(dz, B, layer.s);
  Dense dx = product(dz, W);
  const Dense through_A = dropped(product(dS, A), layer.mask);
  for (size_t i = 0; i < dx.v.size(); ++i) dx.v[i] += through_A.v[i];
  return {y.v, dx.v, product(transpose(dS), dropped(x, layer.mask)).v,
          product(transpose(dz), S, layer.s).v, m_gradient};
}

template <class T>
void check_layer(Sizes sizes, bool dora) {
  CAPTURE(sizes.tokens, sizes.inputs, sizes.outputs, sizes.rank, dora);
  const Layer<T> layer(sizes);
  Results got;
  in_every_order([&] {
    got = dora ? run_dora(layer) : run_lora(layer);
    return got.all();
  });
  const Results wanted = reference(layer, dora);
  // dA and dB are sums over products of 16-bit numbers that were rounded before.
  const double stored = tolerance<T>(), summed = std::is_same_v<T, float> ? 2e-6 : 4e-3;
  CHECK(relative_error(got.y, wanted.y) < stored);
  CHECK(relative_error(got.dx, wanted.dx) < stored);
  CHECK(relative_error(got.dA, wanted.dA) < summed);
  CHECK(relative_error(got.dB, wanted.dB) < summed);
  CHECK(relative_error(got.dm, wanted.dm) < summed);
}

// d/dh of sum(dY * y) when one of LoRA's matrices moves along `direction`, by a difference in fp64.
template <class T>
double slope(const Layer<T>& layer, Matrix<T> Layer<T>::*which, const Doubles& direction) {
  const auto loss = [&](double h) {
    Layer<T> moved = layer;
    for (size_t i = 0; i < direction.size(); ++i) (moved.*which).exact[i] += h * direction[i];
    const Results results = reference(moved, false);
    double sum = 0;
    for (size_t i = 0; i < results.y.size(); ++i) sum += layer.dY.exact[i] * results.y[i];
    return sum;
  };
  return (loss(1e-4) - loss(-1e-4)) / 2e-4;
}

double dot(const Doubles& a, const Doubles& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}
}  // namespace

TEST_CASE("the reference's gradients are the slopes of its output", "[layer]") {
  const Layer<float> layer({6, 20, 12, 4});
  const Results gradients = reference(layer, false);
  const auto check = [&](Matrix<float> Layer<float>::*which, const Doubles& gradient) {
    const Doubles direction = Matrix<float>(1, static_cast<int64_t>(gradient.size()), 9).exact;
    CHECK(std::abs(slope(layer, which, direction) / dot(gradient, direction) - 1) < 1e-6);
  };
  check(&Layer<float>::x, gradients.dx);
  check(&Layer<float>::A, gradients.dA);
  check(&Layer<float>::B, gradients.dB);
}

TEST_CASE("a LoRA layer, forward and backward, agrees with fp64", "[layer][lora]") {
  check_layer<bf16>({70, 136, 72, 8}, false);
  check_layer<bf16>({33, 61, 35, 5}, false);
  check_layer<fp16>({40, 64, 96, 16}, false);
  check_layer<bf16>({20, 72, 80, 64}, false);
  check_layer<float>({40, 72, 65, 16}, false);
}

TEST_CASE("a DoRA layer, forward and backward, agrees with fp64", "[layer][dora]") {
  check_layer<bf16>({70, 136, 72, 8}, true);
  check_layer<bf16>({33, 61, 35, 5}, true);
  check_layer<fp16>({40, 64, 96, 16}, true);
  check_layer<float>({40, 72, 65, 16}, true);
}
