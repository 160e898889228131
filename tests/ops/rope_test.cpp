#include <ATen/ATen.h>
#include <graft/ops/rope.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/ops/gradients.h"

namespace {

using graft::ops::rope;
using graft::ops::rope_inverse_frequencies;
using graft::ops::rope_table;
using graft::ops::RopeOptions;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;
using graft::testing::Tensors;

// Hugging Face's formulation: x cos + rotate_half(x) sin, in [batch, heads, tokens, d].
at::Tensor plain(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t half = x.size(3) / 2;
  const auto wide = [&](const at::Tensor& angles) {
    const at::Tensor both = at::cat({angles, angles}, -1).to(x.scalar_type());
    return both.dim() == 3 ? both.unsqueeze(1) : both;
  };
  const at::Tensor t = x.transpose(1, 2);
  const at::Tensor turned = at::cat({-t.narrow(3, half, half), t.narrow(3, 0, half)}, -1);
  return t * wide(cos) + turned * wide(sin);
}

at::Tensor floats(const nlohmann::json& values) {
  return at::tensor(values.get<std::vector<double>>(), at::kDouble).to(at::kFloat);
}

RopeOptions options_of(const nlohmann::json& json) {
  RopeOptions options;
  options.theta = json.at("theta");
  options.head_dim = json.at("head_dim");
  options.type = json.at("rope_type");
  options.factor = json.value("factor", options.factor);
  options.low_freq_factor = json.value("low_freq_factor", options.low_freq_factor);
  options.high_freq_factor = json.value("high_freq_factor", options.high_freq_factor);
  options.original_max_position_embeddings =
      json.value("original_max_position_embeddings", options.original_max_position_embeddings);
  return options;
}

// Packed positions, restarting in the middle of a row.
at::Tensor packed_positions() {
  return at::tensor({0, 1, 2, 0, 1, 0, 1, 2, 3, 4}, at::kLong).view({2, 5});
}

}  // namespace

TEST_CASE("rope agrees with transformers for each kind of frequencies", "[ops][rope]") {
  std::ifstream file(std::string(GRAFT_GOLDENS) + "/rope/rope.json");
  REQUIRE(file);
  const auto golden = nlohmann::json::parse(file);
  std::vector<int64_t> flat;
  for (const auto& row : golden.at("positions")) {
    for (const int64_t position : row) flat.push_back(position);
  }
  const at::Tensor positions = at::tensor(flat, at::kLong).view({2, 5});
  REQUIRE(golden.at("cases").size() == 4);
  for (const auto& expected : golden.at("cases")) {
    const RopeOptions options = options_of(expected.at("options"));
    INFO("type " << options.type << ", theta " << options.theta);
    const at::Tensor frequencies = rope_inverse_frequencies(options);
    const at::Tensor wanted = floats(expected.at("inv_freq"));
    // A power may differ in its last bit between processors.
    CHECK(((frequencies - wanted).abs() / wanted).max().item<float>() < 3e-7f);

    // An error of one part in 10^7 in a frequency is one of 0.02 in the angle at position 131071.
    const auto table = rope_table(options, positions);
    CHECK(table.cos.sizes() == at::IntArrayRef({2, 5, options.head_dim / 2}));
    CHECK(largest_difference(table.cos.view(-1), floats(expected.at("cos"))) < 0.03);
    CHECK(largest_difference(table.sin.view(-1), floats(expected.at("sin"))) < 0.03);
    const at::Tensor near_cos = floats(expected.at("cos")).view(table.cos.sizes())[0];
    const at::Tensor near_sin = floats(expected.at("sin")).view(table.sin.sizes())[0];
    CHECK(largest_difference(table.cos[0], near_cos) < 3e-5);
    CHECK(largest_difference(table.sin[0], near_sin) < 3e-5);

    const at::Tensor x = floats(expected.at("x")).view({2, 5, 2, options.head_dim});
    const at::Tensor cos = floats(expected.at("cos")).view(table.cos.sizes());
    const at::Tensor sin = floats(expected.at("sin")).view(table.sin.sizes());
    CHECK(largest_difference(rope(x, cos, sin).view(-1), floats(expected.at("rotated"))) < 1e-6);
  }
}

TEST_CASE("rope has the gradients that central differences give", "[ops][rope]") {
  const auto table = rope_table({.head_dim = 6}, packed_positions());
  at::manual_seed(8);
  graft::testing::check_differences(
      [&](const Tensors& in) { return rope(in[0], table.cos, table.sin); },
      {at::randn({2, 5, 3, 6}, at::kDouble)});
}

TEST_CASE("rope equals rotate_half for shared and packed positions, odd sizes and one row",
          "[ops][rope]") {
  at::manual_seed(9);
  for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{
           {1, 1, 1, 2}, {2, 5, 3, 10}, {3, 7, 9, 64}, {2, 5, 1, 34}}) {
    INFO("shape " << at::IntArrayRef(shape));
    const at::Tensor positions = at::randint(0, 50, {shape[0], shape[1]}, at::kLong);
    for (const auto& table : {rope_table({.head_dim = shape[3]}, shape[1]),
                              rope_table({.head_dim = shape[3]}, positions)}) {
      const auto fused = [&](const Tensors& in) { return rope(in[0], table.cos, table.sin); };
      const auto composed = [&](const Tensors& in) { return plain(in[0], table.cos, table.sin); };
      graft::testing::check_against(fused, composed, {at::randn(shape, at::kDouble)}, 1e-12);
      graft::testing::check_against(fused, composed, {at::randn(shape, at::kFloat)}, 2e-6);
    }
  }
}

TEST_CASE("rope turns back in backward: the gradient of its own output is its input",
          "[ops][rope]") {
  at::manual_seed(10);
  const auto table = rope_table({.head_dim = 16}, 11);
  const at::Tensor x = at::randn({2, 11, 3, 16}).set_requires_grad(true);
  const at::Tensor y = rope(x, table.cos, table.sin);
  y.backward(y.detach());
  CHECK(x.grad().is_contiguous());
  CHECK(largest_difference(x.grad(), x.detach()) < 2e-6);
}

TEST_CASE("rope reads the views of a projection and any layout of the gradient", "[ops][rope]") {
  at::manual_seed(11);
  const auto table = rope_table({.head_dim = 8}, 5);
  const at::Tensor joined = at::randn({2, 5, 9 * 8}, at::kDouble);
  const at::Tensor middle = joined.narrow(2, 16, 24).view({2, 5, 3, 8});
  const at::Tensor scrambled = at::randn({8, 3, 5, 2}, at::kDouble).permute({3, 2, 1, 0});
  for (const at::Tensor& x : {middle, scrambled}) {
    const at::Tensor leaf = x.detach().set_requires_grad(true);
    const at::Tensor y = rope(leaf, table.cos, table.sin);
    CHECK(y.is_contiguous());
    CHECK(y.sizes() == at::IntArrayRef({2, 3, 5, 8}));
    CHECK(largest_difference(y, plain(x, table.cos, table.sin)) < 1e-12);
    const at::Tensor seed = graft::testing::seed_like(y);
    const Tensors wanted = graft::testing::gradients(
        [&](const Tensors& in) { return plain(in[0], table.cos, table.sin); }, {x}, seed);
    y.backward(seed.transpose(0, 3).contiguous().transpose(0, 3), /*retain_graph=*/true);
    CHECK(largest_difference(leaf.grad(), wanted[0]) < 1e-12);
    leaf.mutable_grad() = at::Tensor();
    y.sum().backward();  // a gradient that is one number seen everywhere
    CHECK(leaf.grad().isfinite().all().item<bool>());
  }
}

TEST_CASE("rope in bfloat16 and float16 rounds once, from float32", "[ops][rope]") {
  const auto type = GENERATE(at::kBFloat16, at::kHalf);
  at::manual_seed(12);
  const auto table = rope_table({.head_dim = 16}, 9);
  const at::Tensor x = at::randn({2, 9, 3, 16}).to(type);
  const at::Tensor expected = plain(x.to(at::kFloat), table.cos, table.sin).to(type);
  const at::Tensor y = rope(x, table.cos, table.sin);
  CHECK(y.scalar_type() == type);
  CHECK(y.ne(expected).sum().item<int64_t>() <= 2);
}

TEST_CASE("rope of no tokens or no batch is empty", "[ops][rope]") {
  const auto table = rope_table({.head_dim = 4}, 0);
  CHECK(rope(at::empty({2, 0, 3, 4}), table.cos, table.sin).sizes() ==
        at::IntArrayRef({2, 3, 0, 4}));
  const auto some = rope_table({.head_dim = 4}, 5);
  CHECK(rope(at::empty({0, 5, 3, 4}), some.cos, some.sin).sizes() == at::IntArrayRef({0, 3, 5, 4}));
}

TEST_CASE("rope gives the same bits for every number of threads", "[ops][rope]") {
  at::manual_seed(13);
  const auto table = rope_table({.head_dim = 64}, 203);
  const at::Tensor x = at::randn({3, 203, 9, 64});
  const auto fused = [&](const Tensors& in) { return rope(in[0], table.cos, table.sin); };
  graft::testing::check_threads([&] {
    const at::Tensor y = fused({x});
    return Tensors{y, graft::testing::gradients(fused, {x}, graft::testing::seed_like(y))[0]};
  });
}

TEST_CASE("rope refuses bad options, shapes and a second derivative in words", "[ops][rope]") {
  const auto frequencies_error = [](const RopeOptions& options) {
    return error_of([&] { rope_inverse_frequencies(options); });
  };
  CHECK(contains(frequencies_error({.head_dim = 5}), "head_dim must be even"));
  CHECK(contains(frequencies_error({}), "got 0"));
  CHECK(contains(frequencies_error({.theta = 0, .head_dim = 4}), "theta must be > 0"));
  CHECK(contains(frequencies_error({.head_dim = 4, .type = "yarn"}),
                 "default, linear, llama3; got 'yarn'"));
  CHECK(contains(frequencies_error({.head_dim = 4, .type = "linear", .factor = 0.5}), "factor"));
  CHECK(contains(frequencies_error({.head_dim = 4, .type = "llama3", .high_freq_factor = 1.0}),
                 "below high_freq_factor"));
  CHECK(contains(error_of([] { rope_table({.head_dim = 4}, -1); }), "tokens must be >= 0"));
  CHECK(contains(error_of([] { rope_table({.head_dim = 4}, at::ones({3})); }), "int64"));

  const auto table = rope_table({.head_dim = 4}, 5);
  const at::Tensor x = at::ones({2, 5, 3, 4});
  const auto error = [&](const at::Tensor& input) {
    return error_of([&] { rope(input, table.cos, table.sin); });
  };
  CHECK(contains(error(at::ones({2, 5, 4})), "x must be [batch, tokens, heads, d]"));
  CHECK(contains(error(at::ones({2, 6, 3, 4})), "cos must be"));
  CHECK(contains(error(at::ones({2, 5, 3, 6})), "cos must be"));
  CHECK(contains(error_of([&] { rope(x, table.cos, table.sin.unsqueeze(0)); }), "sin must be"));
  CHECK(contains(error_of([&] {
                   rope(x, table.cos.unsqueeze(0).expand({2, 5, 2}), table.sin);
                 }),
                 "one shape"));
  const at::Tensor leaf = x.clone().set_requires_grad(true);
  CHECK(contains(graft::testing::double_backward_error(rope(leaf, table.cos, table.sin), leaf),
                 "second derivative"));
}
