#include <graft/core/error.h>
#include <graft/train/grad_scaler.h>

#include <algorithm>
#include <cmath>

namespace graft::train {
namespace {

constexpr const char* kArea = "grad_scaler";

bool is_scale(double value) {
  return std::isfinite(value) && value > 0.0;
}

}  // namespace

GradScaler::GradScaler(const GradScalerOptions& options)
    : options_(options), scale_(options.initial) {
  GRAFT_CHECK(is_scale(options.initial), kArea, "initial must be > 0; got ", options.initial);
  GRAFT_CHECK(std::isfinite(options.growth) && options.growth > 1.0, kArea,
              "growth must be > 1; got ", options.growth);
  GRAFT_CHECK(options.backoff > 0.0 && options.backoff < 1.0, kArea,
              "backoff must be in (0, 1); got ", options.backoff);
  GRAFT_CHECK(options.interval >= 1, kArea, "interval must be >= 1; got ", options.interval);
  GRAFT_CHECK(options.least > 0.0 && options.least <= options.initial, kArea,
              "least must be in (0, initial]; got ", options.least,
              " for initial=", options.initial);
}

bool GradScaler::update(bool finite) {
  if (!finite) {
    ++skipped_;
    finite_steps_ = 0;
    scale_ = std::max(options_.least, scale_ * options_.backoff);
    return false;
  }
  if (++finite_steps_ == options_.interval) {
    finite_steps_ = 0;
    if (is_scale(scale_ * options_.growth)) scale_ *= options_.growth;
  }
  return true;
}

void GradScaler::restore(double scale, int64_t finite_steps, int64_t skipped) {
  GRAFT_CHECK(is_scale(scale), kArea, "the scale must be > 0; got ", scale);
  GRAFT_CHECK(finite_steps >= 0 && skipped >= 0, kArea, "counts must be >= 0; got ", finite_steps,
              " and ", skipped);
  scale_ = scale;
  finite_steps_ = finite_steps;
  skipped_ = skipped;
}

}  // namespace graft::train
