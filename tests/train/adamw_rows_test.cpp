// AdamW on parameters of which a step trains only some rows.
#include <ATen/ATen.h>
#include <graft/train/adamw.h>

#include "tests/ops/gradients.h"

namespace {

using graft::nn::LiveRows;
using graft::testing::contains;
using graft::testing::error_of;
using graft::testing::largest_difference;
using graft::train::AdamW;
using graft::train::NamedTensors;
using graft::train::ParameterGroup;

at::Tensor leaf(const at::Tensor& values) {
  return values.detach().clone().set_requires_grad(true);
}

// Gradients of step t.
void set_gradients(const NamedTensors& list, int64_t t) {
  at::manual_seed(100 + t);
  for (const auto& [name, parameter] : list)
    parameter.mutable_grad() =
        at::randn(parameter.sizes(), parameter.options().requires_grad(false));
}

// One parameter whose live rows are what `window` holds at each step.
ParameterGroup row_wise(const NamedTensors& list, const LiveRows& window, double weight_decay) {
  ParameterGroup group{list, 1.0, weight_decay};
  for (const auto& entry : list) group.live_rows[entry.first] = [&window] { return window; };
  return group;
}

}  // namespace

TEST_CASE("AdamW moves a row as if it were a parameter that only its own steps see",
          "[train][adamw]") {
  const int64_t shape[] = {3, 5, 4};
  for (const int64_t dim : {0, 1, 2}) {
    for (const auto type : {at::kFloat, at::kDouble}) {
      INFO("dimension " << dim << ", " << type);
      at::manual_seed(7);
      const at::Tensor whole = leaf(at::randn(shape, type));
      LiveRows window{dim, 0, 0};
      AdamW optimizer({row_wise({{"p", whole}}, window, 0.1)});
      // Each row by itself, stepped only when the window covers it.
      NamedTensors rows;
      std::vector<AdamW> alone;
      for (int64_t i = 0; i < shape[dim]; ++i) {
        rows.emplace_back("r", leaf(whole.select(dim, i).contiguous()));
        alone.emplace_back(std::vector<ParameterGroup>{{{rows.back()}, 1.0, 0.1}});
      }
      for (int64_t t = 0; t < 12; ++t) {
        window.begin = t % shape[dim];
        window.end = std::min(shape[dim], window.begin + 1 + t % 3);
        set_gradients({{"p", whole}}, t);
        for (int64_t i = window.begin; i < window.end; ++i) {
          rows[i].second.mutable_grad() = whole.grad().select(dim, i).contiguous();
          alone[i].step(1e-2, 0.7);
        }
        optimizer.step(1e-2, 0.7);
      }
      const double tolerance = type == at::kFloat ? 1e-6 : 1e-15;
      for (int64_t i = 0; i < shape[dim]; ++i)
        CHECK(largest_difference(whole.select(dim, i), rows[i].second) < tolerance);
    }
  }
}

TEST_CASE("AdamW with all rows live gives the bits of AdamW without live rows", "[train][adamw]") {
  for (const int64_t dim : {0, 1}) {
    at::manual_seed(8);
    const at::Tensor values = at::randn({5000, 7});
    const NamedTensors plain = {{"p", leaf(values)}}, rows = {{"p", leaf(values)}};
    const LiveRows all{dim, 0, values.size(dim)};
    AdamW first({{plain, 1.0, 0.1}}), second({row_wise(rows, all, 0.1)});
    for (int64_t t = 0; t < 3; ++t) {
      set_gradients(plain, t);
      set_gradients(rows, t);
      first.step(1e-2);
      second.step(1e-2);
    }
    CHECK(at::equal(plain[0].second, rows[0].second));
  }
}

TEST_CASE("AdamW leaves frozen rows and their state alone, decay and momentum included",
          "[train][adamw]") {
  for (const int64_t dim : {0, 1}) {
    at::manual_seed(9);
    const NamedTensors list = {{"p", leaf(at::randn({6, 6}))}};
    const at::Tensor& p = list[0].second;
    LiveRows window{dim, 0, 6};
    AdamW optimizer({row_wise(list, window, 0.1)});
    set_gradients(list, 0);
    optimizer.step(1e-2);  // every row has momentum now
    window = {dim, 2, 4};
    const at::Tensor before = p.detach().clone();
    const NamedTensors state = optimizer.state_dict();
    for (int64_t t = 1; t <= 20; ++t) {
      set_gradients(list, t);
      optimizer.step(1e-2);
    }
    const NamedTensors after = optimizer.state_dict();
    for (int64_t i = 0; i < 6; ++i) {
      const bool live = i == 2 || i == 3;
      INFO("dimension " << dim << ", row " << i);
      CHECK(at::equal(p.select(dim, i), before.select(dim, i)) == !live);
      for (const size_t which : {1, 2})
        CHECK(at::equal(after[which].second.select(dim, i), state[which].second.select(dim, i)) ==
              !live);
    }
    CHECK(after[3].first == "p.row_steps");
    CHECK(at::equal(after[3].second, at::tensor({1, 1, 21, 21, 1, 1}, at::kLong)));
    CHECK(optimizer.step_count() == 21);
  }
}

TEST_CASE("AdamW resumes row by row, bit for bit", "[train][adamw]") {
  at::manual_seed(10);
  const NamedTensors straight = {{"p", leaf(at::randn({4, 3}))}};
  LiveRows window{1, 0, 1};
  AdamW whole({row_wise(straight, window, 0.1)});
  const auto step = [&](AdamW& optimizer, const NamedTensors& list, int64_t t) {
    window = {1, t % 2, 1 + t % 3};
    if (window.end < window.begin) window.end = window.begin;
    set_gradients(list, t);
    optimizer.step(1e-2);
  };
  for (int64_t t = 0; t < 4; ++t) step(whole, straight, t);
  const NamedTensors copy = {{"p", leaf(straight[0].second)}}, state = whole.state_dict();
  AdamW resumed({row_wise(copy, window, 0.1)});
  resumed.load_state_dict(state);
  for (int64_t t = 4; t < 9; ++t) {
    step(whole, straight, t);
    step(resumed, copy, t);
  }
  CHECK(at::equal(straight[0].second, copy[0].second));

  NamedTensors wrong = state;
  wrong[3].second = at::tensor({0, 5, 1}, at::kLong);
  CHECK(contains(error_of([&] { resumed.load_state_dict(wrong); }), "dtype: [p.row_steps]"));
  wrong[3].second = at::tensor({0, -1, 1}, at::kLong);
  CHECK(contains(error_of([&] { resumed.load_state_dict(wrong); }), "dtype: [p.row_steps]"));
  wrong.pop_back();
  CHECK(contains(error_of([&] { resumed.load_state_dict(wrong); }), "missing: [p.row_steps]"));
}

TEST_CASE("AdamW refuses live rows that do not fit, and changes nothing", "[train][adamw]") {
  const NamedTensors list = {{"p", leaf(at::ones({3, 2}))}};
  LiveRows window{0, 0, 3};
  const auto made = [&](const NamedTensors& parameters) {
    return error_of([&] { AdamW optimizer({row_wise(parameters, window, 0.0)}); });
  };
  window.dim = 2;
  CHECK(contains(made(list), "the dimension of live rows must be in [0, 2); got 2 ('p')"));
  window.dim = 0;
  CHECK(contains(made({{"q", at::ones({3, 2}).t().set_requires_grad(true)}}),
                 "must be contiguous; 'q' is not"));
  ParameterGroup stray = row_wise(list, window, 0.0);
  stray.live_rows["other"] = [] { return LiveRows{}; };
  CHECK(contains(error_of([&] { AdamW optimizer({stray}); }), "got 'other' (group 0)"));

  AdamW optimizer({row_wise(list, window, 0.0)});
  set_gradients(list, 0);
  for (const LiveRows bad :
       {LiveRows{0, 0, 4}, LiveRows{0, -1, 2}, LiveRows{0, 2, 1}, LiveRows{1, 0, 2}}) {
    window = bad;
    CHECK(contains(error_of([&] { optimizer.step(0.1); }),
                   "live rows must be in [0, 3) of dimension 0; got ["));
  }
  CHECK(at::equal(list[0].second, at::ones({3, 2})));
  CHECK(optimizer.step_count() == 0);
}

TEST_CASE("AdamW tells caches that it changed a parameter", "[train][adamw]") {
  NamedTensors list = {{"whole", leaf(at::ones({2}))}, {"rows", leaf(at::ones({3, 2}))}};
  LiveRows window{0, 1, 2};
  ParameterGroup rows = row_wise({list[1]}, window, 0.0);
  AdamW optimizer({{{list[0]}}, rows});
  for (int64_t t = 0; t < 2; ++t) {
    set_gradients(list, t);
    const auto whole = list[0].second._version(), some = list[1].second._version();
    optimizer.step(0.1);
    CHECK(list[0].second._version() > whole);
    CHECK(list[1].second._version() > some);
  }
}
