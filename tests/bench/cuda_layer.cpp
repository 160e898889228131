// Times a LoRA layer's forward and backward pass against the frozen layer's two products, bf16,
// without and with dropout, and layers of one input by themselves and together. One JSON line a
// shape. Without a device: one line, exit code 77.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <cuda_runtime_api.h>
#include <graft/ops/frozen_product.h>
#include <graft/ops/lora_group.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <iostream>
#include <vector>

#include "examples/trainer/device.h"

namespace {

using namespace graft;

// The median of a few runs, in microseconds; each run is long enough for the clock.
double microseconds(const std::function<void()>& work) {
  constexpr int kRuns = 9, kCalls = 10;
  for (int i = 0; i < 3; ++i) work();
  std::vector<double> times;
  for (int run = 0; run < kRuns; ++run) {
    cudaDeviceSynchronize();
    const auto start = std::chrono::steady_clock::now();
    for (int call = 0; call < kCalls; ++call) work();
    cudaDeviceSynchronize();
    const std::chrono::duration<double, std::micro> taken =
        std::chrono::steady_clock::now() - start;
    times.push_back(taken.count() / kCalls);
  }
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

struct Shape {
  int64_t tokens, in, out, rank;
};

void time_shape(const Shape& s, const at::Device& device) {
  const auto options = at::TensorOptions(device).dtype(at::kBFloat16);
  const at::Tensor x = at::randn({s.tokens, s.in}, options).set_requires_grad(true),
                   W = at::randn({s.out, s.in}, options),
                   dy = at::randn({s.tokens, s.out}, options);
  const auto master = options.dtype(at::kFloat);
  const at::Tensor A = at::randn({s.rank, s.in}, master).set_requires_grad(true),
                   B = at::randn({s.out, s.rank}, master).set_requires_grad(true);
  const double base = microseconds([&] {
    const at::NoGradGuard no_grad;
    ops::frozen_product(x, W);
    ops::frozen_product_backward(dy, W);
  });
  const auto layer = [&](double p) {
    return microseconds([&] {
      ops::lora_linear(x, W, {}, {A, B, {}, 2.0, {p, {1, 2, 3}}}).backward(dy);
      for (const at::Tensor* t : {&x, &A, &B}) at::Tensor(*t).mutable_grad() = at::Tensor();
    });
  };
  const double plain = layer(0.0), dropped = layer(0.1);
  std::cout << "{\"tokens\": " << s.tokens << ", \"in\": " << s.in << ", \"out\": " << s.out
            << ", \"rank\": " << s.rank << ", \"base_us\": " << base << ", \"lora_us\": " << plain
            << ", \"lora_dropout_us\": " << dropped << ", \"ratio\": " << plain / base
            << ", \"ratio_dropout\": " << dropped / base << "}" << std::endl;
}

// q, k and v of a model of that width, rank 16, no dropout.
void time_group(int64_t tokens, int64_t in, const std::vector<int64_t>& outs,
                const at::Device& device) {
  constexpr int64_t kRank = 16;
  const auto options = at::TensorOptions(device).dtype(at::kBFloat16);
  at::Tensor x = at::randn({tokens, in}, options).set_requires_grad(true);
  std::vector<at::Tensor> trained = {x}, dy;
  std::vector<ops::LoraLayer> layers;
  for (const int64_t out : outs) {
    for (const auto& shape : {std::vector<int64_t>{kRank, in}, {out, kRank}})
      trained.push_back(at::randn(shape, options.dtype(at::kFloat)).set_requires_grad(true));
    dy.push_back(at::randn({tokens, out}, options));
    layers.push_back({at::randn({out, in}, options),
                      {},
                      {trained[trained.size() - 2], trained.back(), {}, 2.0}});
  }
  const auto time = [&](const auto& forward) {
    return microseconds([&] {
      torch::autograd::backward(forward(), dy);
      for (at::Tensor& t : trained) t.mutable_grad() = at::Tensor();
    });
  };
  const double apart = time([&] {
    std::vector<at::Tensor> outputs;
    for (const auto& layer : layers)
      outputs.push_back(ops::lora_linear(x, layer.weight, layer.bias, layer.term));
    return outputs;
  });
  const double together = time([&] { return ops::lora_linear_group(x, layers); });
  std::cout << "{\"tokens\": " << tokens << ", \"in\": " << in << ", \"layers\": " << outs.size()
            << ", \"rank\": " << kRank << ", \"apart_us\": " << apart
            << ", \"together_us\": " << together << ", \"ratio\": " << together / apart << "}"
            << std::endl;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::cout << "skipped: no CUDA device to time" << std::endl;
    return 77;
  }
  const at::Device device = trainer::open_device("cuda");
  for (const Shape& shape : {Shape{4096, 4096, 4096, 16}, Shape{8192, 4096, 14336, 16},
                             Shape{8192, 14336, 4096, 16}, Shape{16384, 8192, 8192, 16}})
    time_shape(shape, device);
  time_group(8192, 4096, {4096, 1024, 1024}, device);
  return 0;
}
