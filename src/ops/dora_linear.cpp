#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/dora_linear.h>
#include <graft/ops/frozen_product.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "cuda_dispatch.h"
#include "dora_rows.h"
#include "function_arguments.h"
#include "kept_rows.h"
#include "lora_device.h"
#include "tensor_rows.h"

namespace graft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Below this, y - b = c z holds too few digits of z to divide by c.
constexpr double kSmallScale = 1.0 / 64;
// A squared norm this much smaller than its terms has lost its digits to cancellation.
constexpr double kCancelled = 1e-3;

// The arguments whose gradients `backward` returns, in their order; more arguments follow.
enum Input { kX, kWeight, kBias, kA, kB, kMagnitude, kInputs };
constexpr int kArguments = kInputs + 4;

class DoraLinear : public torch::autograd::Function<DoraLinear> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& base_bias, const at::Tensor& A,
                            const at::Tensor& B, const at::Tensor& magnitude,
                            const at::Tensor& norm, double scale, const Dropout& dropout,
                            bool drop_base) {
    const at::Tensor bias = base_bias.value_or(at::Tensor());
    const auto master = A.scalar_type();
    const at::Tensor rows = x.reshape({-1, weight.size(1)});
    const LowRankLayer layer{weight, bias, A, B, {}, {}, {}, magnitude, norm, scale, dropout};
    if (const DeviceKernels* kernels = dora_kernels(rows, layer, drop_base))
      return forward_by(*kernels, ctx, x, rows, layer);
    const at::Tensor c = dora_scale(magnitude, norm);
    at::Tensor y = frozen_product(rows, weight, bias).to(master);
    const at::Tensor dropped = apply_dropout(rows.to(master), dropout);
    const at::Tensor S = thin_product(dropped, A);
    at::Tensor dropped_product;  // drop(x) W^T
    const at::Tensor right = (B * (c * scale).unsqueeze(1)).t();
    // Forms in which c = 1 leaves every bit of y.
    if (drop_base) {
      dropped_product = frozen_product(dropped.to(rows.scalar_type()), weight).to(master);
      y.addcmul_(dropped_product, c - 1).addmm_(S, right);
    } else {
      scale_and_add_(y, c, bias.defined() ? bias.to(master) : bias, S, right);
    }

    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = weight.size(0);
    // Not a view: callers may add to it in place.
    const at::Tensor out = at::_unsafe_view(y.to(x.scalar_type()), shape);

    const int64_t wanted = save_options(ctx, x, layer, drop_base);
    const bool needs_rows = (wanted & (1 << kWeight | 1 << kA | 1 << kMagnitude)) != 0;
    ctx->save_for_backward({keep_rows(ctx, x, rows, needs_rows), S, weight, bias, A, B, magnitude,
                            norm, dropped_product});
    if ((wanted >> kMagnitude & 1) != 0 && !drop_base && !out.is_inference()) {
      // An alias rather than y itself, which owns this context; it shares y's version.
      ctx->saved_data["y"] = out.detach();
      ctx->saved_data["version"] = static_cast<int64_t>(out._version());
    }
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("dora");
    if (ctx->saved_data.count("kernels") != 0) return backward_by(*device_kernels(), ctx, grads);
    variable_list saved = ctx->get_saved_variables();
    saved[0] = kept_rows(ctx, saved[0]);
    const at::Tensor &rows = saved[0], &S = saved[1], &weight = saved[2], &A = saved[4],
                     &B = saved[5], &norm = saved[7];
    const int64_t mask = ctx->saved_data["wanted"].toInt();
    const auto wanted = [mask](Input input) { return (mask >> input & 1) != 0; };
    const bool drop_base = ctx->saved_data["drop_base"].toBool();
    const double scale = ctx->saved_data["scale"].toDouble();
    const Dropout dropout = saved_dropout(ctx);
    const auto master = A.scalar_type();
    const at::Tensor dy = grads[0].reshape({-1, weight.size(0)}), G = dy.to(master);
    const at::Tensor c = dora_scale(saved[6], norm);

    variable_list result(kArguments);
    at::Tensor scaled;  // c * G, where another pass over G makes it
    if (wanted(kB) || wanted(kMagnitude)) {
      // The long dimension last in the output, where matrix libraries are fast.
      const at::Tensor D = thin_product(S.t(), G.t()).mul_(scale).t();
      if (wanted(kB)) result[kB] = D * c.unsqueeze(1);
      if (wanted(kMagnitude)) {
        const at::Tensor branch = (D * B).sum(1);
        const at::Tensor sums =
            drop_base ? column_sums(G, saved[8], {}) + branch
                      : token_sums(ctx, saved, G, c, branch, wanted(kX) ? &scaled : nullptr);
        result[kMagnitude] = at::where(norm > 0, sums / norm, 0.0);
      }
    }
    at::Tensor U;
    if (wanted(kA) || wanted(kX)) U = thin_product(G, (B * c.unsqueeze(1)).t()).mul_(scale);
    if (wanted(kA)) result[kA] = thin_product(U.t(), apply_dropout(rows.to(master), dropout).t());
    if (wanted(kX)) {
      std::vector<int64_t> shape = grads[0].sizes().vec();
      shape.back() = weight.size(1);
      if (!drop_base && !scaled.defined()) scaled = G * c;
      result[kX] = input_gradient(G, scaled, dy.scalar_type(), weight, A, U, c, dropout)
                       .to(dy.scalar_type())
                       .view(shape);
    }
    if (wanted(kWeight)) {
      const at::Tensor x = rows.to(master);
      result[kWeight] =
          (drop_base ? at::mm(G.t(), x) + at::mm((G * (c - 1)).t(), apply_dropout(x, dropout))
                     : at::mm((G * c).t(), x))
              .to(weight.scalar_type());
    }
    if (wanted(kBias)) result[kBias] = dy.sum(0);
    return result;
  }

 private:
  // What backward must know besides tensors; returns the wanted gradients, one bit an input.
  static int64_t save_options(AutogradContext* ctx, const at::Tensor& x, const LowRankLayer& layer,
                              bool drop_base) {
    int64_t wanted = 0, input = 0;
    for (const at::Tensor* tensor :
         {&x, &layer.weight, &layer.bias, &layer.A, &layer.B, &layer.magnitude})
      wanted |= int64_t{tensor->defined() && tensor->requires_grad()} << input++;
    ctx->saved_data["wanted"] = wanted;
    ctx->saved_data["scale"] = layer.scale;
    ctx->saved_data["drop_base"] = drop_base;
    save_dropout(ctx, layer.dropout);
    return wanted;
  }

  static at::Tensor forward_by(const DeviceKernels& kernels, AutogradContext* ctx,
                               const at::Tensor& x, const at::Tensor& rows,
                               const LowRankLayer& layer) {
    const int64_t wanted = save_options(ctx, x, layer, false);
    const bool keep_z = (wanted >> kMagnitude & 1) != 0;
    const LayerOutput out = dora_forward(kernels, rows, layer, keep_z);
    ctx->saved_data["kernels"] = true;
    const bool needs_rows = (wanted & (1 << kWeight | 1 << kA)) != 0;
    ctx->save_for_backward({keep_rows(ctx, x, rows, needs_rows), out.hidden, layer.weight, out.z,
                            layer.A, layer.B, layer.magnitude, layer.norm});
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = layer.weight.size(0);
    return at::_unsafe_view(out.y, shape);
  }

  static variable_list backward_by(const DeviceKernels& kernels, AutogradContext* ctx,
                                   const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t mask = ctx->saved_data["wanted"].toInt();
    const auto wanted = [mask](Input input) { return (mask >> input & 1) != 0; };
    const at::Tensor rows = kept_rows(ctx, saved[0]);
    const LowRankLayer layer{saved[2],
                             {},
                             saved[4],
                             saved[5],
                             {},
                             {},
                             {},
                             saved[6],
                             saved[7],
                             ctx->saved_data["scale"].toDouble(),
                             saved_dropout(ctx)};
    const at::Tensor dy = grads[0].reshape({-1, layer.weight.size(0)});
    const LayerGradients g = dora_backward(
        kernels, dy, rows, saved[1], saved[3], layer,
        {.x = wanted(kX), .A = wanted(kA), .B = wanted(kB), .magnitude = wanted(kMagnitude)});
    variable_list result(kArguments);
    std::vector<int64_t> shape = grads[0].sizes().vec();
    shape.back() = layer.weight.size(1);
    if (wanted(kX)) result[kX] = g.x.view(shape);
    result[kA] = g.A;
    result[kB] = g.B;
    result[kMagnitude] = g.magnitude;
    if (wanted(kWeight)) result[kWeight] = at::mm(g.dz.t(), rows).to(layer.weight.scalar_type());
    if (wanted(kBias)) result[kBias] = dy.sum(0);
    return result;
  }

  // sum_t G_ti z_ti for z = x W^T + s S B^T: from y where it still says what z was. `branch`: the
  // share of s S B^T. `scaled`: may be given c * G, or stay undefined.
  static at::Tensor token_sums(AutogradContext* ctx, const variable_list& saved,
                               const at::Tensor& G, const at::Tensor& c, const at::Tensor& branch,
                               at::Tensor* scaled) {
    const at::Tensor &rows = saved[0], &weight = saved[2], &bias = saved[3];
    const auto entry = ctx->saved_data.find("y");
    if (entry == ctx->saved_data.end())
      return column_sums(G, frozen_product(rows, weight), {}) + branch;
    const at::Tensor y = entry->second.toTensor();
    const bool changed = y._version() != ctx->saved_data["version"].toInt();
    ctx->saved_data.erase(entry);  // a second backward pass multiplies again
    if (changed) return column_sums(G, frozen_product(rows, weight), {}) + branch;
    at::Tensor sums = column_sums(G, y.reshape(G.sizes()), bias, c, scaled) / c;
    const at::Tensor small = at::nonzero(c.abs() < kSmallScale).squeeze(1);
    if (small.size(0) > 0) {
      const at::Tensor product = frozen_product(rows, weight.index_select(0, small));
      sums.index_copy_(
          0, small,
          column_sums(G.index_select(1, small), product, {}) + branch.index_select(0, small));
    }
    return sums;
  }

  // `scaled`: c * G; undefined where dropout works on the base product too.
  static at::Tensor input_gradient(const at::Tensor& G, const at::Tensor& scaled,
                                   at::ScalarType type, const at::Tensor& weight,
                                   const at::Tensor& A, const at::Tensor& U, const at::Tensor& c,
                                   const Dropout& dropout) {
    const auto master = A.scalar_type();
    const auto through_base = [&](const at::Tensor& g) {
      return frozen_product_backward(g.to(type), weight).to(master);
    };
    if (!dropout.active()) return through_base(scaled).addmm_(U, A);
    const bool drop_base = !scaled.defined();
    at::Tensor dx = through_base(drop_base ? G : scaled);
    at::Tensor dropped = at::mm(U, A);
    if (drop_base) dropped.add_(through_base(G * (c - 1)));
    add_dropped_(dx, dropped, dropout);
    return dx;
  }
};

void check_vector(const at::Tensor& vector, int64_t size, const char* name) {
  GRAFT_CHECK(vector.defined() && vector.dim() == 1 && vector.size(0) == size, "dora", name,
              " must hold one number an output: [", size, "]; got ", shape_of(vector));
}

}  // namespace

at::Tensor dora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       const DoraTerm& term) {
  check_dropout(term.dropout.p, "dora");
  GRAFT_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), "dora",
              "the input's last dimension must match the weight [out, in]; got ", x.sizes(),
              " and ", weight.sizes());
  GRAFT_CHECK(term.A.dim() == 2 && term.B.dim() == 2 && term.A.size(1) == weight.size(1) &&
                  term.B.size(0) == weight.size(0) && term.A.size(0) == term.B.size(1),
              "dora", "A must be [r, in] and B [out, r] for a weight of ", weight.sizes(), "; got ",
              term.A.sizes(), " and ", term.B.sizes());
  check_vector(term.magnitude, weight.size(0), "the magnitude");
  check_vector(term.norm, weight.size(0), "the norm");
  check_float(term.A, "dora", "A");
  check_one_device("dora", {x, weight, bias, term.A, term.B, term.magnitude, term.norm});
  // An undefined tensor is no valid argument of a Function; an empty optional is.
  return DoraLinear::apply(x, weight, optional(bias), term.A, term.B, term.magnitude,
                           term.norm.detach(), term.scale, term.dropout,
                           term.dropout_on_base && term.dropout.active());
}

at::Tensor dora_scale(const at::Tensor& magnitude, const at::Tensor& norm) {
  const at::Tensor positive = norm > 0;
  return at::where(positive, magnitude / at::where(positive, norm, 1.0), 1.0);
}

at::Tensor row_squares(const at::Tensor& weight) {
  const at::NoGradGuard no_grad;
  GRAFT_CHECK(weight.dim() == 2 && at::isFloatingType(weight.scalar_type()), "dora",
              "a weight must be a floating-point matrix; got ", weight.toString(), " of ",
              weight.sizes());
  const int64_t rows = weight.size(0);
  const int64_t block =
      std::max<int64_t>(1, (int64_t{1} << 20) / std::max<int64_t>(1, weight.size(1)));
  at::Tensor squares = at::empty({rows}, weight.options().dtype(at::kDouble));
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t count = std::min(block, rows - first);
    at::Tensor part = squares.narrow(0, first, count);
    part.copy_(weight.narrow(0, first, count).to(at::kDouble).square().sum(1));
  }
  return squares;
}

at::Tensor dora_norm(const at::Tensor& weight, const at::Tensor& squares, const at::Tensor& A_in,
                     const at::Tensor& B_in, double scale) {
  const at::NoGradGuard no_grad;
  const at::Tensor A = A_in.detach(), B = B_in.detach(), W = weight.detach().to(A.scalar_type());
  GRAFT_CHECK(W.dim() == 2 && A.dim() == 2 && B.dim() == 2 && A.size(1) == W.size(1) &&
                  B.size(0) == W.size(0) && A.size(0) == B.size(1),
              "dora", "A must be [r, in] and B [out, r] for a weight of ", W.sizes(), "; got ",
              A.sizes(), " and ", B.sizes());
  check_vector(squares, W.size(0), "the row squares");
  if (on_device(weight)) {
    const auto* kernels = kernels_for({.op = DeviceOp::dora_norm,
                                       .type = weight.scalar_type(),
                                       .rows = W.size(0),
                                       .columns = W.size(1),
                                       .rank = A.size(0),
                                       .one_type = A.scalar_type() != at::kDouble},
                                      weight.device());
    if (kernels != nullptr)
      return kernels->dora_norm(weight, squares, A, B, scale).to(A.scalar_type());
  }
  const at::Tensor wide_B = B.to(at::kDouble);
  const at::Tensor product = thin_product(A, W).t().to(at::kDouble),  // W A^T
      gram = thin_product(A, A).to(at::kDouble);
  const at::Tensor plain =
      squares + (wide_B.mm(gram) * wide_B).sum(1).clamp_min_(0) * (scale * scale);
  at::Tensor total = plain + (product * wide_B).sum(1) * (2 * scale);
  const at::Tensor cancelled = at::nonzero(total < plain * kCancelled).squeeze(1);
  if (cancelled.size(0) > 0) {
    const at::Tensor V = W.index_select(0, cancelled) + B.index_select(0, cancelled).mm(A) * scale;
    total.index_copy_(0, cancelled, row_squares(V));
  }
  return total.clamp_min_(0).sqrt_().to(A.scalar_type());
}

}  // namespace graft::ops
