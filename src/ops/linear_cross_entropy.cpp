#include "aten_rows.h"
#include "cuda_dispatch.h"
#include "function_arguments.h"
#include "tensor_rows.h"
#include "vector_math.h"

#include <graft/core/simd.h>
#include <graft/ops/frozen_product.h>
#include <graft/ops/linear_cross_entropy.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <limits>
#include <vector>

namespace graft::ops {
namespace {

constexpr const char* kArea = "linear_cross_entropy";

template <class C>
GRAFT_INLINE C max_body(const C* z, int64_t n) {
  C largest = z[0];
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = z[i] > largest ? z[i] : largest;
  return largest;
}

// Sum of e^(z - shift), kept in z when asked for. Blocks keep the rounding of long float32 sums
// small.
template <bool kKeep, class C>
GRAFT_INLINE double exp_sum_body(C* z, C shift, int64_t n) {
  constexpr int64_t kBlock = 2048;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) {
      const C e = fast_exp(z[i] - shift);
      if constexpr (kKeep) z[i] = e;
      sum += e;
    }
    total += sum;
  }
  return total;
}

template <class C>
GRAFT_INLINE void scale_body(C* z, C factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] *= factor;
}

// Function clones exist for plain functions only, hence one set for each type.
#define GRAFT_SOFTMAX_ROWS(C)                               \
  GRAFT_SIMD C max_row(const C* z, int64_t n) {             \
    return max_body(z, n);                                  \
  }                                                         \
  GRAFT_SIMD double exp_sum_row(C* z, C shift, int64_t n) { \
    return exp_sum_body<false>(z, shift, n);                \
  }                                                         \
  GRAFT_SIMD double exp_row(C* z, C shift, int64_t n) {     \
    return exp_sum_body<true>(z, shift, n);                 \
  }                                                         \
  GRAFT_SIMD void scale_row(C* z, C factor, int64_t n) {    \
    scale_body(z, factor, n);                               \
  }
GRAFT_SOFTMAX_ROWS(float)
GRAFT_SOFTMAX_ROWS(double)
#undef GRAFT_SOFTMAX_ROWS

// One row's loss; with a gradient, z becomes scale (softmax(z) - onehot(target)).
template <class C>
double softmax_loss(C* z, int64_t n, int64_t target, bool with_gradient, double scale) {
  const C largest = max_row(z, n);
  const double at_target = z[target];
  const double sum = with_gradient ? exp_row(z, largest, n) : exp_sum_row(z, largest, n);
  if (with_gradient) {
    scale_row(z, static_cast<C>(scale / sum), n);
    z[target] -= static_cast<C>(scale);
  }
  return std::log(sum) + static_cast<double>(largest) - at_target;
}

// The rows' losses on the logits' device.
at::Tensor device_losses(const at::Tensor& logits, const at::Tensor& targets, bool with_gradient,
                         double scale) {
  const DeviceKernels* device = kernels_for({.op = DeviceOp::cross_entropy,
                                             .type = logits.scalar_type(),
                                             .rows = logits.size(0),
                                             .columns = logits.size(1),
                                             .plain = logits.stride(1) == 1},
                                            logits.device());
  return device != nullptr ? device->softmax_loss(logits, targets, with_gradient, scale)
                           : aten::softmax_loss(logits, targets, with_gradient, scale);
}

// The rows' losses into `losses` (fp64); see `softmax_loss` for what happens to the logits.
void softmax_losses(const at::Tensor& logits, const at::Tensor& target_rows, bool with_gradient,
                    double scale, at::Tensor loss_rows) {
  if (on_device(logits)) {
    loss_rows.copy_(device_losses(logits, target_rows, with_gradient, scale));
    return;
  }
  const int64_t* targets = target_rows.const_data_ptr<int64_t>();
  double* losses = loss_rows.mutable_data_ptr<double>();
  const int64_t vocabulary = logits.size(1), stride = logits.stride(0);
  dispatch_float(logits.scalar_type(), [&](auto type) {
    using C = Compute<decltype(type)>;
    C* z = logits.mutable_data_ptr<C>();
    at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        losses[row] =
            softmax_loss(z + row * stride, vocabulary, targets[row], with_gradient, scale);
      }
    });
  });
}

// The rows that count, and their targets.
struct CountedRows {
  std::vector<int64_t> rows, targets;
};

CountedRows counted_rows(const at::Tensor& targets, int64_t vocabulary, int64_t ignore_index) {
  const at::Tensor dense = targets.cpu().contiguous();  // of targets on a device, waits for them
  const int64_t* values = dense.const_data_ptr<int64_t>();
  CountedRows counted;
  for (int64_t i = 0; i < dense.numel(); ++i) {
    if (values[i] == ignore_index) continue;
    GRAFT_CHECK(values[i] >= 0 && values[i] < vocabulary, kArea, "targets must be in [0, ",
                vocabulary, ") or ignore_index=", ignore_index, "; got ", values[i], " (row ", i,
                ")");
    counted.rows.push_back(i);
    counted.targets.push_back(values[i]);
  }
  return counted;
}

// Targets of all rows for `softmax_losses`, found on their device: -1 where a row is ignored.
at::Tensor marked_targets(const at::Tensor& targets, int64_t vocabulary, int64_t ignore_index) {
  return targets.masked_fill(targets < 0, vocabulary).masked_fill_(targets == ignore_index, -1);
}

// Which gradients are wanted.
struct Wanted {
  bool hidden = false, low_hidden = false, low_weight = false;
  bool any() const { return hidden || low_hidden || low_weight; }
};

struct LossAndGradients {
  at::Tensor loss, hidden, low_hidden, low_weight;
};

// The chunked computation over counted rows alone. All sums over chunks go in the chunks' order.
class ChunkedLoss {
 public:
  ChunkedLoss(const at::Tensor& hidden, const at::Tensor& weight, const LowRankLogits& low_rank,
              Wanted wanted)
      : hidden_(hidden), weight_(weight), wanted_(wanted) {
    compute_ = compute_type(hidden.scalar_type());
    if (wanted.hidden) hidden_gradient_ = at::empty(hidden.sizes(), hidden.options());
    if (!low_rank.hidden.defined()) return;
    low_hidden_ = low_rank.hidden.to(compute_);
    low_weight_ = low_rank.weight.to(compute_);
    if (wanted.low_hidden) low_hidden_gradient_ = at::empty_like(low_hidden_);
    if (wanted.low_weight) {
      low_weight_gradient_t_ =
          at::zeros({low_weight_.size(1), low_weight_.size(0)}, low_weight_.options());
    }
  }

  // Rows [begin, begin + count): returns nothing, adds to the gradients, fills the losses.
  void run(int64_t begin, int64_t count, const at::Tensor& targets, double scale,
           const at::Tensor& losses) {
    const at::Tensor h = hidden_.narrow(0, begin, count);
    at::Tensor logits = logits_of(h);
    at::Tensor low;
    if (low_hidden_.defined()) {
      low = low_hidden_.narrow(0, begin, count);
      logits.addmm_(low, low_weight_.t());
    }
    softmax_losses(logits, targets.narrow(0, begin, count), wanted_.any(), scale,
                   losses.narrow(0, begin, count));
    if (wanted_.hidden) {
      hidden_gradient_.narrow(0, begin, count)
          .copy_(frozen_product_backward(logits.to(h.scalar_type()), weight_));
    }
    if (wanted_.low_hidden) {
      low_hidden_gradient_.narrow(0, begin, count).copy_(logits.mm(low_weight_));
    }
    // [r, V], the long dimension last: the other orientation is an order of magnitude slower.
    if (wanted_.low_weight) low_weight_gradient_t_.addmm_(low.t(), logits);
  }

  at::Tensor hidden_gradient() const { return hidden_gradient_; }
  at::Tensor low_hidden_gradient() const { return low_hidden_gradient_; }
  at::Tensor low_weight_gradient() const {
    return wanted_.low_weight ? low_weight_gradient_t_.t().contiguous() : at::Tensor();
  }

 private:
  // fp32 logits go into one buffer for all chunks: fresh memory costs a page fault for every 4 KiB.
  // Its rows lie a cache line further apart than they are long, so that neighbouring rows, which
  // products read side by side, do not compete for the same places of the cache.
  // On a device logits stay in h's type where nothing is added to them: their gradient is rounded
  // to it for the next product anyway.
  at::Tensor logits_of(const at::Tensor& h) {
    if (on_device(h)) {
      const at::Tensor logits = frozen_product(h, weight_);
      return low_hidden_.defined() ? logits.to(compute_) : logits;
    }
    if (h.scalar_type() != at::kFloat || compute_ != at::kFloat)
      return frozen_product(h, weight_).to(compute_).contiguous();
    constexpr int64_t kApart = 16;
    const int64_t vocabulary = weight_.size(0);
    if (!buffer_.defined()) buffer_ = at::empty({h.size(0), vocabulary + kApart}, h.options());
    const at::Tensor logits = buffer_.narrow(0, 0, h.size(0)).narrow(1, 0, vocabulary);
    frozen_product_into(logits, h, weight_);
    return logits;
  }

  at::Tensor buffer_;
  at::Tensor hidden_, weight_, low_hidden_, low_weight_;
  at::Tensor hidden_gradient_, low_hidden_gradient_, low_weight_gradient_t_;
  Wanted wanted_;
  at::ScalarType compute_;
};

// The fewest chunks that fit into the memory, all of one size but the last.
int64_t chunk_rows(const LinearCrossEntropyOptions& options, int64_t count, int64_t vocabulary,
                   at::ScalarType compute) {
  if (options.chunk_rows > 0) return options.chunk_rows;
  const int64_t row_bytes = vocabulary * static_cast<int64_t>(c10::elementSize(compute));
  const int64_t most = std::max<int64_t>(1, options.logits_bytes / row_bytes);
  const int64_t chunks = std::max<int64_t>(1, (count + most - 1) / most);
  return std::max<int64_t>(1, (count + chunks - 1) / chunks);
}

double normalizer_of(const LinearCrossEntropyOptions& options, int64_t counted) {
  if (options.normalizer) return *options.normalizer;
  if (options.reduction == LossReduction::sum) return 1.0;
  GRAFT_CHECK(counted > 0, kArea, "a mean needs a counted target; got none besides ignore_index=",
              options.ignore_index);
  return static_cast<double>(counted);
}

// The sum in an order that does not depend on the number of threads.
at::Tensor sum_in_order(const at::Tensor& losses) {
  if (on_device(losses)) return losses.sum();
  double sum = 0;
  const double* values = losses.const_data_ptr<double>();
  for (int64_t i = 0; i < losses.numel(); ++i) sum += values[i];
  return at::scalar_tensor(sum, losses.options());
}

// Rows of `gradient` back at their places among n rows, zeros elsewhere.
at::Tensor scatter(const at::Tensor& gradient, const at::Tensor& index, int64_t n) {
  if (!gradient.defined() || !index.defined()) return gradient;
  return at::zeros({n, gradient.size(1)}, gradient.options()).index_copy_(0, index, gradient);
}

LossAndGradients compute(const at::Tensor& hidden, const at::Tensor& weight,
                         const at::Tensor& targets, const LinearCrossEntropyOptions& options,
                         const LowRankLogits& low_rank, Wanted wanted) {
  const int64_t n = hidden.size(0), vocabulary = weight.size(0);
  const bool wait = !options.without_waiting || !on_device(hidden);
  const CountedRows counted =
      wait ? counted_rows(targets, vocabulary, options.ignore_index) : CountedRows{};
  const int64_t count = wait ? static_cast<int64_t>(counted.rows.size()) : n;
  const double scale = 1.0 / normalizer_of(options, count);
  const auto compute = compute_type(hidden.scalar_type());

  at::Tensor index;  // undefined: all rows
  if (count < n) index = at::tensor(counted.rows, at::kLong).to(hidden.device());
  const auto gathered = [&](const at::Tensor& t) {
    return t.defined() && index.defined() ? t.index_select(0, index) : t;
  };
  ChunkedLoss chunks(gathered(hidden), weight, {gathered(low_rank.hidden), low_rank.weight},
                     wanted);
  const int64_t step = chunk_rows(options, count, vocabulary, compute);
  const at::Tensor wanted_ids = wait ? at::tensor(counted.targets, at::kLong).to(hidden.device())
                                     : marked_targets(targets, vocabulary, options.ignore_index),
                   losses = at::empty({count}, hidden.options().dtype(at::kDouble));
  for (int64_t begin = 0; begin < count; begin += step)
    chunks.run(begin, std::min(step, count - begin), wanted_ids, scale, losses);
  return {sum_in_order(losses).mul_(scale).to(compute), scatter(chunks.hidden_gradient(), index, n),
          scatter(chunks.low_hidden_gradient(), index, n), chunks.low_weight_gradient()};
}

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& hidden,
                            const std::optional<at::Tensor>& low_hidden,
                            const std::optional<at::Tensor>& low_weight, const at::Tensor& weight,
                            const at::Tensor& targets, const LinearCrossEntropyOptions& options,
                            Wanted wanted) {
    const LowRankLogits low_rank{low_hidden.value_or(at::Tensor()),
                                 low_weight.value_or(at::Tensor())};
    LossAndGradients result = compute(hidden, weight, targets, options, low_rank, wanted);
    const auto as_stored = [](const at::Tensor& gradient, const at::Tensor& input) {
      return gradient.defined() ? gradient.to(input.scalar_type()) : gradient;
    };
    ctx->save_for_backward({result.hidden, as_stored(result.low_hidden, low_rank.hidden),
                            as_stored(result.low_weight, low_rank.weight)});
    return result.loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list gradients) {
    refuse_double_backward(kArea);
    torch::autograd::variable_list result(7);
    const auto saved = ctx->get_saved_variables();
    for (size_t i = 0; i < saved.size(); ++i) {
      if (saved[i].defined()) result[i] = saved[i] * gradients[0].to(saved[i].scalar_type());
    }
    return result;
  }
};

void check_low_rank(const LowRankLogits& low_rank, const at::Tensor& hidden,
                    const at::Tensor& weight) {
  const at::Tensor &a = low_rank.hidden, &b = low_rank.weight;
  GRAFT_CHECK(a.defined() == b.defined(), kArea,
              "the low-rank part needs both hidden and weight or neither");
  if (!a.defined()) return;
  check_float(a, kArea, "low_rank.hidden");
  check_float(b, kArea, "low_rank.weight");
  check_one_device(kArea, {hidden, a, b});
  GRAFT_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == hidden.size(0) &&
                  b.size(0) == weight.size(0) && a.size(1) == b.size(1),
              kArea, "the low-rank part must be hidden [n, r] and weight [V, r]; got ", shape_of(a),
              " and ", shape_of(b), " for n=", hidden.size(0), ", V=", weight.size(0));
}

void check_arguments(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                     const LinearCrossEntropyOptions& options, const LowRankLogits& low_rank) {
  check_float(hidden, kArea, "hidden");
  check_float(weight, kArea, "weight");
  check_one_device(kArea, {hidden, weight});
  GRAFT_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) &&
                  weight.size(0) > 0,
              kArea, "hidden must be [n, k] and weight [V, k], V >= 1; got ", shape_of(hidden),
              " and ", shape_of(weight));
  GRAFT_CHECK(!weight.requires_grad(), kArea,
              "weight must be frozen; got one that requires a gradient (train the head through a "
              "low-rank part)");
  GRAFT_CHECK(targets.defined() &&
                  (targets.device().is_cpu() || targets.device() == hidden.device()) &&
                  targets.scalar_type() == at::kLong && targets.dim() == 1 &&
                  targets.size(0) == hidden.size(0),
              kArea, "targets must be int64 [n]; got ", shape_of(targets), " for hidden ",
              shape_of(hidden));
  GRAFT_CHECK(
      !options.normalizer || (std::isfinite(*options.normalizer) && *options.normalizer > 0.0),
      kArea, "normalizer must be > 0; got ", *options.normalizer);
  GRAFT_CHECK(!options.without_waiting || !on_device(hidden) ||
                  (targets.device() == hidden.device() &&
                   (options.normalizer || options.reduction == LossReduction::sum)),
              kArea, "without_waiting needs targets on ", hidden.device().str(),
              " and a normalizer or a sum; got targets on ", targets.device().str(),
              options.normalizer ? ", a normalizer" : ", no normalizer");
  GRAFT_CHECK(options.chunk_rows >= 0, kArea, "chunk_rows must be >= 0; got ", options.chunk_rows);
  GRAFT_CHECK(options.logits_bytes > 0, kArea, "logits_bytes must be > 0; got ",
              options.logits_bytes);
  check_low_rank(low_rank, hidden, weight);
}

}  // namespace

at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& targets, const LinearCrossEntropyOptions& options,
                                const LowRankLogits& low_rank) {
  check_arguments(hidden, weight, targets, options, low_rank);
  const auto trained = [](const at::Tensor& t) {
    return at::GradMode::is_enabled() && t.defined() && t.requires_grad();
  };
  const Wanted wanted{trained(hidden), trained(low_rank.hidden), trained(low_rank.weight)};
  if (!wanted.any()) return compute(hidden, weight, targets, options, low_rank, wanted).loss;
  return LinearCrossEntropyFunction::apply(hidden, optional(low_rank.hidden),
                                           optional(low_rank.weight), weight, targets, options,
                                           wanted);
}

}  // namespace graft::ops
