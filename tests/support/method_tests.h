// What the tests of single methods share: a small layer in fp64 and an adapter with random values.
#pragma once

#include <ATen/ATen.h>
#include <graft/nn/frozen_layer.h>

#include "tests/support/gradcheck.h"
#include "tests/support/tiny_models.h"

namespace graft::testing {

/// N(0, 1) in fp64.
inline at::Tensor random(at::IntArrayRef shape) {
  return at::randn(shape, at::kDouble);
}

/// A layer with a bias, always the same one.
inline nn::FrozenLinear some_linear(int64_t out = 6, int64_t in = 4) {
  at::manual_seed(1);
  return {random({out, in}), random({out})};
}

/// The method on a layer called "q_proj", its parameters filled with random values.
template <class Method, class Options>
Method make_random(const nn::FrozenLayer& base, const Options& options,
                   const std::string& name = "q_proj") {
  Method method(base, options, {name, 1});
  randomise(method.parameters());
  return method;
}

}  // namespace graft::testing
