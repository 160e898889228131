#include <ATen/ATen.h>
#include <graft/adapters/lora.h>
#include <graft/core/error.h>
#include <graft/train/lora_pro.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "optimizer_state.h"

namespace graft::train {
namespace {

constexpr const char* kArea = "lora_pro";
constexpr int64_t kBlock = 65536;  // elements of the full-size gradient that exist at once
constexpr const char* kMeanSuffix = ".exp_avg";
constexpr const char* kSquareSuffix = ".exp_avg_sq";

// A tensor of a factor as a float64 matrix; kernel sizes count as columns.
at::Tensor as_matrix(const at::Tensor& tensor) {
  return tensor.detach().reshape({tensor.size(0), -1}).to(at::kDouble);
}

// Q diag(values) Q^T: a Gram matrix with its damping.
struct Gram {
  at::Tensor Q, values;

  Gram(const at::Tensor& gram, double damping) {
    std::tie(values, Q) = at::linalg_eigh(gram);
    const double trace = gram.diagonal().sum().item<double>();
    values = values.clamp_min(0.0) + damping * trace / static_cast<double>(gram.size(0));
  }
  at::Tensor inverse() const {
    const at::Tensor inverses = at::where(values > 0, values.reciprocal(), at::zeros_like(values));
    return (Q * inverses).matmul(Q.t());
  }
};

// A pair in float64, with what its two Gram matrices are needed for.
class Projector {
 public:
  Projector(const at::Tensor& A, const at::Tensor& B, double scale, double damping)
      : A_(A),
        B_(B),
        inverse_square_(1.0 / (scale * scale)),
        gram_B_(B.t().matmul(B), damping),
        gram_A_(A.matmul(A.t()), damping),
        inverse_B_(gram_B_.inverse()),
        inverse_A_(gram_A_.inverse()) {}

  // The member of the family with X = 0.
  LoraProDirection without_x(const at::Tensor& grad_A, const at::Tensor& grad_B) const {
    const at::Tensor rest = grad_B - B_.matmul(inverse_B_.matmul(B_.t().matmul(grad_B)));
    return {
        inverse_B_.matmul(grad_A) * inverse_square_, rest.matmul(inverse_A_) * inverse_square_, {}};
  }

  // The member that is closest to the plain gradients. In the two eigenbases the Sylvester equation
  // is a division.
  LoraProDirection closest(const at::Tensor& grad_A, const at::Tensor& grad_B) const {
    LoraProDirection h = without_x(grad_A, grad_B);
    const at::Tensor right = -h.A.matmul(A_.t());
    // 0 only where both factors are 0, and there so is the right-hand side.
    const at::Tensor sums = (gram_B_.values.unsqueeze(1) + gram_A_.values.unsqueeze(0))
                                .clamp_min(std::numeric_limits<double>::min());
    const at::Tensor rotated = gram_B_.Q.t().matmul(right).matmul(gram_A_.Q);
    h.X = gram_B_.Q.matmul(rotated / sums).matmul(gram_A_.Q.t());
    h.A = h.A + h.X.matmul(A_);
    h.B = h.B - B_.matmul(h.X);
    return h;
  }

 private:
  at::Tensor A_, B_;
  double inverse_square_;
  Gram gram_B_, gram_A_;
  at::Tensor inverse_B_, inverse_A_;
};

// The step's constants of Adam.
struct AdamStep {
  double beta1, beta2, eps, bias1, bias2;
};

// Puts s (B hA + hB A) through Adam's means and returns the factors' gradients of the outcome. Goes
// by blocks of rows, so that beside the means nothing has the size of the layer's weight.
LoraProDirection adam_gradients(const at::Tensor& A, const at::Tensor& B, double scale,
                                const LoraProDirection& h, const at::Tensor& exp_avg,
                                const at::Tensor& exp_avg_sq, const AdamStep& c) {
  LoraProDirection gradients = {at::zeros_like(A), at::empty_like(B), {}};
  const int64_t rows = B.size(0), block = std::max<int64_t>(1, kBlock / A.size(1));
  for (int64_t begin = 0; begin < rows; begin += block) {
    const int64_t count = std::min(block, rows - begin);
    const at::Tensor B_rows = B.narrow(0, begin, count), hB_rows = h.B.narrow(0, begin, count);
    at::Tensor mean = exp_avg.narrow(0, begin, count), square = exp_avg_sq.narrow(0, begin, count);
    const at::Tensor gradient =
        ((B_rows.matmul(h.A) + hB_rows.matmul(A)) * scale).to(mean.scalar_type());
    mean.mul_(c.beta1).add_(gradient, 1.0 - c.beta1);
    square.mul_(c.beta2).addcmul_(gradient, gradient, 1.0 - c.beta2);
    const at::Tensor spread = (square.sqrt() / std::sqrt(c.bias2)).add_(c.eps);
    const at::Tensor direction = (mean / c.bias1).div_(spread).to(at::kDouble);
    gradients.A.add_(B_rows.t().matmul(direction), scale);
    gradients.B.narrow(0, begin, count).copy_(direction.matmul(A.t()) * scale);
  }
  return gradients;
}

bool is_finite(const at::Tensor& tensor) {
  return at::isfinite(tensor).all().item<bool>();
}

void check_factor(const at::Tensor& factor, const std::string& place) {
  GRAFT_CHECK(factor.defined() && factor.device().is_cpu() &&
                  (factor.scalar_type() == at::kFloat || factor.scalar_type() == at::kDouble),
              kArea, "a factor must be float32 or float64 on the CPU; got ",
              factor.defined() ? factor.toString() : "undefined", place);
  GRAFT_CHECK(factor.is_leaf() && factor.requires_grad(), kArea,
              "a factor must be a leaf that requires a gradient; got another", place);
  GRAFT_CHECK(factor.dim() >= 2 && factor.numel() > 0, kArea,
              "a factor must be a matrix or a kernel, and not empty; got shape ", factor.sizes(),
              place);
}

}  // namespace

std::vector<LoraPair> lora_pairs(const AttachedAdapter& adapter) {
  std::vector<LoraPair> pairs;
  for (const AdaptedLayer& layer : adapter.layers()) {
    const auto lora = std::dynamic_pointer_cast<adapters::LoraImpl>(layer.adapter);
    const std::string place = concat(" (layer '", layer.name, "')");
    GRAFT_CHECK(lora, kArea, "only LoRA layers have the factors that this optimiser steps; got ",
                layer.adapter->method(), place);
    GRAFT_CHECK(lora->options.lr_ratio == 1.0, kArea,
                "LoRA+ has no effect here, both lengths follow from the gradient; got lr_ratio=",
                lora->options.lr_ratio, place);
    pairs.push_back({layer.name, lora->lora_A, lora->lora_B, lora->scale});
  }
  std::vector<std::string> others;
  for (const auto& [name, tensor] : adapter.named_parameters()) {
    const bool known = std::any_of(pairs.begin(), pairs.end(), [&](const LoraPair& pair) {
      return pair.A.is_same(tensor) || pair.B.is_same(tensor);
    });
    if (!known) others.push_back(name);
  }
  GRAFT_CHECK(others.empty(), kArea, "only A and B can be trained this way; the adapter trains ",
              others.size(), " other parameters: ", first_names(others));
  return pairs;
}

LoraProDirection lora_pro_direction(const at::Tensor& A, const at::Tensor& B,
                                    const at::Tensor& grad_A, const at::Tensor& grad_B,
                                    double scale, double damping) {
  const at::NoGradGuard no_grad;
  return Projector(as_matrix(A), as_matrix(B), scale, damping)
      .closest(as_matrix(grad_A), as_matrix(grad_B));
}

void LoraProOptions::validate() const {
  GRAFT_CHECK(beta1 >= 0.0 && beta1 < 1.0, kArea, "beta1 must be in [0, 1); got ", beta1);
  GRAFT_CHECK(beta2 >= 0.0 && beta2 < 1.0, kArea, "beta2 must be in [0, 1); got ", beta2);
  GRAFT_CHECK(eps > 0.0 && std::isfinite(eps), kArea, "eps must be > 0; got ", eps);
  GRAFT_CHECK(weight_decay >= 0.0 && std::isfinite(weight_decay), kArea,
              "weight_decay must be >= 0; got ", weight_decay);
  GRAFT_CHECK(damping > 0.0 && damping < 1.0, kArea, "damping must be in (0, 1); got ", damping);
}

LoraPro::LoraPro(std::vector<LoraPair> pairs, LoraProOptions options) : options_(options) {
  options_.validate();
  for (LoraPair& pair : pairs) add_pair(std::move(pair));
  GRAFT_CHECK(!slots_.empty(), kArea, "there must be a pair to train; got none");
}

void LoraPro::add_pair(LoraPair pair) {
  const auto& [name, A, B, scale] = pair;
  const std::string place = concat(" (layer '", name, "')");
  check_factor(A, place);
  check_factor(B, place);
  GRAFT_CHECK(A.scalar_type() == B.scalar_type(), kArea, "A and B must have one type; got ",
              A.toString(), " and ", B.toString(), place);
  const int64_t columns = B.numel() / B.size(0);
  GRAFT_CHECK(columns == A.size(0), kArea,
              "A and B must be [r, in...] and [out, r] (no convolution with groups); got ",
              A.sizes(), " and ", B.sizes(), place);
  GRAFT_CHECK(std::isnormal(scale * scale), kArea, "the scale must be finite and not 0; got ",
              scale, place);
  for (const Slot& slot : slots_) {
    GRAFT_CHECK(slot.pair.name != name, kArea, "names must differ; got '", name, "' twice");
    for (const at::Tensor& factor : {A, B})
      GRAFT_CHECK(!slot.pair.A.is_same(factor) && !slot.pair.B.is_same(factor), kArea,
                  "a tensor must be in one pair; got one in '", slot.pair.name, "' and '", name,
                  "'");
  }
  GRAFT_CHECK(!A.is_same(B), kArea, "A and B must be two tensors; got one", place);
  const at::NoGradGuard no_grad;
  Slot slot = {pair, {}, {}};
  if (options_.form == LoraProForm::adamw) {
    slot.exp_avg = at::zeros({B.size(0), A.numel() / A.size(0)}, A.options().requires_grad(false));
    slot.exp_avg_sq = at::zeros_like(slot.exp_avg);
  }
  slots_.push_back(std::move(slot));
}

void LoraPro::check_gradients() const {
  std::vector<std::string> missing;
  for (const Slot& slot : slots_) {
    if (!slot.pair.A.grad().defined()) missing.push_back(slot.pair.name + " A");
    if (!slot.pair.B.grad().defined()) missing.push_back(slot.pair.name + " B");
  }
  GRAFT_CHECK(missing.empty(), kArea, "every factor must have a gradient; ", missing.size(),
              " have none: ", first_names(missing));
  for (const Slot& slot : slots_) {
    for (const at::Tensor& factor : {slot.pair.A, slot.pair.B}) {
      GRAFT_CHECK(factor.grad().layout() == at::kStrided, kArea,
                  "a gradient must be dense; got a sparse one (layer '", slot.pair.name, "')");
      GRAFT_CHECK(is_finite(factor) && is_finite(factor.grad()), kArea,
                  "factors and gradients must be finite; got others (layer '", slot.pair.name,
                  "')");
    }
  }
}

void LoraPro::step(double lr, double grad_scale) {
  GRAFT_CHECK(std::isfinite(lr) && lr >= 0.0, kArea, "lr must be finite and >= 0; got ", lr);
  GRAFT_CHECK(std::isfinite(grad_scale), kArea, "grad_scale must be finite; got ", grad_scale);
  GRAFT_CHECK(lr * options_.weight_decay < 1.0, kArea, "lr * weight_decay must be below 1; got ",
              lr * options_.weight_decay);
  check_gradients();
  const at::NoGradGuard no_grad;
  ++step_count_;
  const auto t = static_cast<double>(step_count_);
  const AdamStep adam = {options_.beta1, options_.beta2, options_.eps,
                         1.0 - std::pow(options_.beta1, t), 1.0 - std::pow(options_.beta2, t)};
  // Half of the decay for each factor.
  const double keep = std::sqrt(1.0 - lr * options_.weight_decay);
  for (Slot& slot : slots_) {
    const double scale = slot.pair.scale;
    const at::Tensor A = as_matrix(slot.pair.A), B = as_matrix(slot.pair.B);
    const Projector projector(A, B, scale, options_.damping);
    LoraProDirection g = {
        as_matrix(slot.pair.A.grad()) * grad_scale, as_matrix(slot.pair.B.grad()) * grad_scale, {}};
    if (options_.form == LoraProForm::adamw)
      g = adam_gradients(A, B, scale, projector.without_x(g.A, g.B), slot.exp_avg, slot.exp_avg_sq,
                         adam);
    const LoraProDirection h = projector.closest(g.A, g.B);
    slot.pair.A.copy_((A * keep - h.A * lr).view(slot.pair.A.sizes()));
    slot.pair.B.copy_((B * keep - h.B * lr).view(slot.pair.B.sizes()));
  }
}

double LoraPro::grad_norm() const {
  check_gradients();
  const at::NoGradGuard no_grad;
  double square = 0.0;
  for (const Slot& slot : slots_) {
    const auto& [name, A, B, scale] = slot.pair;
    const at::Tensor grad_A = as_matrix(A.grad()), grad_B = as_matrix(B.grad());
    const LoraProDirection h =
        Projector(as_matrix(A), as_matrix(B), scale, options_.damping).without_x(grad_A, grad_B);
    // <G, Gt>, which is |Gt|^2, as Gt is a projection of G.
    square += ((grad_A * h.A).sum() + (grad_B * h.B).sum()).item<double>();
  }
  return std::sqrt(std::max(0.0, square));
}

void LoraPro::zero_grad() {
  for (at::Tensor& factor : parameters()) factor.mutable_grad() = at::Tensor();
}

std::vector<at::Tensor> LoraPro::parameters() const {
  std::vector<at::Tensor> all;
  for (const Slot& slot : slots_) all.insert(all.end(), {slot.pair.A, slot.pair.B});
  return all;
}

NamedTensors LoraPro::means() const {
  NamedTensors list;
  for (const Slot& slot : slots_) {
    if (!slot.exp_avg.defined()) continue;
    list.emplace_back(slot.pair.name + kMeanSuffix, slot.exp_avg);
    list.emplace_back(slot.pair.name + kSquareSuffix, slot.exp_avg_sq);
  }
  return list;
}

NamedTensors LoraPro::state_dict() const {
  NamedTensors state = {{"step", at::scalar_tensor(step_count_, at::kLong)}};
  for (const auto& [name, tensor] : means()) state.emplace_back(name, tensor.clone());
  return state;
}

void LoraPro::load_state_dict(const NamedTensors& state) {
  NamedTensors targets = means();  // sharing memory with the slots
  const at::Tensor step = at::scalar_tensor(step_count_, at::kLong);
  targets.emplace_back("step", step);
  copy_state(kArea, "the pairs", targets, state,
             [](const std::string&, const at::Tensor&) { return true; });
  step_count_ = step.item<int64_t>();
}

}  // namespace graft::train
