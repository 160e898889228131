// Layers of one input as one operation, against each layer by itself on the CPU in fp64.
#include <graft/ops/lora_group.h>

#include "tests/cuda_glue/both_ways.h"
#include "tests/support/testing.h"

namespace {

using namespace graft::ops;
using graft::testing::check_both_ways;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::OnDevice;
using graft::testing::relative_error;
using graft::testing::Tensors;
using graft::testing::test_device;

constexpr int64_t kIn = 24, kOut[] = {40, 16, 21};

struct Group {
  std::vector<int64_t> ranks;
  double p = 0;
  Tensors weights, biases;

  Group(std::vector<int64_t> ranks_in, double p_in) : ranks(std::move(ranks_in)), p(p_in) {
    for (size_t i = 0; i < ranks.size(); ++i) {
      // Of numbers that bf16 has too.
      weights.push_back((at::randn({kOut[i], kIn}) * 0.2).to(at::kBFloat16));
      biases.push_back(i == 1 ? at::Tensor() : at::randn({kOut[i]}).to(at::kBFloat16));
    }
  }
  // x, then A and B of each layer.
  Tensors inputs() const {
    Tensors in = {at::randn({2, 35, kIn})};
    for (size_t i = 0; i < ranks.size(); ++i) {
      in.push_back(at::randn({ranks[i], kIn}) * 0.2);
      in.push_back(at::randn({kOut[i], ranks[i]}) * 0.2);
    }
    return in;
  }
  std::vector<at::Tensor> operator()(const Tensors& t) const {
    std::vector<LoraLayer> layers;
    const auto options = t[0].options().requires_grad(false);
    for (size_t i = 0; i < ranks.size(); ++i) {
      const auto number = static_cast<uint32_t>(i);
      layers.push_back({weights[i].to(options),
                        biases[i].defined() ? biases[i].to(options) : at::Tensor(),
                        {t[1 + 2 * i],
                         t[2 + 2 * i],
                         {},
                         0.5 + static_cast<double>(i),
                         Dropout{p, {11, 20 + number, 3}}}});
    }
    return lora_linear_group(t[0], layers);
  }
};

}  // namespace

TEST_CASE("glue: layers of one input, forward and backward", "[cuda][glue][group]") {
  at::manual_seed(1);
  const std::vector<std::vector<int64_t>> ranks = {{4, 4, 4}, {8, 3, 16}, {40, 40, 3}, {8, 8}};
  for (const auto& each : ranks) {
    for (const double p : {0.0, 0.3}) {
      INFO("ranks " << each[0] << " " << each[1] << ", " << each.size() << " layers, p " << p);
      const Group group(each, p);
      const auto f = [&](const Tensors& t) { return at::cat(group(t), 2); };
      check_both_ways("lora_group", f, group.inputs(), 1);
    }
  }
}

TEST_CASE("glue: layers of one input compute wanted gradients alone", "[cuda][glue][group]") {
  at::manual_seed(2);
  const Group group({4, 8}, 0.0);
  const Tensors values = group.inputs();
  for (int wanted = 1; wanted < 32; ++wanted) {
    INFO("wanted " << wanted);
    // Without a gradient for one of the outputs, too.
    for (const int unused : {-1, 0, 1}) {
      const auto results = [&](const at::Device& device) {
        Tensors leaves;
        for (size_t i = 0; i < values.size(); ++i)
          leaves.push_back(values[i].to(device).clone().set_requires_grad((wanted >> i & 1) != 0));
        const auto y = group(leaves);
        at::Tensor sum = at::zeros({}, y[0].options().requires_grad(false));
        for (int i = 0; i < 2; ++i)
          if (i != unused) sum = sum + (y[i] * graft::testing::seed_like(y[i]).to(device)).sum();
        if (sum.requires_grad()) sum.backward();
        Tensors gradients;
        for (const at::Tensor& leaf : leaves) gradients.push_back(leaf.grad());
        return gradients;
      };
      const Tensors on_cpu = results(at::kCPU);
      const OnDevice device;
      const Tensors got = results(test_device());
      for (size_t i = 0; i < got.size(); ++i) {
        INFO("input " << i);
        if ((wanted >> i & 1) == 0) CHECK_FALSE(got[i].defined());
        if (!got[i].defined()) continue;
        // Apart, a layer whose output nobody uses has no gradient; together it has zeros.
        if (on_cpu[i].defined())
          CHECK(relative_error(got[i], on_cpu[i]) < 3e-6);
        else
          CHECK(got[i].abs().max().item<double>() == 0.0);
      }
    }
  }
}

TEST_CASE("glue: a group refuses shapes that do not fit", "[cuda][glue][group]") {
  const OnDevice device;
  const at::Tensor x = at::ones({3, 8}).to(test_device()), W = at::ones({5, 8}).to(test_device()),
                   A = at::ones({2, 8}).to(test_device()), B = at::ones({5, 2}).to(test_device()),
                   narrow = at::ones({2, 7}).to(test_device());
  CHECK(contains(error_of([&] {
                   lora_linear_group(x, {{W, {}, {A, B, {}}}, {W, {}, {narrow, B, {}}}});
                 }),
                 "A [r, in] and B [out, r] for an input"));
}
