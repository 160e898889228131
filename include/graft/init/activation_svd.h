/// EVA's part of initialisation: the principal directions of a layer's inputs, found batch by batch
/// in bounded memory, and ranks given to the layers where they explain most.
///
/// Source: Paischer et al. 2024, arXiv 2410.07170; where paper and code differ (the activations are
/// centred), the code and Hugging Face PEFT.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace graft::init {

/// Incremental principal components of rows that come in batches (Ross et al. 2008): keeps K
/// directions, the running mean (fp64) and variance. With N rows so far and t new ones, the new
/// directions are the right singular vectors of the stacked rows
///   diag(S) V^T;   X - mean(X);   sqrt(N t / (N + t)) (mean - mean(X)).
/// Exact while K = k, an approximation else. Where 2K is less than both sides of that matrix and
/// they exceed 64, randomized_svd does it, with 2K directions, 4 iterations and a fixed seed.
class ActivationSvd {
 public:
  /// `components`: K >= 1; `tolerance`: in (0, 1], the cosine from which on a direction counts as
  /// settled.
  ActivationSvd(int64_t components, double tolerance);

  /// Takes in the rows X [t, k]; a batch with t < K is skipped and false returned. Throws for
  /// K > k, for a k that is not the first batch's, and for inputs that are not finite.
  bool update(const at::Tensor& X);

  /// The directions [K, k], orthonormal rows, strongest first, signs fixed (largest entry > 0);
  /// undefined before the first batch.
  const at::Tensor& directions() const { return directions_; }
  const at::Tensor& singular_values() const { return singular_values_; }
  /// S_i^2 over the summed squared distances of all rows so far from their mean, fp64 [K]; zeros
  /// where all rows are equal.
  at::Tensor explained_ratio() const;
  /// Whether the first `count` directions turned by no more than the tolerance in the last update
  /// that was not skipped; false before the second, unless count = 0. As in the authors' code and
  /// PEFT, a direction whose fixed sign changes (another entry became the largest) has turned: with
  /// the line alone compared, layers stop some batches earlier and ranks are shared out otherwise.
  bool settled(int64_t count) const;
  int64_t components() const { return components_; }
  int64_t rows() const { return rows_; }

 private:
  int64_t components_;
  double tolerance_;
  int64_t rows_ = 0;
  at::Tensor mean_;          // fp64 [k]
  double square_sum_ = 0.0;  // of the rows' distances from the mean
  at::Tensor directions_, singular_values_, settled_;
};

/// How many directions each layer gets: the `budget` largest of all layers' ratios win. ratios: one
/// list a layer, descending; equal ones go to the earlier layer. The result sums to
/// min(budget, number of ratios). Throws for a list that is not descending or not finite.
std::vector<int64_t> allocate_ranks(const std::vector<std::vector<double>>& ratios, int64_t budget);

}  // namespace graft::init
