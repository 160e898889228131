#include "../ops/vector_math.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <graft/core/error.h>
#include <graft/core/simd.h>
#include <graft/train/adamw.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

namespace graft::train {
namespace {

constexpr const char* kArea = "adamw";
constexpr int64_t kPiece = 16384;  // elements updated at once by one thread
constexpr const char* kMeanSuffix = ".exp_avg";
constexpr const char* kSquareSuffix = ".exp_avg_sq";

// The step's constants, rounded to the type they are used in.
template <class T>
struct Coefficients {
  T keep;                    // 1 - lr lambda
  T beta1, one_minus_beta1;  //
  T beta2, one_minus_beta2;  //
  T root_bias2, eps;         // sqrt(1 - beta2^t)
  T step_size;               // lr / (1 - beta1^t)
  T grad_scale;              //
};

template <class T>
GRAFT_INLINE void update_body(T* p, const T* gradient, T* m, T* v, int64_t n,
                              const Coefficients<T>& c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T g = gradient[i] * c.grad_scale;
    const T mean = m[i] * c.beta1 + c.one_minus_beta1 * g;
    const T square = v[i] * c.beta2 + c.one_minus_beta2 * g * g;
    m[i] = mean;
    v[i] = square;
    p[i] = p[i] * c.keep - c.step_size * (mean / (std::sqrt(square) / c.root_bias2 + c.eps));
  }
}

GRAFT_SIMD void update(float* p, const float* g, float* m, float* v, int64_t n,
                       const Coefficients<float>& c) {
  update_body(p, g, m, v, n, c);
}
GRAFT_SIMD void update(double* p, const double* g, double* m, double* v, int64_t n,
                       const Coefficients<double>& c) {
  update_body(p, g, m, v, n, c);
}

template <class T>
Coefficients<T> coefficients(const AdamWOptions& options, double lr, double weight_decay,
                             double grad_scale, int64_t t) {
  const double bias1 = 1.0 - std::pow(options.beta1, static_cast<double>(t));
  const double bias2 = 1.0 - std::pow(options.beta2, static_cast<double>(t));
  return {.keep = static_cast<T>(1.0 - lr * weight_decay),
          .beta1 = static_cast<T>(options.beta1),
          .one_minus_beta1 = static_cast<T>(1.0 - options.beta1),
          .beta2 = static_cast<T>(options.beta2),
          .one_minus_beta2 = static_cast<T>(1.0 - options.beta2),
          .root_bias2 = static_cast<T>(std::sqrt(bias2)),
          .eps = static_cast<T>(options.eps),
          .step_size = static_cast<T>(lr / bias1),
          .grad_scale = static_cast<T>(grad_scale)};
}

// A stretch of one parameter's memory and the step's constants for it.
struct Piece {
  at::Tensor parameter, gradient, exp_avg, exp_avg_sq;
  int64_t begin, count;
  double lr, weight_decay;
};

template <class T>
void update_piece(const Piece& piece, const Coefficients<T>& c) {
  update(piece.parameter.mutable_data_ptr<T>() + piece.begin,
         piece.gradient.const_data_ptr<T>() + piece.begin,
         piece.exp_avg.mutable_data_ptr<T>() + piece.begin,
         piece.exp_avg_sq.mutable_data_ptr<T>() + piece.begin, piece.count, c);
}

// The gradient with the parameter's strides, so that both are walked in memory order.
at::Tensor aligned_gradient(const at::Tensor& parameter) {
  const at::Tensor& gradient = parameter.grad();
  if (gradient.strides() == parameter.strides()) return gradient;
  return at::empty_like(parameter).copy_(gradient);
}

// "a, b, c and 4 more"
std::string first_names(const std::vector<std::string>& names) {
  constexpr size_t kShown = 10;
  std::string text;
  for (size_t i = 0; i < std::min(kShown, names.size()); ++i) {
    text += (i == 0 ? "" : ", ") + names[i];
  }
  if (names.size() > kShown) text += concat(" and ", names.size() - kShown, " more");
  return text;
}

void check_options(const AdamWOptions& options) {
  GRAFT_CHECK(options.beta1 >= 0.0 && options.beta1 < 1.0, kArea, "beta1 must be in [0, 1); got ",
              options.beta1);
  GRAFT_CHECK(options.beta2 >= 0.0 && options.beta2 < 1.0, kArea, "beta2 must be in [0, 1); got ",
              options.beta2);
  GRAFT_CHECK(options.eps > 0.0 && std::isfinite(options.eps), kArea, "eps must be > 0; got ",
              options.eps);
}

}  // namespace

AdamW::AdamW(std::vector<ParameterGroup> groups, AdamWOptions options)
    : groups_(std::move(groups)), options_(options) {
  check_options(options_);
  for (size_t group = 0; group < groups_.size(); ++group) {
    const auto& [parameters, lr_scale, weight_decay] = groups_[group];
    GRAFT_CHECK(lr_scale >= 0.0 && std::isfinite(lr_scale), kArea, "lr_scale must be >= 0; got ",
                lr_scale, " (group ", group, ")");
    GRAFT_CHECK(weight_decay >= 0.0 && std::isfinite(weight_decay), kArea,
                "weight_decay must be >= 0; got ", weight_decay, " (group ", group, ")");
    for (const auto& [name, parameter] : parameters) add_parameter(name, parameter, group);
  }
  GRAFT_CHECK(!slots_.empty(), kArea, "there must be a parameter to train; got none");
}

void AdamW::add_parameter(const std::string& name, const at::Tensor& parameter, size_t group) {
  GRAFT_CHECK(parameter.defined() && parameter.device().is_cpu() &&
                  (parameter.scalar_type() == at::kFloat || parameter.scalar_type() == at::kDouble),
              kArea, "a parameter must be float32 or float64 on the CPU; got ",
              parameter.defined() ? parameter.toString() : "undefined", " ('", name, "')");
  GRAFT_CHECK(parameter.is_leaf() && parameter.requires_grad(), kArea,
              "a parameter must be a leaf that requires a gradient; '", name, "' is not");
  GRAFT_CHECK(parameter.is_non_overlapping_and_dense(), kArea,
              "a parameter must be dense in memory; '", name, "' is a view with gaps");
  for (const Slot& slot : slots_) {
    GRAFT_CHECK(slot.name != name, kArea, "names must differ; got '", name, "' twice");
    GRAFT_CHECK(!slot.parameter.is_same(parameter), kArea,
                "a tensor must be listed once; got it as '", slot.name, "' and '", name, "'");
  }
  const at::NoGradGuard no_grad;
  slots_.push_back({name, parameter, at::zeros_like(parameter.detach()),
                    at::zeros_like(parameter.detach()), group});
}

void AdamW::step(double lr, double grad_scale) {
  GRAFT_CHECK(std::isfinite(lr) && lr >= 0.0, kArea, "lr must be finite and >= 0; got ", lr);
  GRAFT_CHECK(std::isfinite(grad_scale), kArea, "grad_scale must be finite; got ", grad_scale);
  const at::NoGradGuard no_grad;
  std::vector<std::string> missing;
  std::vector<Piece> pieces;
  for (const Slot& slot : slots_) {
    if (!slot.parameter.grad().defined()) {
      missing.push_back(slot.name);
      continue;
    }
    GRAFT_CHECK(slot.parameter.grad().layout() == at::kStrided, kArea,
                "a gradient must be dense; '", slot.name, "' has a sparse one");
    const at::Tensor gradient = aligned_gradient(slot.parameter);
    const ParameterGroup& group = groups_[slot.group];
    for (int64_t begin = 0; begin < slot.parameter.numel(); begin += kPiece) {
      pieces.push_back({slot.parameter, gradient, slot.exp_avg, slot.exp_avg_sq, begin,
                        std::min(kPiece, slot.parameter.numel() - begin), lr * group.lr_scale,
                        group.weight_decay});
    }
  }
  GRAFT_CHECK(missing.empty() || options_.allow_missing_gradients, kArea,
              "every parameter must have a gradient; ", missing.size(), " of ", slots_.size(),
              " have none: ", first_names(missing));
  ++step_count_;
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      if (piece.parameter.scalar_type() == at::kFloat) {
        update_piece(piece, coefficients<float>(options_, piece.lr, piece.weight_decay, grad_scale,
                                                step_count_));
      } else {
        update_piece(piece, coefficients<double>(options_, piece.lr, piece.weight_decay, grad_scale,
                                                 step_count_));
      }
    }
  });
  for (const Slot& slot : slots_) {
    // The update went around autograd; a graph that saved the parameter must notice it.
    if (slot.parameter.grad().defined()) slot.parameter.unsafeGetTensorImpl()->bump_version();
  }
}

void AdamW::zero_grad() {
  for (Slot& slot : slots_) slot.parameter.mutable_grad() = at::Tensor();
}

std::vector<at::Tensor> AdamW::parameters() const {
  std::vector<at::Tensor> all;
  for (const Slot& slot : slots_) all.push_back(slot.parameter);
  return all;
}

NamedTensors AdamW::state_dict() const {
  NamedTensors state;
  state.emplace_back("step", at::scalar_tensor(step_count_, at::kLong));
  for (const Slot& slot : slots_) {
    state.emplace_back(slot.name + kMeanSuffix, slot.exp_avg.clone());
    state.emplace_back(slot.name + kSquareSuffix, slot.exp_avg_sq.clone());
  }
  return state;
}

void AdamW::load_state_dict(const NamedTensors& state) {
  NamedTensors targets;  // sharing memory with the slots
  for (const Slot& slot : slots_) {
    targets.emplace_back(slot.name + kMeanSuffix, slot.exp_avg);
    targets.emplace_back(slot.name + kSquareSuffix, slot.exp_avg_sq);
  }
  std::map<std::string, at::Tensor> given(state.begin(), state.end());
  std::vector<std::string> missing, unexpected, unfit;
  int64_t step = -1;
  if (const auto entry = given.find("step"); entry == given.end()) {
    missing.push_back("step");
  } else {
    const at::Tensor& value = entry->second;
    const bool scalar = value.defined() && value.scalar_type() == at::kLong && value.numel() == 1;
    if (scalar) step = value.item<int64_t>();
    if (step < 0) unfit.push_back("step");
  }
  std::set<std::string> known = {"step"};
  for (const auto& [name, target] : targets) {
    known.insert(name);
    const auto entry = given.find(name);
    if (entry == given.end()) {
      missing.push_back(name);
    } else if (const at::Tensor& value = entry->second;
               !value.defined() || value.sizes() != target.sizes() ||
               value.scalar_type() != target.scalar_type()) {
      unfit.push_back(name);
    }
  }
  for (const auto& entry : given) {
    if (!known.contains(entry.first)) unexpected.push_back(entry.first);
  }
  GRAFT_CHECK(
      missing.empty() && unexpected.empty() && unfit.empty() && given.size() == state.size(), kArea,
      "the state must fit the parameters; missing: [", first_names(missing), "], unexpected: [",
      first_names(unexpected), "], of another shape or dtype: [", first_names(unfit),
      "], given twice: ", state.size() - given.size());
  const at::NoGradGuard no_grad;
  for (const auto& [name, target] : targets) target.copy_(given.at(name));
  step_count_ = step;
}

}  // namespace graft::train
