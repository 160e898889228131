/// From an initialiser's name to factors: what methods call.
#pragma once

#include <ATen/core/Generator.h>
#include <graft/init/initialiser.h>
#include <graft/init/start.h>

#include <memory>
#include <string>
#include <string_view>

namespace graft::init {

/// Options of EVA; the names are PEFT's.
struct EvaOptions {
  double rho = 2.0;     ///< a layer's rank may grow to round(rho r); 1: no redistribution
  double tau = 0.99;    ///< from which cosine on a direction counts as settled
  bool whiten = false;  ///< each direction divided by the square root of its singular value
  bool adjust_scaling_factors = true;  ///< alpha follows the rank, so that s stays
};

/// What the initialisers that need data or choices of their own can be told.
struct StartOptions {
  LoraGaOptions lora_ga;
  EvaOptions eva;
  std::string corda_method = "ipm";
  NystromOptions nystrom;  ///< as a start of LoRA it is always subtracted
  /// PiSSA by LAPACK's decomposition of the whole matrix, as PEFT finds it each time it opens a
  /// folder: what that rounds away of an fp32 matrix is part of the model that was trained.
  bool whole_svd = false;

  /// Throws unless every option is in its range.
  void validate() const;
};

/// What a pass over some batches found out about one layer; only what was asked for is defined.
struct LayerFacts {
  at::Tensor gradient;         ///< [out, in]: mean over the batches
  at::Tensor covariance;       ///< [in, in]: mean of x x^T over the tokens
  at::Tensor directions;       ///< [r, in]: EVA's
  at::Tensor singular_values;  ///< of the directions, strongest first
  double explained = 0.0;      ///< the share of the inputs' variance in the directions
};

/// For people: how a layer's factors were found.
struct LayerReport {
  std::string layer;
  int64_t rank = 0;
  at::Tensor singular_values;  ///< the leading ones of what was decomposed
  double explained = 0.0;      ///< the share of its squared norm that the start holds
};

/// The rank that a layer of out x in gets when `rank` is asked for: LoRA-GA takes two sets of
/// directions and so at most half of min(out, in).
int64_t rank_of_start(const Kind& kind, int64_t rank, int64_t out, int64_t in);

/// The start of that name. `facts` may be null where the kind needs none. W: [out, in].
Start named_start(const Kind& kind, const at::Tensor& W, const LayerFacts* facts, int64_t rank,
                  double scale, const StartOptions& options, at::Generator generator);

}  // namespace graft::init
