// Gradients of modules: autograd's against central differences, by moving the parameters in place.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "tests/support/testing.h"

namespace graft::testing {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

// max |a - b| / max(1, max |b|); fails the test when the shapes differ.
inline double distance(const at::Tensor& a, const at::Tensor& b) {
  REQUIRE(a.defined());
  REQUIRE(b.defined());
  REQUIRE(a.sizes() == b.sizes());
  if (a.numel() == 0) return 0.0;
  const at::Tensor x = a.detach().to(at::kDouble), y = b.detach().to(at::kDouble);
  return (x - y).abs().max().item<double>() / std::max(1.0, y.abs().max().item<double>());
}

// A fixed weight for every output element, uneven, so that no symmetry hides an error.
inline at::Tensor uneven_like(const at::Tensor& y) {
  return at::cos(at::arange(y.numel(), at::kDouble) * 1.7 + 0.3)
      .view(y.sizes())
      .to(y.scalar_type());
}

// sum(y * uneven weights), a loss in which every output element counts.
inline at::Tensor uneven_sum(const at::Tensor& y) {
  return (y * uneven_like(y)).sum();
}

// Autograd's gradients of uneven_sum(f()) for float64 leaves, against central differences.
inline void check_leaf_gradients(const std::function<at::Tensor()>& f, const NamedTensors& leaves,
                                 double tolerance = 1e-6) {
  std::vector<at::Tensor> tensors;
  for (const auto& leaf : leaves) tensors.push_back(leaf.second);
  const auto found = torch::autograd::grad({uneven_sum(f())}, tensors, {}, {}, false,
                                           /*allow_unused=*/false);
  const at::NoGradGuard no_grad;
  constexpr double kStep = 1e-5;
  for (size_t which = 0; which < leaves.size(); ++which) {
    const at::Tensor flat = tensors[which].view(-1), gradient = found[which].reshape(-1);
    for (int64_t i = 0; i < flat.numel(); ++i) {
      at::Tensor element = flat[i];
      const double value = element.item<double>();
      element.fill_(value + kStep);
      const double above = uneven_sum(f()).item<double>();
      element.fill_(value - kStep);
      const double below = uneven_sum(f()).item<double>();
      element.fill_(value);
      const double expected = (above - below) / (2 * kStep), got = gradient[i].item<double>();
      INFO(leaves[which].first << ", element " << i << ": " << got << " for " << expected);
      REQUIRE(std::abs(got - expected) < tolerance * (1 + std::abs(expected)));
    }
  }
}

}  // namespace graft::testing
