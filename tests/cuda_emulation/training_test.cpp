// The optimiser's step and the loss, against include/graft/train/adamw.h, clip_grad.h and
// include/graft/ops/linear_cross_entropy.h in fp64.
#include <limits>

#include "lora_reference.h"

namespace {
using namespace graft::cuda;
using namespace graft::cuda::testing;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Parameters of several sizes, with their state, on the device.
struct Parameters {
  explicit Parameters(const std::vector<int64_t>& sizes) {
    unsigned seed = 1;
    for (const int64_t size : sizes) {
      for (auto* list : {&p, &g, &m, &v}) list->emplace_back(1, size, seed++);
      for (size_t i = 0; i < v.back().stored.size(); ++i) {
        v.back().stored[i] = std::abs(v.back().stored[i]);
        v.back().exact[i] = v.back().stored[i];
      }
    }
  }
  std::vector<Matrix<float>> p, g, m, v;
};

constexpr float kBeta1 = 0.9f, kBeta2 = 0.99f, kEps = 1e-3f, kRootBias2 = 0.6f;
constexpr AdamwStep kStep = {kBeta1, 1 - kBeta1, kBeta2, 1 - kBeta2, kRootBias2, kEps};

// One step; returns p, m, v and the copies of all tensors, one after the other.
std::vector<float> run_step(const Parameters& all, double max_norm, double& norm) {
  std::vector<std::unique_ptr<DeviceArray<float>>> arrays;
  std::vector<std::unique_ptr<DeviceArray<bf16>>> copies;
  std::vector<OptimizerTensor> tensors;
  const auto on_device = [&](const Matrix<float>& values) {
    arrays.push_back(std::make_unique<DeviceArray<float>>(values.stored));
    return arrays.back()->data();
  };
  for (size_t i = 0; i < all.p.size(); ++i) {
    copies.push_back(std::make_unique<DeviceArray<bf16>>(all.p[i].stored.size()));
    tensors.push_back({.parameter = on_device(all.p[i]),
                       .gradient = on_device(all.g[i]),
                       .mean = on_device(all.m[i]),
                       .square = on_device(all.v[i]),
                       .copy = i == 1 ? nullptr : copies[i]->data(),
                       .size = all.p[i].columns,
                       .keep = 0.99f,
                       .step_size = 0.01f * static_cast<float>(i + 1)});
  }
  const auto count = static_cast<int>(tensors.size());
  const int64_t blocks = number_blocks(tensors.data(), count);
  DeviceArray<OptimizerTensor> table(tensors);
  DeviceArray<double> norm_device(1), workspace(static_cast<size_t>(blocks));
  DeviceArray<float> scale(1);
  REQUIRE(launch_grad_norm(table.data(), count, blocks, max_norm, norm_device.data(), scale.data(),
                           workspace.data(), nullptr) == cudaSuccess);
  REQUIRE(launch_adamw(table.data(), count, blocks, ElementType::bf16, kStep, scale.data(),
                       nullptr) == cudaSuccess);
  norm = norm_device.get()[0];
  std::vector<float> results = scale.get();
  for (size_t i = 0; i < arrays.size(); ++i) {
    const std::vector<float> values = arrays[i]->get();
    if (i % 4 != 1) results.insert(results.end(), values.begin(), values.end());
    const bool changed = results[0] == results[0];
    if (i % 4 == 0 && i / 4 != 1 && changed) {
      for (const bf16 c : copies[i / 4]->get()) results.push_back(static_cast<float>(to_double(c)));
    }
  }
  return results;
}

void check_step(const std::vector<int64_t>& sizes, double max_norm) {
  const Parameters all(sizes);
  double norm = 0;
  const std::vector<float> got = in_every_order([&] { return run_step(all, max_norm, norm); });
  double square = 0;
  for (const auto& g : all.g)
    for (const double v : g.exact) square += v * v;
  CHECK(std::abs(norm - std::sqrt(square)) <= 1e-13 * std::sqrt(square));
  const double scale = std::min(1.0, max_norm / (std::sqrt(square) + 1e-6));
  Doubles wanted = {scale};
  for (size_t i = 0; i < sizes.size(); ++i) {
    Doubles p, m, v;
    for (size_t j = 0; j < all.p[i].exact.size(); ++j) {
      const double g = scale * all.g[i].exact[j];
      m.push_back(kBeta1 * all.m[i].exact[j] + (1 - kBeta1) * g);
      v.push_back(kBeta2 * all.v[i].exact[j] + (1 - kBeta2) * g * g);
      p.push_back(0.99f * all.p[i].exact[j] - 0.01f * static_cast<float>(i + 1) * m.back() /
                                                  (std::sqrt(v.back()) / kRootBias2 + kEps));
    }
    wanted.insert(wanted.end(), p.begin(), p.end());
    if (i != 1) wanted.insert(wanted.end(), p.begin(), p.end());
    wanted.insert(wanted.end(), m.begin(), m.end());
    wanted.insert(wanted.end(), v.begin(), v.end());
  }
  REQUIRE(got.size() == wanted.size());
  size_t at = 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (const char part : {'p', 'c', 'm', 'v'}) {
      if (part == 'c' && i == 1) continue;
      const auto n = static_cast<size_t>(sizes[i]);
      const auto piece = [&](const auto& list) {
        return Doubles(list.begin() + static_cast<std::ptrdiff_t>(at),
                       list.begin() + static_cast<std::ptrdiff_t>(at + n));
      };
      INFO("tensor " << i << ", part " << part);
      CHECK(relative_error(piece(doubles(got)), piece(wanted)) < (part == 'c' ? 4e-3 : 1e-6));
      at += n;
    }
  }
  CHECK(std::abs(got[0] - scale) <= 1e-7 * scale);
}

template <class T>
void check_loss(int64_t rows, int64_t vocabulary, int64_t gap, bool with_gradient) {
  CAPTURE(rows, vocabulary, gap, with_gradient);
  const int64_t pitch = vocabulary + gap;
  const Matrix<T> logits(rows, pitch, 1, 4.0);
  std::vector<int64_t> targets;
  for (int64_t t = 0; t < rows; ++t) targets.push_back(t == 1 ? -100 : t * 7 % vocabulary);
  DeviceArray<int64_t> targets_device(targets);
  std::vector<float> losses, total;
  const std::vector<T> got = in_every_order([&] {
    DeviceArray<T> logits_device(logits.stored);
    DeviceArray<float> losses_device(static_cast<size_t>(rows)), total_device(1);
    REQUIRE(
        launch_softmax_loss({element_type<T>(), logits_device.data(), targets_device.data(), -100,
                             rows, vocabulary, pitch, 0.125f, with_gradient, losses_device.data()},
                            nullptr) == cudaSuccess);
    REQUIRE(launch_loss_sum(losses_device.data(), rows, 0.125, total_device.data(), nullptr) ==
            cudaSuccess);
    losses = losses_device.get();
    total = total_device.get();
    return logits_device.get();
  });
  Dense wanted(logits);
  Doubles wanted_losses;
  double sum = 0;
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t target = targets[static_cast<size_t>(t)];
    double exponentials = 0;
    for (int64_t j = 0; j < vocabulary; ++j) exponentials += std::exp(logits(t, j));
    wanted_losses.push_back(target < 0 ? 0.0 : std::log(exponentials) - logits(t, target));
    sum += wanted_losses.back();
    for (int64_t j = 0; j < vocabulary && with_gradient; ++j)
      wanted(t, j) = target < 0
                         ? 0.0
                         : 0.125 * (std::exp(logits(t, j)) / exponentials - (j == target ? 1 : 0));
  }
  CHECK(relative_error(doubles(losses), wanted_losses) < 1e-6);
  CHECK(std::abs(total[0] - 0.125 * sum) <= 1e-6 * std::abs(0.125 * sum));
  CHECK(relative_error(doubles(got), wanted.v) < tolerance<T>());
}
}  // namespace

TEST_CASE("gradient norm and AdamW over tensors of all sizes", "[training]") {
  check_step({5, 300, 1, 20000}, 1.0);
  check_step({700, 0, 3}, 1e9);  // not clipped
}

TEST_CASE("a gradient that is not finite stops the step", "[training]") {
  Parameters all({40, 8});
  all.g[0].stored[7] = kNan;
  double norm = 0;
  const std::vector<float> got = run_step(all, 1.0, norm);
  CHECK(norm != norm);
  CHECK(got[0] != got[0]);
  CHECK(std::vector<float>(got.begin() + 1, got.begin() + 41) == all.p[0].stored);
  CHECK(std::vector<float>(got.begin() + 41, got.begin() + 81) == all.m[0].stored);
}

TEST_CASE("the optimiser's step over nothing", "[training]") {
  DeviceArray<double> norm(1);
  DeviceArray<float> scale(1);
  REQUIRE(launch_grad_norm(nullptr, 0, 0, 1.0, norm.data(), scale.data(), nullptr, nullptr) ==
          cudaSuccess);
  CHECK(norm.get()[0] == 0);
  CHECK(scale.get()[0] == 1);
  CHECK(launch_adamw(nullptr, 0, 0, ElementType::fp32, kStep, nullptr, nullptr) == cudaSuccess);
}

TEST_CASE("softmax cross entropy agrees with fp64", "[training]") {
  for (const int64_t vocabulary : {1, 9, 64, 2500}) {
    check_loss<float>(3, vocabulary, 16, true);
    check_loss<bf16>(3, vocabulary, 0, true);
  }
  check_loss<fp16>(4, 100, 4, true);
  check_loss<float>(4, 100, 3, false);
}

TEST_CASE("cross entropy of no rows, and of a target out of range", "[training]") {
  DeviceArray<float> logits(std::vector<float>(8, 1.0f)), losses(1);
  DeviceArray<int64_t> targets(std::vector<int64_t>{8});
  SoftmaxLoss args = {ElementType::fp32, logits.data(), targets.data(), -100, 0, 8, 8, 1.0f, true,
                      losses.data()};
  CHECK(launch_softmax_loss(args, nullptr) == cudaSuccess);
  args.rows = 1;
  CHECK(launch_softmax_loss(args, nullptr) == cudaSuccess);
  CHECK(losses.get()[0] != losses.get()[0]);
  CHECK(logits.get()[3] != logits.get()[3]);
}
