// What the tests of mixtures on linear layers share.
#pragma once

#include <ATen/ATen.h>
#include <graft/attach/attach.h>
#include <graft/moe/adamole.h>
#include <graft/moe/loramoe.h>
#include <graft/moe/mola.h>

#include <nlohmann/json.hpp>

#include "tests/io/file_helpers.h"
#include "tests/support/method_tests.h"

namespace graft::testing {

/// Some tokens for some_linear(): [2, 5, 4].
inline at::Tensor some_input() {
  at::manual_seed(8);
  return random({2, 5, 4});
}

/// Small mixtures of four experts of rank 2.
inline const moe::MolaOptions kMola{.rank = 2, .alpha = 3.0, .experts = {4}, .top_k = 2};
inline const moe::LoraMoeOptions kLoraMoe{.rank = 2, .alpha = 3.0, .experts = 4};
inline const moe::AdaMoleOptions kAdaMole{.rank = 2, .alpha = 3.0, .experts = 4};

/// Calls f(options) for each method.
template <class F>
void for_each_method(const F& f) {
  f(kMola);
  f(kLoraMoe);
  f(kAdaMole);
}

template <class Options>
using MethodOf = typename Options::Method;

/// Row e of g as a column for each token, times what expert e adds: W x + b + sum_e g_e s B_e A_e
/// x.
template <class Method>
at::Tensor sum_over_experts(const Method& method, const nn::FrozenLinear& base, const at::Tensor& x,
                            const at::Tensor& gates) {
  at::Tensor y = at::linear(x, base.weight, base.bias);
  const at::Tensor by_token = gates.view([&] {
    auto shape = x.sizes().vec();
    shape.back() = gates.size(1);
    return shape;
  }());
  for (int64_t e = 0; e < method.experts.count(); ++e) {
    const adapters::PlainLora lora = method.extract_expert(e);
    y = y + by_token.narrow(-1, e, 1) * at::linear(at::linear(x, lora.A), lora.B) * lora.scale;
  }
  return y;
}

/// The recipe with another rank, for the kit.
template <class Options>
std::shared_ptr<const adapters::Recipe> recipe_of_rank(Options options, int64_t rank) {
  options.rank = rank;
  return adapters::make_recipe(options);
}

/// The same experts in another order, and the router's rows with them.
template <class Method>
void permute_experts(Method& method, const std::vector<int64_t>& order) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> A, B;
  for (const int64_t e : order) {
    const auto [one_A, one_B] = method.experts.expert(e);
    A.push_back(one_A);
    B.push_back(one_B);
  }
  method.experts.A.copy_(at::cat(A, 0));
  method.experts.B.copy_(at::cat(B, 1));
  method.router->weight.copy_(method.router->weight.index_select(0, at::tensor(order, at::kLong)));
}

/// Saves the adapter with other values, and reads the folder onto another model: same output, bit
/// for bit, same options.
inline void check_reads_back(GraftDecoder& model, AttachedAdapter& adapter,
                             const std::filesystem::path& folder) {
  randomise(adapter.parameters());
  model.eval();
  const at::Tensor expected = model.forward(some_tokens());
  adapter.save(folder);
  GraftDecoder other;
  auto read = attach_from(other, folder);
  other.eval();
  CHECK(at::equal(other.forward(some_tokens()), expected));
  nlohmann::json before, after;
  adapter.recipe().write_config(before);
  read.recipe().write_config(after);
  CHECK(before == after);
  CHECK(read.recipe().describe() == adapter.recipe().describe());
}

}  // namespace graft::testing
