// Gradient checks: against central differences in float64, and against autograd of a plain formula.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <vector>

#include "tests/support/testing.h"

namespace graft::testing {

using Tensors = std::vector<at::Tensor>;
using Function = std::function<at::Tensor(const Tensors&)>;

// Leaves with the same values, which require a gradient.
inline Tensors leaves_of(const Tensors& inputs) {
  Tensors leaves;
  for (const at::Tensor& input : inputs) {
    leaves.push_back(input.detach().clone().set_requires_grad(true));
  }
  return leaves;
}

// d sum(f(inputs) * seed) / d inputs, by autograd.
inline Tensors gradients(const Function& f, const Tensors& inputs, const at::Tensor& seed = {}) {
  const Tensors leaves = leaves_of(inputs);
  const at::Tensor y = f(leaves);
  y.backward(seed.defined() ? seed : at::ones_like(y));
  Tensors result;
  for (const at::Tensor& leaf : leaves) result.push_back(leaf.grad());
  return result;
}

inline double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  REQUIRE(a.defined());
  REQUIRE(b.defined());
  REQUIRE(a.sizes() == b.sizes());
  if (a.numel() == 0) return 0.0;
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

// A fixed, uneven seed for backward, so that no symmetry hides an error.
inline at::Tensor seed_like(const at::Tensor& y) {
  return at::cos(at::arange(y.numel(), at::kDouble) * 1.7 + 0.3)
      .view(y.sizes())
      .to(y.scalar_type());
}

// Compares autograd's gradients of f with central differences. inputs: float64.
inline void check_differences(const Function& f, const Tensors& inputs, double tolerance = 1e-7) {
  const at::Tensor seed = seed_like(f(inputs));
  const Tensors found = gradients(f, inputs, seed);
  constexpr double kStep = 1e-5;
  for (size_t which = 0; which < inputs.size(); ++which) {
    for (int64_t i = 0; i < inputs[which].numel(); ++i) {
      Tensors moved;
      for (const at::Tensor& input : inputs) moved.push_back(input.contiguous().clone());
      double& element = moved[which].mutable_data_ptr<double>()[i];
      const double value = element;
      element = value + kStep;
      const double above = (f(moved) * seed).sum().item<double>();
      element = value - kStep;
      const double below = (f(moved) * seed).sum().item<double>();
      const double expected = (above - below) / (2 * kStep);
      const double got = found[which].contiguous().view(-1)[i].item<double>();
      INFO("input " << which << ", element " << i << ": " << got << " for " << expected);
      REQUIRE(std::abs(got - expected) < tolerance * (1 + std::abs(expected)));
    }
  }
}

// Compares value and gradients of f with the plain formula's.
inline void check_against(const Function& f, const Function& plain, const Tensors& inputs,
                          double tolerance) {
  const at::Tensor value = f(inputs), expected = plain(inputs);
  REQUIRE(largest_difference(value, expected) < tolerance);
  const at::Tensor seed = seed_like(value);
  const Tensors found = gradients(f, inputs, seed), wanted = gradients(plain, inputs, seed);
  for (size_t i = 0; i < found.size(); ++i) {
    INFO("gradient of input " << i);
    CHECK(largest_difference(found[i], wanted[i]) < tolerance);
  }
}

// Runs f with one thread and with several; every tensor must come out with the same bits.
inline void check_threads(const std::function<Tensors()>& f) {
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const Tensors one = f();
  for (const int threads : {2, 3}) {
    at::set_num_threads(threads);
    const Tensors several = f();
    REQUIRE(one.size() == several.size());
    for (size_t i = 0; i < one.size(); ++i) {
      INFO("tensor " << i << ", " << threads << " threads");
      CHECK(at::equal(one[i], several[i]));
    }
  }
  at::set_num_threads(before);
}

// The message of the graft::Error that a differentiable gradient of y gives.
inline std::string double_backward_error(const at::Tensor& y, const at::Tensor& leaf) {
  return error_of([&] {
    torch::autograd::grad({y.sum()}, {leaf}, {}, /*retain_graph=*/true, /*create_graph=*/true);
  });
}

}  // namespace graft::testing
