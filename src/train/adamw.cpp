#include "../ops/aten_rows.h"
#include "../ops/cuda_dispatch.h"
#include "../ops/vector_math.h"
#include "optimizer_state.h"

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
constexpr const char* kRowStepsSuffix = ".row_steps";

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

// Elements of one parameter's memory that have taken the same number of steps: `count` from `begin`
// on, and again `stride` further, `repeat` times in all.
struct Stretch {
  int64_t begin, count, repeat, stride;
  int64_t t;  // steps taken, this one included
};

// Splits elements [0, n) for the threads.
std::vector<Stretch> whole_stretches(int64_t first, int64_t n, int64_t t) {
  std::vector<Stretch> list;
  for (int64_t i = 0; i < n; i += kPiece)
    list.push_back({first + i, std::min(kPiece, n - i), 1, 0, t});
  return list;
}

// The live rows of a contiguous parameter. Neighbours that have taken equally many steps go
// together, so that a window of all rows is one stretch, as it is without live rows.
std::vector<Stretch> row_stretches(at::IntArrayRef shape, const nn::LiveRows& live,
                                   const int64_t* row_steps) {
  const int64_t outer = c10::multiply_integers(shape.begin(), shape.begin() + live.dim),
                inner = c10::multiply_integers(shape.begin() + live.dim + 1, shape.end()),
                stride = shape[live.dim] * inner;
  std::vector<Stretch> list;
  for (int64_t row = live.begin, next; row < live.end; row = next) {
    next = row + 1;
    while (next < live.end && row_steps[next] == row_steps[row]) ++next;
    const int64_t count = (next - row) * inner, t = row_steps[row] + 1;
    if (outer == 1 || count == stride) {
      const auto whole = whole_stretches(row * inner, outer * count, t);
      list.insert(list.end(), whole.begin(), whole.end());
      continue;
    }
    const int64_t at_once = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, count));
    for (int64_t o = 0; o < outer; o += at_once)
      list.push_back({o * stride + row * inner, count, std::min(at_once, outer - o), stride, t});
  }
  return list;
}

// Work for one thread.
struct Piece {
  at::Tensor parameter, gradient, exp_avg, exp_avg_sq;
  Stretch stretch;
  double lr, weight_decay;
};

template <class T>
void update_piece(const Piece& piece, const Coefficients<T>& c) {
  for (int64_t k = 0; k < piece.stretch.repeat; ++k) {
    const int64_t begin = piece.stretch.begin + k * piece.stretch.stride;
    update(piece.parameter.mutable_data_ptr<T>() + begin,
           piece.gradient.const_data_ptr<T>() + begin, piece.exp_avg.mutable_data_ptr<T>() + begin,
           piece.exp_avg_sq.mutable_data_ptr<T>() + begin, piece.stretch.count, c);
  }
}

// The pieces of each number of steps t together: they share their constants.
void update_on_device(const std::vector<Piece>& pieces, const AdamWOptions& options,
                      double grad_scale) {
  std::map<int64_t, std::vector<ops::AdamwStretch>> by_t;
  int64_t numbers = 0;
  bool one_type = true;
  for (const Piece& piece : pieces) {
    one_type = one_type && piece.parameter.scalar_type() == at::kFloat;
    numbers += piece.stretch.count * piece.stretch.repeat;
    const auto c =
        coefficients<double>(options, piece.lr, piece.weight_decay, grad_scale, piece.stretch.t);
    for (int64_t k = 0; k < piece.stretch.repeat; ++k)
      by_t[piece.stretch.t].push_back({piece.parameter, piece.gradient, piece.exp_avg,
                                       piece.exp_avg_sq,
                                       piece.stretch.begin + k * piece.stretch.stride,
                                       piece.stretch.count, c.keep, c.step_size});
  }
  const at::Tensor& first = pieces.front().parameter;
  const auto* kernels = ops::kernels_for({.op = ops::DeviceOp::adamw,
                                          .type = first.scalar_type(),
                                          .rows = numbers,
                                          .one_type = one_type},
                                         first.device());
  for (const auto& [t, stretches] : by_t) {
    const auto c = coefficients<double>(options, 0, 0, grad_scale, t);
    const ops::AdamwConstants constants{options.beta1, options.beta2, c.root_bias2, options.eps,
                                        grad_scale};
    if (kernels != nullptr) {
      kernels->adamw(stretches, constants);
    } else {
      for (const ops::AdamwStretch& stretch : stretches) ops::aten::adamw(stretch, constants);
    }
  }
}

void update_pieces(const std::vector<Piece>& pieces, const AdamWOptions& options,
                   double grad_scale) {
  if (!pieces.empty() && ops::on_device(pieces.front().parameter))
    return update_on_device(pieces, options, grad_scale);
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      const auto update_as = [&](auto zero) {
        using T = decltype(zero);
        update_piece(piece, coefficients<T>(options, piece.lr, piece.weight_decay, grad_scale,
                                            piece.stretch.t));
      };
      piece.parameter.scalar_type() == at::kFloat ? update_as(0.0f) : update_as(0.0);
    }
  });
}

// The gradient with the parameter's strides, so that both are walked in memory order.
at::Tensor aligned_gradient(const at::Tensor& parameter) {
  const at::Tensor& gradient = parameter.grad();
  if (gradient.strides() == parameter.strides()) return gradient;
  return at::empty_like(parameter).copy_(gradient);
}

// Whether each row has taken at most as many steps as the optimiser.
bool are_row_steps(const at::Tensor& value, int64_t step) {
  return value.scalar_type() != at::kLong ||
         (value.ge(0).all().item<bool>() && value.le(step).all().item<bool>());
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
    const auto& [parameters, lr_scale, weight_decay, live_rows] = groups_[group];
    GRAFT_CHECK(lr_scale >= 0.0 && std::isfinite(lr_scale), kArea, "lr_scale must be >= 0; got ",
                lr_scale, " (group ", group, ")");
    GRAFT_CHECK(weight_decay >= 0.0 && std::isfinite(weight_decay), kArea,
                "weight_decay must be >= 0; got ", weight_decay, " (group ", group, ")");
    for (const auto& [name, parameter] : parameters) add_parameter(name, parameter, group);
    for (const auto& entry : live_rows) {
      const auto slot = std::find_if(slots_.begin(), slots_.end(), [&](const Slot& s) {
        return s.group == group && s.name == entry.first;
      });
      GRAFT_CHECK(slot != slots_.end(), kArea,
                  "live rows must be of a parameter of the group; got '", entry.first, "' (group ",
                  group, ")");
      slot->live_rows = entry.second;
      add_live_rows(*slot);
    }
  }
  GRAFT_CHECK(!slots_.empty(), kArea, "there must be a parameter to train; got none");
}

void AdamW::add_parameter(const std::string& name, const at::Tensor& parameter, size_t group) {
  GRAFT_CHECK(parameter.defined() && (parameter.device().is_cpu() || parameter.is_cuda()) &&
                  (parameter.scalar_type() == at::kFloat || parameter.scalar_type() == at::kDouble),
              kArea, "a parameter must be float32 or float64 on the CPU or a GPU; got ",
              parameter.defined() ? parameter.toString() : "undefined", " ('", name, "')");
  GRAFT_CHECK(parameter.is_leaf() && parameter.requires_grad(), kArea,
              "a parameter must be a leaf that requires a gradient; '", name, "' is not");
  GRAFT_CHECK(parameter.is_non_overlapping_and_dense(), kArea,
              "a parameter must be dense in memory; '", name, "' is a view with gaps");
  if (!slots_.empty()) ops::check_one_device(kArea, {slots_.front().parameter, parameter});
  for (const Slot& slot : slots_) {
    GRAFT_CHECK(slot.name != name, kArea, "names must differ; got '", name, "' twice");
    GRAFT_CHECK(!slot.parameter.is_same(parameter), kArea,
                "a tensor must be listed once; got it as '", slot.name, "' and '", name, "'");
  }
  const at::NoGradGuard no_grad;
  slots_.push_back({name,
                    parameter,
                    at::zeros_like(parameter.detach()),
                    at::zeros_like(parameter.detach()),
                    group,
                    {},
                    0,
                    {}});
}

void AdamW::add_live_rows(Slot& slot) const {
  GRAFT_CHECK(slot.parameter.is_contiguous(), kArea,
              "a parameter with live rows must be contiguous; '", slot.name, "' is not");
  slot.dim = slot.live_rows().dim;
  GRAFT_CHECK(slot.dim >= 0 && slot.dim < slot.parameter.dim(), kArea,
              "the dimension of live rows must be in [0, ", slot.parameter.dim(), "); got ",
              slot.dim, " ('", slot.name, "')");
  slot.row_steps = at::zeros({slot.parameter.size(slot.dim)}, at::kLong);
}

nn::LiveRows AdamW::checked_live_rows(const Slot& slot) const {
  const nn::LiveRows live = slot.live_rows();
  const int64_t rows = slot.row_steps.numel();
  GRAFT_CHECK(live.dim == slot.dim && live.begin >= 0 && live.begin <= live.end && live.end <= rows,
              kArea, "live rows must be in [0, ", rows, ") of dimension ", slot.dim, "; got [",
              live.begin, ", ", live.end, ") of dimension ", live.dim, " ('", slot.name, "')");
  return live;
}

void AdamW::step(double lr, double grad_scale) {
  GRAFT_CHECK(std::isfinite(lr) && lr >= 0.0, kArea, "lr must be finite and >= 0; got ", lr);
  GRAFT_CHECK(std::isfinite(grad_scale), kArea, "grad_scale must be finite; got ", grad_scale);
  const at::NoGradGuard no_grad;
  std::vector<std::string> missing;
  std::vector<Piece> pieces;
  std::vector<at::Tensor> stepped_rows;  // the live part of each row_steps
  for (const Slot& slot : slots_) {
    if (!slot.parameter.grad().defined()) {
      missing.push_back(slot.name);
      continue;
    }
    GRAFT_CHECK(slot.parameter.grad().layout() == at::kStrided, kArea,
                "a gradient must be dense; '", slot.name, "' has a sparse one");
    std::vector<Stretch> stretches;
    if (slot.live_rows) {
      const nn::LiveRows live = checked_live_rows(slot);
      stretches =
          row_stretches(slot.parameter.sizes(), live, slot.row_steps.const_data_ptr<int64_t>());
      stepped_rows.push_back(slot.row_steps.narrow(0, live.begin, live.end - live.begin));
    } else {
      stretches = whole_stretches(0, slot.parameter.numel(), step_count_ + 1);
    }
    const at::Tensor gradient = aligned_gradient(slot.parameter);
    const ParameterGroup& group = groups_[slot.group];
    for (const Stretch& stretch : stretches)
      pieces.push_back({slot.parameter, gradient, slot.exp_avg, slot.exp_avg_sq, stretch,
                        lr * group.lr_scale, group.weight_decay});
  }
  GRAFT_CHECK(missing.empty() || options_.allow_missing_gradients, kArea,
              "every parameter must have a gradient; ", missing.size(), " of ", slots_.size(),
              " have none: ", first_names(missing));
  ++step_count_;
  for (at::Tensor& rows : stepped_rows) rows.add_(1);
  update_pieces(pieces, options_, grad_scale);
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
    if (slot.live_rows) state.emplace_back(slot.name + kRowStepsSuffix, slot.row_steps.clone());
  }
  return state;
}

void AdamW::load_state_dict(const NamedTensors& state) {
  const at::Tensor step = at::scalar_tensor(step_count_, at::kLong);
  NamedTensors targets = {{"step", step}};  // the others share memory with the slots
  for (const Slot& slot : slots_) {
    targets.emplace_back(slot.name + kMeanSuffix, slot.exp_avg);
    targets.emplace_back(slot.name + kSquareSuffix, slot.exp_avg_sq);
    if (slot.live_rows) targets.emplace_back(slot.name + kRowStepsSuffix, slot.row_steps);
  }
  const int64_t given_step = stored_step(state);
  copy_state(kArea, "the parameters", targets, state,
             [&](const std::string& name, const at::Tensor& value) {
               return !name.ends_with(kRowStepsSuffix) || are_row_steps(value, given_step);
             });
  step_count_ = step.item<int64_t>();
}

}  // namespace graft::train
