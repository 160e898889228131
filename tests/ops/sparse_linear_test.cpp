#include <ATen/ATen.h>
#include <graft/ops/sparse_linear.h>

#include <tuple>

#include "tests/ops/gradients.h"

namespace {

using namespace graft::ops;
using namespace graft::testing;

at::Tensor random(at::IntArrayRef shape) {
  return at::randn(shape, at::kDouble);
}

// K positions of an [out, in] weight, in no order.
at::Tensor some_positions(int64_t out, int64_t in, int64_t count) {
  const at::Tensor places = at::randperm(out * in, at::kLong).narrow(0, 0, count);
  return at::stack({places.floor_divide(in), places.remainder(in)}).to(at::kInt);
}

// S as a dense matrix, differentiable in the values.
at::Tensor dense(const at::Tensor& positions, const at::Tensor& values, int64_t out, int64_t in) {
  const at::Tensor places = positions[0].to(at::kLong) * in + positions[1];
  return at::zeros({out * in}, values.options()).index_add(0, places, values).view({out, in});
}

// One-hot rows: x[:, c] = x A^T.
at::Tensor one_hot(const at::Tensor& columns, int64_t in, at::ScalarType type) {
  return at::one_hot(columns.to(at::kLong), in).to(type);
}

}  // namespace

TEST_CASE("sparse_linear is a product with W + s S, with its gradients", "[ops][sparse]") {
  at::manual_seed(1);
  const auto [tokens, out, in] =
      GENERATE(std::tuple<int, int, int>(1, 3, 5), std::tuple<int, int, int>(63, 6, 4),
               std::tuple<int, int, int>(64, 19, 33), std::tuple<int, int, int>(65, 33, 17),
               std::tuple<int, int, int>(2100, 5, 7));
  INFO(tokens << " tokens, " << in << " to " << out);
  const at::Tensor weight = random({out, in}), bias = random({out});
  const at::Tensor positions = some_positions(out, in, std::min(out * in, out + in));
  const at::Tensor values = random({positions.size(1)}), x = random({tokens, in});
  const int64_t rows = out, columns = in;
  const auto op = [&](const Tensors& leaves) {
    return sparse_linear(leaves[0], weight, bias, {positions, leaves[1], 1.5});
  };
  const auto plain = [&](const Tensors& leaves) {
    return at::linear(leaves[0], weight + 1.5 * dense(positions, leaves[1], rows, columns), bias);
  };
  check_against(op, plain, {x, values}, 1e-11);
  check_against(op, plain, {x.view({tokens, 1, in}), values}, 1e-11);
  CHECK(largest_difference(add_sparse(weight, {positions, values, 1.5}),
                           weight + 1.5 * dense(positions, values, out, in)) < 1e-14);
}

TEST_CASE("sparse_linear's gradients are those of central differences", "[ops][sparse]") {
  at::manual_seed(2);
  const at::Tensor positions = some_positions(4, 5, 9);
  check_differences(
      [&](const Tensors& leaves) {
        return sparse_linear(leaves[0], leaves[1], leaves[2], {positions, leaves[3], -0.7});
      },
      {random({2, 3, 5}), random({4, 5}), random({4}), random({9})});
}

TEST_CASE("entries at one position add up", "[ops][sparse]") {
  const at::Tensor positions = at::tensor({1, 1, 0, 2, 2, 0}, at::kInt).view({2, 3});
  const at::Tensor values = at::tensor({1.0, 2.0, 5.0}, at::kDouble),
                   zero = at::zeros({2, 3}, at::kDouble);
  const at::Tensor expected = at::tensor({5.0, 0.0, 0.0, 0.0, 0.0, 3.0}, at::kDouble).view({2, 3});
  CHECK(at::equal(add_sparse(zero, {positions, values}), expected));
  CHECK(at::equal(sparse_linear(at::eye(3, at::kDouble), zero, {}, {positions, values}),
                  expected.t()));
}

TEST_CASE("sparse_linear gives the same bits for any number of threads", "[ops][sparse]") {
  at::manual_seed(3);
  const at::Tensor weight = at::zeros({40, 30});  // the base product's own sums may differ
  const at::Tensor positions = some_positions(40, 30, 200);
  const at::Tensor values = at::randn({200}), x = at::randn({1500, 30});
  check_threads([&] {
    const auto f = [&](const Tensors& leaves) {
      return sparse_linear(leaves[0], weight, {}, {positions, leaves[1]});
    };
    Tensors all = gradients(f, {x, values});
    all.push_back(f({x, values}));
    return all;
  });
}

TEST_CASE("a bf16 base keeps fp32 entries", "[ops][sparse]") {
  at::manual_seed(4);
  const at::Tensor weight = at::randn({6, 4}).to(at::kBFloat16),
                   positions = some_positions(6, 4, 8);
  const at::Tensor values = at::randn({8}).mul_(0.01).set_requires_grad(true);
  const at::Tensor x = at::randn({5, 4}).to(at::kBFloat16).set_requires_grad(true);
  const at::Tensor y = sparse_linear(x, weight, {}, {positions, values});
  CHECK(y.scalar_type() == at::kBFloat16);
  const at::Tensor expected = at::linear(x, weight).to(at::kFloat) +
                              at::linear(x.to(at::kFloat), dense(positions, values.detach(), 6, 4));
  CHECK(at::equal(y, expected.to(at::kBFloat16)));
  y.sum().backward();
  CHECK(values.grad().scalar_type() == at::kFloat);
  CHECK(x.grad().scalar_type() == at::kBFloat16);
  CHECK(add_sparse(weight, {positions, values}).scalar_type() == at::kFloat);
}

TEST_CASE("no tokens and no entries are fine", "[ops][sparse]") {
  const at::Tensor weight = at::ones({3, 2}), positions = at::zeros({2, 1}, at::kInt);
  const at::Tensor values = at::ones({1}).set_requires_grad(true);
  const at::Tensor y = sparse_linear(at::zeros({0, 2}), weight, {}, {positions, values});
  CHECK(y.sizes() == at::IntArrayRef({0, 3}));
  y.sum().backward();
  CHECK(values.grad().item<float>() == 0.0f);
  const at::Tensor none = at::zeros({2, 0}, at::kInt);
  CHECK(at::equal(sparse_linear(at::ones({1, 2}), weight, {}, {none, at::zeros({0})}),
                  at::full({1, 3}, 2.0f)));
}

TEST_CASE("column_linear is LoRA with unit vectors for A, with its gradients", "[ops][sparse]") {
  at::manual_seed(5);
  const at::Tensor weight = random({6, 9}), bias = random({6}), D = random({6, 3});
  const at::Tensor columns = at::tensor({7, 0, 4}, at::kInt), A = one_hot(columns, 9, at::kDouble);
  const auto op = [&](const Tensors& leaves) {
    return column_linear(leaves[0], weight, bias, {columns, leaves[1], 1.5});
  };
  const auto plain = [&](const Tensors& leaves) {
    return at::linear(leaves[0], weight + 1.5 * leaves[1].mm(A), bias);
  };
  check_against(op, plain, {random({70, 9}), D}, 1e-12);
  check_against(op, plain, {random({2, 3, 9}), D}, 1e-12);
  check_differences(
      [&](const Tensors& leaves) {
        return column_linear(leaves[0], leaves[1], leaves[2], {columns, leaves[3], -0.7});
      },
      {random({2, 9}), weight, bias, D});
}

TEST_CASE("column_linear keeps the selected columns and not x", "[ops][sparse]") {
  at::Tensor x = at::ones({50, 40});
  const c10::weak_intrusive_ptr<c10::StorageImpl> storage(x.storage().getWeakStorageImpl());
  const at::Tensor weight = at::ones({30, 40}), D = at::zeros({30, 2}).set_requires_grad(true);
  const at::Tensor y = column_linear(x, weight, {}, {at::tensor({3, 5}, at::kInt), D});
  x = at::Tensor();
  CHECK(storage.expired());
  y.sum().backward();
  CHECK(at::equal(D.grad(), at::full({30, 2}, 50.0f)));
}

TEST_CASE("sparse_linear and column_linear refuse what does not fit", "[ops][sparse]") {
  const at::Tensor weight = at::ones({3, 2}), x = at::ones({4, 2}), values = at::ones({1});
  const auto sparse = [&](const at::Tensor& positions) {
    return error_of([&] { sparse_linear(x, weight, {}, {positions, values}); });
  };
  const auto at_place = [](int row, int column) {
    return at::tensor({row, column}, at::kInt).view({2, 1});
  };
  CHECK(contains(sparse(at_place(3, 0)), "[sparse] rows must lie in [0, 3); got 3"));
  CHECK(contains(sparse(at_place(-1, 0)), "got -1"));
  CHECK(contains(sparse(at_place(0, 2)), "columns must lie in [0, 2); got 2"));
  CHECK(contains(sparse(at_place(0, 0).to(at::kLong)), "must be int32 [2, K]"));
  CHECK(contains(sparse(at::zeros({2, 2}, at::kInt)), "must be int32 [2, K]"));
  CHECK(contains(error_of([&] { add_sparse(weight, {at_place(3, 0), values}); }), "got 3"));
  CHECK(contains(error_of([&] {
                   sparse_linear(at::ones({4, 3}), weight, {}, {at_place(0, 0), values});
                 }),
                 "last dimension"));
  const at::Tensor D = at::ones({3, 1});
  const auto columns = [&](const at::Tensor& which) {
    return error_of([&] { column_linear(x, weight, {}, {which, D}); });
  };
  CHECK(
      contains(columns(at::tensor({2}, at::kInt)), "[columns] columns must lie in [0, 2); got 2"));
  CHECK(contains(columns(at::tensor({0, 1}, at::kInt)), "must be int32 [r]"));
  const at::Tensor v = values.clone().set_requires_grad(true),
                   d = D.clone().set_requires_grad(true);
  CHECK(contains(double_backward_error(sparse_linear(x, weight, {}, {at_place(0, 0), v}), v),
                 "second derivative"));
  CHECK(contains(
      double_backward_error(column_linear(x, weight, {}, {at::tensor({0}, at::kInt), d}), d),
      "second derivative"));
}
