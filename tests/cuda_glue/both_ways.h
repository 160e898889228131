/// A function of tensors on kernels, and on LibTorch's operators, against the CPU's loops in fp64.
#pragma once

#include <ATen/ATen.h>
#include <graft/ops/device_paths.h>

#include "tests/cuda_glue/device_under_test.h"
#include "tests/ops/gradients.h"

namespace graft::testing {

inline double relative_error(const at::Tensor& got, const at::Tensor& wanted) {
  REQUIRE(got.defined());
  REQUIRE(got.sizes() == wanted.sizes());
  const at::Tensor a = got.cpu().to(at::kDouble), b = wanted.cpu().to(at::kDouble);
  const double length = b.norm().item<double>(), difference = (a - b).norm().item<double>();
  return length == 0 ? difference : difference / length;
}

/// Value and gradients of f, in f's order of inputs.
inline Tensors run(const Function& f, const Tensors& inputs) {
  const Tensors leaves = leaves_of(inputs);
  const at::Tensor y = f(leaves);
  // Of numbers that bf16 has too: the reference must not see another seed.
  const at::Tensor seed = seed_like(y).to(at::kBFloat16).to(y.options());
  y.backward(seed);
  Tensors results = {y.detach()};
  for (const at::Tensor& leaf : leaves) results.push_back(leaf.grad());
  return results;
}

inline Tensors to(const Tensors& inputs, at::ScalarType type) {
  Tensors out;
  for (const at::Tensor& t : inputs) out.push_back(t.to(type));
  return out;
}

inline Tensors to(const Tensors& inputs, const at::Device& device) {
  Tensors out;
  for (const at::Tensor& t : inputs) out.push_back(t.to(device));
  return out;
}

/// f on kernels and on LibTorch's operators against the CPU's fp64. `masters`: from this input on,
/// tensors stay fp32 when the others are bf16.
inline void check_both_ways(const char* op, const Function& f, const Tensors& inputs,
                            size_t masters) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    Tensors stored = to(inputs, type);
    for (size_t i = masters; i < stored.size(); ++i) stored[i] = stored[i].to(at::kFloat);
    const Tensors wanted = run(f, to(stored, at::kDouble));
    for (const bool kernels : {true, false}) {
      INFO(op << ", " << at::toString(type) << (kernels ? ", kernels" : ", LibTorch"));
      ops::reset_device_paths();
      const OnDevice device(kernels);
      const Tensors got = run(f, to(stored, test_device()));
      for (size_t i = 0; i < got.size(); ++i) {
        INFO("result " << i << " (0: the value)");
        CHECK(relative_error(got[i], wanted[i]) < (type == at::kFloat ? 3e-6 : 1.2e-2));
      }
      bool by_kernel = false, by_libtorch = false;
      for (const ops::DevicePath& path : ops::device_paths()) {
        if (path.operation == op) (path.reason.empty() ? by_kernel : by_libtorch) = true;
      }
      CHECK(by_kernel == kernels);
      CHECK(by_libtorch != kernels);
    }
  }
}

}  // namespace graft::testing
