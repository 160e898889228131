#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/core/error.h>
#include <graft/init/activation_svd.h>
#include <graft/init/low_rank_svd.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "matrix.h"

namespace graft::init {
namespace {

constexpr uint64_t kSeed = 42;  // of each update's random start: PEFT's

// The leading `count` triplets, with twice as many asked for and 4 iterations, as in PEFT; exact
// where that is hardly more work.
Svd batch_svd(const at::Tensor& rows, int64_t count) {
  const int64_t smaller = std::min(rows.size(0), rows.size(1));
  const int64_t q = 2 * count;
  if (q >= smaller || smaller <= 64) return leading_svd(rows, count);
  const Svd wider = randomized_svd(rows, q, 4, at::detail::createCPUGenerator(kSeed));
  return {wider.U.narrow(1, 0, count), wider.S.narrow(0, 0, count), wider.V.narrow(1, 0, count)};
}

}  // namespace

ActivationSvd::ActivationSvd(int64_t components, double tolerance)
    : components_(components), tolerance_(tolerance) {
  GRAFT_CHECK(components >= 1, "init", "components must be >= 1; got ", components);
  GRAFT_CHECK(tolerance > 0.0 && tolerance <= 1.0, "init",
              "the tolerance is a cosine in (0, 1]; got ", tolerance);
}

bool ActivationSvd::update(const at::Tensor& X) {
  const at::NoGradGuard no_grad;
  GRAFT_CHECK(X.defined() && X.dim() == 2, "init", "inputs must be rows [t, k]; got ",
              X.defined() ? X.sizes() : at::IntArrayRef());
  const int64_t width = X.size(1);
  GRAFT_CHECK(components_ <= width, "init", "components must be <= the inputs' width; got ",
              components_, " for ", width);
  GRAFT_CHECK(!mean_.defined() || width == mean_.size(0), "init",
              "every batch must have the first one's width ", mean_.defined() ? mean_.size(0) : 0,
              "; got ", width);
  const int64_t count = X.size(0);
  if (count < components_) return false;
  const at::Tensor work = working_matrix(X, "the inputs");

  const auto before = static_cast<double>(rows_), added = static_cast<double>(count);
  const double total = before + added;
  // The stacked rows, the batch in the middle of them.
  const int64_t above = rows_ == 0 ? 0 : components_, below = rows_ == 0 ? 0 : 1;
  const at::Tensor rows = at::empty({above + count + below, width}, work.options());
  const at::Tensor rough_mean = work.mean(0);
  at::Tensor centred = rows.narrow(0, above, count);
  at::sub_out(centred, work, rough_mean);
  // A mean of large numbers has lost what the mean of their small distances from it still holds.
  const at::Tensor rest = centred.mean(0);
  centred.sub_(rest);
  const at::Tensor mean = rough_mean.to(at::kDouble) + rest;
  const double squares = square_sum(centred);

  if (rows_ == 0) {
    mean_ = mean;
    square_sum_ = squares;
  } else {
    const double weight = before * added / total;
    const at::Tensor shift = mean_ - mean;
    rows.narrow(0, 0, above).copy_(directions_ * singular_values_.unsqueeze(1));
    rows[above + count].copy_(std::sqrt(weight) * shift);
    mean_ = (mean_ * before + mean * added) / total;
    square_sum_ += squares + weight * square_sum(shift);
  }
  const Svd svd = batch_svd(rows, components_);
  const at::Tensor directions = svd.V.t().contiguous();
  settled_ = directions_.defined() ? (directions * directions_).sum(1) >= tolerance_
                                   : at::zeros({components_}, at::kBool);
  directions_ = directions;
  singular_values_ = svd.S.contiguous();
  rows_ += count;
  return true;
}

at::Tensor ActivationSvd::explained_ratio() const {
  GRAFT_CHECK(rows_ > 0, "init", "a ratio needs a batch first; got none");
  const at::Tensor squares = singular_values_.to(at::kDouble).square();
  return square_sum_ > 0.0 ? squares / square_sum_ : at::zeros_like(squares);
}

bool ActivationSvd::settled(int64_t count) const {
  GRAFT_CHECK(count >= 0 && count <= components_, "init", "count must be in [0, ", components_,
              "]; got ", count);
  if (count == 0) return true;
  return settled_.defined() && settled_.narrow(0, 0, count).all().item<bool>();
}

std::vector<int64_t> allocate_ranks(const std::vector<std::vector<double>>& ratios,
                                    int64_t budget) {
  GRAFT_CHECK(budget >= 0, "init", "the budget must be >= 0; got ", budget);
  std::vector<std::pair<double, size_t>> all;
  for (size_t layer = 0; layer < ratios.size(); ++layer) {
    for (size_t i = 0; i < ratios[layer].size(); ++i) {
      const double ratio = ratios[layer][i];
      GRAFT_CHECK(std::isfinite(ratio) && (i == 0 || ratio <= ratios[layer][i - 1]), "init",
                  "ratios must be finite and descending; got ", ratio, " at place ", i,
                  " of layer ", layer);
      all.emplace_back(ratio, layer);
    }
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  all.resize(std::min(all.size(), static_cast<size_t>(budget)));
  std::vector<int64_t> ranks(ratios.size(), 0);
  for (const auto& [ratio, layer] : all) ++ranks[layer];
  return ranks;
}

}  // namespace graft::init
