#include <ATen/ATen.h>
#include <graft/core/random.h>
#include <graft/train/checkpoint.h>

#include <memory>

#include "tests/ops/gradients.h"

namespace {

using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;
using graft::testing::Tensors;
using graft::train::checkpoint;

at::Tensor leaf(const at::Tensor& values) {
  return values.detach().clone().set_requires_grad(true);
}

// A layer with weight w.
at::Tensor layer(const at::Tensor& x, const at::Tensor& w) {
  return at::tanh(x.mm(w)) + x;
}

Tensors inputs() {
  at::manual_seed(40);
  return {at::randn({3, 4}, at::kDouble), at::randn({4, 4}, at::kDouble),
          at::randn({4, 4}, at::kDouble)};
}

// Stands for a dropout layer: scales by a number that its mask key decides.
struct Dropout {
  uint32_t site = 0;
  uint32_t counter = 0;
  at::Tensor operator()(const at::Tensor& x) {
    const auto key = graft::random::draw_key(1, site, counter);
    return x * (1.0 + site + 10.0 * key.step);
  }
};

}  // namespace

TEST_CASE("a checkpoint has the gradients that central differences give", "[train][checkpoint]") {
  graft::testing::check_differences(
      [](const Tensors& in) {
        return checkpoint([w = in[1]](const at::Tensor& x) { return layer(x, w); }, in[0], {in[1]});
      },
      {inputs()[0], inputs()[1]});
}

TEST_CASE("a checkpoint equals the plain computation bit for bit and runs twice",
          "[train][checkpoint]") {
  int runs = 0;
  const auto two_layers = [&](const Tensors& in) {
    ++runs;
    return layer(layer(in[0], in[1]), in[2]);
  };
  const auto checkpointed = [&](const Tensors& in) {
    return checkpoint(
        [=](const at::Tensor& x) {
          return two_layers({x, in[1], in[2]});
        },
        in[0], {in[1], in[2]});
  };
  const Tensors wanted = graft::testing::gradients(two_layers, inputs());
  runs = 0;
  const Tensors found = graft::testing::gradients(checkpointed, inputs());
  CHECK(runs == 2);
  for (size_t i = 0; i < wanted.size(); ++i) CHECK(at::equal(found[i], wanted[i]));
}

TEST_CASE("a checkpoint trains what it is given though its input is frozen",
          "[train][checkpoint]") {
  const Tensors in = inputs();
  const at::Tensor w = leaf(in[1]);
  const at::Tensor y = checkpoint([=](const at::Tensor& x) { return layer(x, w); }, in[0], {w});
  REQUIRE(y.requires_grad());
  y.sum().backward();
  const Tensors wanted =
      graft::testing::gradients([&](const Tensors& t) { return layer(in[0], t[0]); }, {in[1]});
  REQUIRE(w.grad().defined());
  CHECK(at::equal(w.grad(), wanted[0]));
  CHECK_FALSE(in[0].grad().defined());
}

TEST_CASE("a checkpoint adds to gradients, skips frozen tensors and unused ones",
          "[train][checkpoint]") {
  const Tensors in = inputs();
  const at::Tensor w = leaf(in[1]), unused = leaf(in[2]), frozen = in[2];
  const at::Tensor x = leaf(in[0]);
  for (int i = 0; i < 2; ++i) {
    checkpoint([=](const at::Tensor& t) { return layer(layer(t, w), frozen); }, x,
               {w, unused, frozen})
        .sum()
        .backward();
  }
  const Tensors wanted = graft::testing::gradients(
      [&](const Tensors& t) { return layer(layer(t[0], t[1]), frozen); }, {in[0], in[1]});
  CHECK(largest_difference(x.grad(), 2 * wanted[0]) < 1e-12);
  CHECK(largest_difference(w.grad(), 2 * wanted[1]) < 1e-12);
  CHECK_FALSE(frozen.grad().defined());
}

TEST_CASE("a checkpoint in the middle of a graph passes gradients on, into derived weights too",
          "[train][checkpoint]") {
  const auto f = [](const Tensors& in, bool through_checkpoint) {
    const at::Tensor x = layer(in[0], in[1]);
    const at::Tensor derived = in[1].mm(in[2]);
    const auto region = [=](const at::Tensor& t) { return layer(t, derived); };
    return layer(through_checkpoint ? checkpoint(region, x, {derived}) : region(x), in[2]);
  };
  graft::testing::check_against([&](const Tensors& in) { return f(in, true); },
                                [&](const Tensors& in) { return f(in, false); }, inputs(), 1e-12);
}

TEST_CASE("checkpoints nest", "[train][checkpoint]") {
  const auto nested = [](const Tensors& in) {
    const auto inner = [w = in[1]](const at::Tensor& x) {
      return checkpoint([w](const at::Tensor& t) { return layer(t, w); }, x, {w});
    };
    return checkpoint([inner, v = in[2]](const at::Tensor& x) { return layer(inner(x), v); }, in[0],
                      {in[1], in[2]});
  };
  graft::testing::check_against(
      nested, [](const Tensors& in) { return layer(layer(in[0], in[1]), in[2]); }, inputs(), 1e-12);
}

TEST_CASE("a long chain of checkpoints works", "[train][checkpoint]") {
  at::Tensor x = leaf(at::ones({2, 2}, at::kDouble));
  const at::Tensor w = leaf(at::eye(2, at::kDouble) * 0.01);
  at::Tensor y = x;
  for (int i = 0; i < 200; ++i) {
    y = checkpoint([w](const at::Tensor& t) { return layer(t, w); }, y, {w});
  }
  y.sum().backward();
  CHECK(w.grad().isfinite().all().item<bool>());
  CHECK(x.grad().min().item<double>() > 0);
}

TEST_CASE("a checkpoint draws the same mask keys again and leaves the layers' counters alone",
          "[train][checkpoint]") {
  auto first = std::make_shared<Dropout>(Dropout{1, 0});
  auto second = std::make_shared<Dropout>(Dropout{2, 5});
  const at::Tensor x = leaf(at::ones({2}, at::kDouble));
  const auto region = [=](const at::Tensor& t) { return (*first)((*second)((*first)(t))); };
  const at::Tensor y = checkpoint(region, x, {});
  CHECK(first->counter == 2);
  CHECK(second->counter == 6);
  const at::Tensor other = checkpoint(region, x, {});  // draws between forward and backward
  CHECK_FALSE(at::equal(y, other));
  y.sum().backward();
  CHECK(at::equal(x.grad(), y.detach()));  // y is x times a number, and x is one
  x.mutable_grad() = at::Tensor();
  other.sum().backward();
  CHECK(at::equal(x.grad(), other.detach()));
  CHECK(first->counter == 4);
}

TEST_CASE("nested checkpoints draw the same mask keys again", "[train][checkpoint]") {
  auto before = std::make_shared<Dropout>(Dropout{1, 0});
  auto inside = std::make_shared<Dropout>(Dropout{2, 0});
  auto after = std::make_shared<Dropout>(Dropout{3, 0});
  const at::Tensor x = leaf(at::ones({2}, at::kDouble));
  const at::Tensor y = checkpoint(
      [=](const at::Tensor& t) {
        const at::Tensor mid =
            checkpoint([=](const at::Tensor& u) { return (*inside)(u); }, (*before)(t), {});
        return (*after)(mid);
      },
      x, {});
  y.sum().backward();
  CHECK(at::equal(x.grad(), y.detach()));
  CHECK(inside->counter == 1);
}

TEST_CASE("a checkpoint keeps nothing: what f holds is released with the graph",
          "[train][checkpoint]") {
  auto held = std::make_shared<int>(1);
  const std::weak_ptr<int> watch = held;
  const at::Tensor x = leaf(at::ones({2}));
  {
    const at::Tensor y =
        checkpoint([held = std::move(held)](const at::Tensor& t) { return t * *held; }, x, {});
    CHECK_FALSE(watch.expired());
    y.sum().backward();
  }
  CHECK(watch.expired());
}

TEST_CASE("a checkpoint without anything to train simply runs", "[train][checkpoint]") {
  const Tensors in = inputs();
  int runs = 0;
  const auto region = [&](const at::Tensor& x) {
    ++runs;
    return layer(x, in[1]);
  };
  CHECK_FALSE(checkpoint(region, in[0], {in[1]}).requires_grad());
  const at::Tensor w = leaf(in[1]);
  {
    const at::NoGradGuard no_grad;
    CHECK_FALSE(checkpoint(region, leaf(in[0]), {w}).requires_grad());
  }
  CHECK(runs == 2);
  // A trainable tensor that was forgotten still trains, only without saving memory.
  checkpoint([=](const at::Tensor& x) { return layer(x, w); }, in[0], {}).sum().backward();
  CHECK(w.grad().defined());
}

TEST_CASE("a checkpoint returns its input as another tensor", "[train][checkpoint]") {
  const at::Tensor x = leaf(at::ones({2}));
  const at::Tensor y = checkpoint([](const at::Tensor& t) { return t; }, x, {});
  CHECK_FALSE(y.is_alias_of(x));
  y.sum().backward();
  CHECK(at::equal(x.grad(), at::ones({2})));
}

TEST_CASE("a checkpoint refuses what it cannot repeat, in words", "[train][checkpoint]") {
  const Tensors in = inputs();
  const at::Tensor x = leaf(in[0]), w = leaf(in[1]), v = leaf(in[2]);
  const auto region = [=](const at::Tensor& t) { return layer(layer(t, w), v); };
  const at::Tensor forgot = checkpoint(region, x, {w});
  CHECK(contains(error_of([&] { forgot.sum().backward(); }),
                 "must be listed; one of shape [4, 4] is not"));

  auto runs = std::make_shared<int>(0);
  const at::Tensor changing =
      checkpoint([runs](const at::Tensor& t) { return t.narrow(0, 0, ++*runs) * 2; }, x, {});
  CHECK(contains(error_of([&] { changing.sum().backward(); }), "compute the same again"));

  CHECK(contains(error_of([&] { checkpoint({}, x, {}); }), "must be a function"));
  CHECK(contains(error_of([&] { checkpoint(region, {}, {}); }), "x must be defined"));
  CHECK(contains(error_of([&] { checkpoint(region, x, {at::Tensor()}); }), "must be defined"));
  CHECK(
      contains(error_of([&] { checkpoint([](const at::Tensor&) { return at::Tensor(); }, x, {}); }),
               "must return a tensor"));
  CHECK(contains(graft::testing::double_backward_error(checkpoint(region, x, {w, v}), x),
                 "second derivative"));
}
