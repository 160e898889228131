// Every operation through the library's own way to the kernels, value and gradients, against the
// CPU's loops in fp64; then the same calls where LibTorch's operators take the kernels' place.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <graft/ops/device_paths.h>
#include <graft/ops/dora_linear.h>
#include <graft/ops/linear_cross_entropy.h>
#include <graft/ops/lora_linear.h>
#include <graft/ops/rms_norm.h>
#include <graft/ops/rope.h>
#include <graft/ops/sparse_linear.h>
#include <graft/ops/swiglu.h>

#include "tests/cuda_glue/both_ways.h"

namespace {

using namespace graft::ops;
using graft::testing::check_both_ways;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::OnDevice;
using graft::testing::relative_error;
using graft::testing::run;
using graft::testing::Tensors;
using graft::testing::test_device;
using graft::testing::to;

const Dropout kDropout{0.3, {11, 12, 13}};

}  // namespace

TEST_CASE("glue: lora_linear, forward and backward", "[cuda][glue]") {
  at::manual_seed(1);
  for (const int64_t rank : {3, 8, 20}) {
    for (const Dropout& dropout : {Dropout{}, kDropout}) {
      INFO("rank " << rank << ", p " << dropout.p);
      const Tensors in = {at::randn({2, 35, 24}), at::randn({40, 24}) * 0.2, at::randn({40}),
                          at::randn({rank, 24}) * 0.2, at::randn({40, rank}) * 0.2};
      const auto f = [&](const Tensors& t) {
        return lora_linear(t[0], t[1], t[2], {t[3], t[4], {}, 1.7, dropout});
      };
      check_both_ways("lora_linear", f, in, 3);
    }
  }
}

TEST_CASE("glue: lora_linear with gate, factor and a bias of its own, odd sizes", "[cuda][glue]") {
  at::manual_seed(2);
  const Tensors in = {at::randn({19, 13}),      at::randn({21, 13}) * 0.2, at::randn({5, 13}) * 0.3,
                      at::randn({21, 5}) * 0.3, at::randn({21}),           at::randn({5}),
                      at::randn({21})};
  const auto f = [](const Tensors& t) {
    return lora_linear(t[0], t[1], {}, {t[2], t[3], t[4], 0.6, kDropout, t[5], t[6]});
  };
  check_both_ways("lora_linear", f, in, 2);
}

TEST_CASE("glue: lora_linear computes wanted gradients alone", "[cuda][glue]") {
  at::manual_seed(3);
  const at::Tensor x = at::randn({9, 16}), W = at::randn({24, 16}), A = at::randn({4, 16}),
                   B = at::randn({24, 4});
  for (int wanted = 1; wanted < 8; ++wanted) {
    INFO("wanted " << wanted);
    const auto results = [&](const at::Device& device) {
      Tensors leaves = to({x.clone(), A.clone(), B.clone()}, device);
      for (int i = 0; i < 3; ++i) leaves[i].set_requires_grad((wanted >> i & 1) != 0);
      const at::Tensor y =
          lora_linear(leaves[0], W.to(device), {}, {leaves[1], leaves[2], {}, 0.5, kDropout});
      y.backward(graft::testing::seed_like(y).to(y.device()));
      Tensors gradients;
      for (const at::Tensor& leaf : leaves) gradients.push_back(leaf.grad());
      return gradients;
    };
    const Tensors on_cpu = results(at::kCPU);
    const OnDevice device;
    const Tensors on_kernels = results(test_device());
    for (int i = 0; i < 3; ++i) {
      REQUIRE(on_kernels[i].defined() == ((wanted >> i & 1) != 0));
      if (on_kernels[i].defined()) CHECK(relative_error(on_kernels[i], on_cpu[i]) < 3e-6);
    }
  }
}

TEST_CASE("glue: dora_linear and its norm", "[cuda][glue]") {
  at::manual_seed(4);
  const Tensors in = {at::randn({37, 24}),      at::randn({40, 24}) * 0.2, at::randn({40}),
                      at::randn({6, 24}) * 0.2, at::randn({40, 6}) * 0.2,  at::rand({40}) + 0.5};
  for (const Dropout& dropout : {Dropout{}, kDropout}) {
    const auto f = [&](const Tensors& t) {
      // The norm of the factors as the type of x holds them.
      const auto type = t[0].scalar_type();
      const at::Tensor A = t[3].detach().to(type), B = t[4].detach().to(type);
      const at::Tensor norm =
          dora_norm(t[1].detach(), row_squares(t[1].detach()), A, B, 0.8).to(t[3].scalar_type());
      return dora_linear(t[0], t[1], t[2],
                         {.A = t[3],
                          .B = t[4],
                          .magnitude = t[5],
                          .norm = norm,
                          .scale = 0.8,
                          .dropout = dropout,
                          .dropout_on_base = false});
    };
    check_both_ways("dora_linear", f, in, 3);
  }
  const at::Tensor W = in[1], squares = row_squares(W);
  const at::Tensor wanted = dora_norm(W, squares, in[3], in[4], 0.8);
  const OnDevice device;
  reset_device_paths();
  const Tensors moved = to({W, squares, in[3], in[4]}, test_device());
  CHECK(relative_error(dora_norm(moved[0], moved[1], moved[2], moved[3], 0.8), wanted) < 1e-6);
  CHECK(contains(describe_device_paths(), "dora_norm: 1 by graft's kernel"));
}

TEST_CASE("glue: dropout on the base goes to LibTorch, with its reason", "[cuda][glue]") {
  at::manual_seed(5);
  const Tensors in = {at::randn({9, 16}), at::randn({24, 16}), at::randn({4, 16}),
                      at::randn({24, 4}), at::rand({24}) + 0.5};
  const auto f = [&](const Tensors& t) {
    const at::Tensor norm =
        dora_norm(t[1].detach(), row_squares(t[1].detach()), t[2].detach(), t[3].detach(), 1.0);
    return dora_linear(t[0], t[1], {},
                       {.A = t[2],
                        .B = t[3],
                        .magnitude = t[4],
                        .norm = norm,
                        .scale = 1.0,
                        .dropout = kDropout,
                        .dropout_on_base = true});
  };
  const Tensors wanted = run(f, in);
  reset_device_paths();
  const OnDevice device;
  const Tensors got = run(f, to(in, test_device()));
  for (size_t i = 0; i < got.size(); ++i) CHECK(relative_error(got[i], wanted[i]) < 3e-6);
  CHECK(contains(describe_device_paths(), "dora_linear: 1 by LibTorch: dropout on the base"));
}

TEST_CASE("glue: rms_norm and swiglu, dense and strided", "[cuda][glue]") {
  at::manual_seed(6);
  const auto norm = [](const Tensors& t) { return rms_norm(t[0], t[1], 1e-5); };
  check_both_ways("rms_norm", norm, {at::randn({3, 7, 40}), at::randn({40})}, 2);
  check_both_ways("rms_norm", norm, {at::randn({5, 2, 13}).transpose(0, 1), at::randn({13})}, 2);
  const auto gated = [](const Tensors& t) { return swiglu(t[0], t[1]); };
  check_both_ways("swiglu", gated, {at::randn({2, 5, 24}), at::randn({2, 5, 24})}, 2);
  const auto halves = [](const Tensors& t) {
    return swiglu(t[0].narrow(1, 0, 20), t[0].narrow(1, 20, 20));
  };
  check_both_ways("swiglu", halves, {at::randn({9, 40})}, 1);
}

TEST_CASE("glue: a layer keeps a norm's node and makes its output again", "[cuda][glue]") {
  at::manual_seed(7);
  const auto f = [](const Tensors& t) {
    return lora_linear(swiglu(rms_norm(t[0], t[1], 1e-5), t[0]), t[2], {}, {t[3], t[4], {}, 0.5});
  };
  check_both_ways("swiglu", f,
                  {at::randn({9, 16}), at::randn({16}), at::randn({8, 16}), at::randn({4, 16}),
                   at::randn({8, 4})},
                  5);
}

TEST_CASE("glue: rope, shared and by batch, from a part of a wider row", "[cuda][glue]") {
  at::manual_seed(8);
  for (const bool by_batch : {false, true}) {
    const std::vector<int64_t> shape =
        by_batch ? std::vector<int64_t>{2, 5, 4} : std::vector<int64_t>{5, 4};
    const at::Tensor angle = at::randn(shape, at::kDouble);
    const auto f = [&](const Tensors& t) {
      const at::Tensor a = angle.to(t[0].device());
      return rope(t[0], a.cos(), a.sin());
    };
    check_both_ways("rope", f, {at::randn({2, 5, 3, 8})}, 1);
    const auto part = [&](const Tensors& t) {
      const at::Tensor a = angle.to(t[0].device());
      return rope(t[0].narrow(2, 8, 24).view({2, 5, 3, 8}), a.cos(), a.sin());
    };
    check_both_ways("rope", part, {at::randn({2, 5, 40})}, 1);
    const auto gaps = [&](const Tensors& t) {
      const at::Tensor a = angle.to(t[0].device());
      return rope(t[0].narrow(3, 2, 8), a.cos(), a.sin());
    };
    check_both_ways("rope", gaps, {at::randn({2, 5, 3, 11})}, 1);
  }
}

TEST_CASE("glue: linear_cross_entropy in chunks, with ignored rows and a low-rank part",
          "[cuda][glue]") {
  at::manual_seed(9);
  const at::Tensor targets = at::randint(0, 50, {23}, at::kLong);
  targets.slice(0, 3, 23, 5).fill_(-100);
  const at::Tensor W = at::randn({50, 16});
  LinearCrossEntropyOptions options;
  options.chunk_rows = 6;
  const auto plain = [&](const Tensors& t) {
    return linear_cross_entropy(t[0], W.to(t[0].options().requires_grad(false)), targets, options);
  };
  check_both_ways("cross_entropy", plain, {at::randn({23, 16})}, 1);
  const auto low_rank = [&](const Tensors& t) {
    return linear_cross_entropy(t[0], W.to(t[0].options().requires_grad(false)), targets, options,
                                {t[1], t[2]});
  };
  check_both_ways("cross_entropy", low_rank,
                  {at::randn({23, 16}), at::randn({23, 3}), at::randn({50, 3}) * 0.3}, 1);
}

TEST_CASE("glue: dropout has the CPU's mask, also where LibTorch applies it", "[cuda][glue]") {
  const at::Tensor x = at::rand({7, 29}) + 1;
  const at::Tensor wanted = apply_dropout(x, kDropout), none = wanted == 0;
  for (const bool kernels : {true, false}) {
    const OnDevice device(kernels);
    const at::Tensor moved = x.to(test_device());
    CHECK(at::equal((apply_dropout(moved, kDropout) == 0).cpu(), none));
    CHECK(relative_error(apply_dropout(moved, kDropout), wanted) < 1e-6);
    CHECK(at::equal((apply_dropout(moved.to(at::kDouble), kDropout) == 0).cpu(), none));
    at::Tensor sum = at::ones({7, 29}, moved.options());
    add_dropped_(sum, moved, kDropout);
    CHECK(relative_error(sum, wanted + 1) < 1e-6);
  }
}

TEST_CASE("glue: sparse entries, by LibTorch alone", "[cuda][glue]") {
  const at::Tensor positions =
      at::tensor({0, 3, 3, 12, 7, 0, 5, 5, 16, 1, 3, 5}, at::kInt).view({2, 6});
  const auto f = [&](const Tensors& in) {
    return sparse_linear(in[0], in[1], in[2], {positions.to(in[0].device()), in[3], 0.7});
  };
  at::manual_seed(9);
  const Tensors inputs = {at::randn({2, 9, 17}), at::randn({13, 17}) * 0.3, at::randn({13}),
                          at::randn({6})};
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    Tensors stored = to(inputs, type);
    stored[3] = stored[3].to(at::kFloat);
    const Tensors wanted = run(f, to(stored, at::kDouble));
    const OnDevice device(true);
    reset_device_paths();
    const Tensors got = run(f, to(stored, test_device()));
    for (size_t i = 0; i < got.size(); ++i) {
      INFO(at::toString(type) << ", result " << i);
      CHECK(relative_error(got[i], wanted[i]) < (type == at::kFloat ? 3e-6 : 1.2e-2));
    }
    bool counted = false;
    for (const DevicePath& path : device_paths())
      counted = counted || (path.operation == "sparse" && path.reason == "no kernel");
    CHECK(counted);
  }
}

TEST_CASE("glue: refusals are one line", "[cuda][glue]") {
  const OnDevice device;
  const DeviceKernels& kernels = *device_kernels();
  const auto on = at::TensorOptions(test_device());
  const at::Tensor x = at::randn({4, 16}, on);
  CHECK(contains(error_of([&] { kernels.rms_norm(x, at::ones({15}, on), 1e-5); }),
                 "shapes must agree"));
  CHECK(contains(error_of([&] {
                   kernels.lora_shrink(x, {at::randn({65, 16}, on)}, 1, {});
                 }),
                 "rank must be in [1, 64]; got 65"));
  CHECK(contains(
      error_of([&] {
        kernels.lora_expand(at::randn({4, 7}, on), {at::randn({16, 7}, on), true}, 1, {}, {});
      }),
      "must be [4, 8], aligned to 16 bytes; got [4, 7]"));
  CHECK(contains(error_of([&] { kernels.dropout(x.to(at::kDouble), kDropout); }),
                 "must be bf16, fp16 or fp32; got Double"));
  CHECK(contains(error_of([&] { kernels.rms_norm(x, at::ones({16}, at::kMeta), 1e-5); }),
                 "must be dense and on"));
  CHECK(contains(
      error_of([&] { kernels.softmax_loss(x.t(), at::zeros({16}, on.dtype(at::kLong)), true, 1); }),
      "dense rows"));
}
