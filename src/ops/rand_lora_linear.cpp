#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/frozen_product.h>
#include <graft/ops/rand_lora_linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include "function_arguments.h"
#include "kept_rows.h"
#include "tensor_rows.h"

namespace graft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The update of one layer. "Long" rows have q elements, "short" ones p: a layer with out >= in
// takes short rows to long ones, any other the reverse.
struct Update {
  at::Tensor A, B, lambda, gamma;
  double scale = 1.0;
  RandLoraPairing pairing = RandLoraPairing::peft;
  bool to_long = true;  // out >= in

  int64_t p() const { return A.size(1); }
  int64_t q() const { return B.size(0); }
  int64_t hidden() const { return B.size(1); }

  bool dense(int64_t tokens, bool extra_product) const {
    return rand_lora_dense(tokens, q(), p(), hidden(), extra_product);
  }

  // s S [m, p].
  at::Tensor scaled_rows() const {
    const at::Tensor factors = lambda * scale;
    const at::Tensor rows =
        pairing == RandLoraPairing::peft
            ? (A.unsqueeze(1) * gamma.unsqueeze(0)).mul_(factors.unsqueeze(2))
            : (A.unsqueeze(0) * gamma.unsqueeze(1)).mul_(factors.t().unsqueeze(2));
    return rows.view({hidden(), p()});
  }

  // s dW [out, in].
  at::Tensor matrix() const {
    const at::Tensor rows = scaled_rows();
    return to_long ? frozen_product(B, rows.t()) : frozen_product(rows.t(), B);
  }

  // Rows through s dW^T (or, `backward`, through s dW), by way of the hidden units.
  at::Tensor through(const at::Tensor& x, bool backward = false) const {
    const at::Tensor rows = scaled_rows();
    if (to_long != backward) return frozen_product(frozen_product(x, rows), B);
    return frozen_product(frozen_product(x, B.t()), rows.t());
  }

  // The gradient of s S [m, p], from the layer's input and its output's gradient.
  at::Tensor rows_gradient(const at::Tensor& x, const at::Tensor& dy) const {
    const at::Tensor &short_rows = to_long ? x : dy, &long_rows = to_long ? dy : x;
    if (dense(x.size(0), /*extra_product=*/true))
      return frozen_product(B.t(), thin_product(short_rows.t(), long_rows.t()));
    return thin_product(frozen_product(long_rows, B.t()).t(), short_rows.t());
  }

  // The gradients of lambda and gamma out of that of s S.
  std::pair<at::Tensor, at::Tensor> gradients(const at::Tensor& of_rows) const {
    const int64_t rank = lambda.size(0), bases = lambda.size(1);
    const at::Tensor by_basis =  // [N, r, p]
        pairing == RandLoraPairing::peft ? of_rows.view({rank, bases, p()}).transpose(0, 1)
                                         : of_rows.view({bases, rank, p()});
    const at::Tensor shared = by_basis * A * scale;
    return {at::bmm(shared, gamma.unsqueeze(2)).squeeze(2).t(),
            at::bmm(lambda.t().unsqueeze(1), shared).squeeze(1)};
  }
};

// The arguments of the operation in their order, of which `backward` returns the gradients.
enum Input { kX, kWeight, kBias, kA, kB, kLambda, kGamma, kInputs };

class RandLoraLinear : public torch::autograd::Function<RandLoraLinear> {
 public:
  using Optional = std::optional<at::Tensor>;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const Optional& base_bias, const at::Tensor& A, const at::Tensor& B,
                            const at::Tensor& lambda, const at::Tensor& gamma, double scale,
                            const Dropout& dropout, bool rank_by_rank) {
    const at::Tensor bias = base_bias.value_or(at::Tensor());
    const at::Tensor rows = x.reshape({-1, weight.size(1)});
    const Update update = make_update(weight, A, B, lambda, gamma, scale, rank_by_rank);
    const auto master = lambda.scalar_type();
    const bool joint = joins(rows, weight, lambda, dropout);
    const bool dense = update.dense(rows.size(0), !joint);
    at::Tensor y;
    if (joint && dense) {
      y = frozen_product(rows, update.matrix().add_(weight), bias);
    } else {
      y = frozen_product(rows, weight, bias).to(master);
      const at::Tensor dropped = apply_dropout(rows.to(master), dropout);
      y.add_(dense ? frozen_product(dropped, update.matrix()) : update.through(dropped));
    }

    ctx->save_for_backward({keep_rows(ctx, x, rows), weight, A, B, lambda, gamma});
    int64_t wanted = 0, i = 0;
    for (const at::Tensor* input : {&x, &weight, &bias, &A, &B, &lambda, &gamma})
      wanted |= int64_t{input->defined() && input->requires_grad()} << i++;
    ctx->saved_data["wanted"] = wanted;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["rank_by_rank"] = rank_by_rank;
    ctx->saved_data["p"] = dropout.p;
    ctx->saved_data["seed"] = static_cast<int64_t>(dropout.key.seed);
    ctx->saved_data["site"] = static_cast<int64_t>(dropout.key.site);
    ctx->saved_data["step"] = static_cast<int64_t>(dropout.key.step);
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = weight.size(0);
    return at::_unsafe_view(y.to(x.scalar_type()),
                            shape);  // not a view: callers may add a bias in place
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward("randlora");
    variable_list saved = ctx->get_saved_variables();
    saved[0] = kept_rows(ctx, saved[0]);
    const at::Tensor &rows = saved[0], &weight = saved[1], &lambda = saved[4];
    const int64_t mask = ctx->saved_data["wanted"].toInt();
    const auto wanted = [mask](Input input) { return (mask >> input & 1) != 0; };
    const Dropout dropout{ctx->saved_data["p"].toDouble(),
                          {static_cast<uint64_t>(ctx->saved_data["seed"].toInt()),
                           static_cast<uint32_t>(ctx->saved_data["site"].toInt()),
                           static_cast<uint32_t>(ctx->saved_data["step"].toInt())}};
    const Update update =
        make_update(weight, saved[2], saved[3], lambda, saved[5],
                    ctx->saved_data["scale"].toDouble(), ctx->saved_data["rank_by_rank"].toBool());
    const at::Tensor dy = grads[0].reshape({-1, weight.size(0)});
    const at::Tensor dy_master = dy.to(lambda.scalar_type());

    variable_list result(kInputs + 3);
    if (wanted(kLambda) || wanted(kGamma)) {
      const at::Tensor dropped = apply_dropout(rows.to(lambda.scalar_type()), dropout);
      std::tie(result[kLambda], result[kGamma]) =
          update.gradients(update.rows_gradient(dropped, dy_master));
    }
    if (wanted(kX)) {
      const bool joint = joins(rows, weight, lambda, dropout);
      const bool dense = update.dense(rows.size(0), !joint);
      std::vector<int64_t> shape = grads[0].sizes().vec();
      shape.back() = weight.size(1);
      at::Tensor dx;
      if (joint && dense) {
        dx = frozen_product_backward(dy, update.matrix().add_(weight));
      } else {
        dx = frozen_product_backward(dy, weight).to(lambda.scalar_type());
        const at::Tensor branch = dense ? frozen_product_backward(dy_master, update.matrix())
                                        : update.through(dy_master, /*backward=*/true);
        if (dropout.active())
          add_dropped_(dx, branch, dropout);
        else
          dx.add_(branch);
      }
      result[kX] = dx.to(dy.scalar_type()).view(shape);
    }
    if (wanted(kWeight)) result[kWeight] = at::mm(dy.t(), rows).to(weight.scalar_type());
    if (wanted(kBias)) result[kBias] = dy.sum(0);
    return result;
  }

 private:
  static Update make_update(const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B,
                            const at::Tensor& lambda, const at::Tensor& gamma, double scale,
                            bool rank_by_rank) {
    // A slice of wider bases is copied, q m moves: oneDNN falls back to a plain loop, a thousand
    // times as slow, for a transposed matrix times one with gaps between its rows.
    return {A,
            B.contiguous(),
            lambda,
            gamma,
            scale,
            rank_by_rank ? RandLoraPairing::peft : RandLoraPairing::paper,
            weight.size(0) >= weight.size(1)};
  }

  // Whether one product with W + s dW gives the output. In another type than the factors' the sum
  // would lose the update's small numbers, and under dropout the two inputs differ.
  static bool joins(const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& lambda,
                    const Dropout& dropout) {
    return !dropout.active() && rows.scalar_type() == lambda.scalar_type() &&
           weight.scalar_type() == lambda.scalar_type();
  }
};

void check_term(int64_t out, int64_t in, const RandLoraTerm& term) {
  const int64_t p = std::min(out, in), q = std::max(out, in);
  const bool matrices =
      term.A.dim() == 2 && term.B.dim() == 2 && term.lambda.dim() == 2 && term.gamma.dim() == 2;
  GRAFT_CHECK(matrices && term.A.size(0) == term.lambda.size(0) && term.A.size(1) == p &&
                  term.gamma.size(0) == term.lambda.size(1) && term.gamma.size(1) == p &&
                  term.B.size(0) == q && term.B.size(1) == term.lambda.numel(),
              "randlora", "A must be [r, p], B [q, N r], lambda [r, N] and gamma [N, p] for p=", p,
              ", q=", q, "; got ", term.A.sizes(), ", ", term.B.sizes(), ", ", term.lambda.sizes(),
              " and ", term.gamma.sizes());
  const auto type = term.lambda.scalar_type();
  GRAFT_CHECK(term.A.scalar_type() == type && term.B.scalar_type() == type &&
                  term.gamma.scalar_type() == type,
              "randlora", "A, B, lambda and gamma must have one type; got ", term.A.scalar_type(),
              ", ", term.B.scalar_type(), ", ", type, " and ", term.gamma.scalar_type());
  check_dropout(term.dropout.p, "randlora");
}

}  // namespace

bool rand_lora_dense(int64_t tokens, int64_t q, int64_t p, int64_t m, bool extra_product) {
  const double dense =
      static_cast<double>(q) * p * m + (extra_product ? static_cast<double>(tokens) * q * p : 0.0);
  return dense < static_cast<double>(tokens) * m * (p + q);
}

at::Tensor rand_lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            const RandLoraTerm& term) {
  GRAFT_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), "randlora",
              "the input's last dimension must match the weight [out, in]; got ", x.sizes(),
              " and ", weight.sizes());
  check_term(weight.size(0), weight.size(1), term);
  GRAFT_CHECK(x.device() == weight.device() && x.device() == term.A.device(), "randlora",
              "input, weight and adapter must be on one device; got ", x.device().str(), ", ",
              weight.device().str(), " and ", term.A.device().str());
  GRAFT_CHECK(!term.A.requires_grad() && !term.B.requires_grad(), "randlora",
              "the bases must be frozen; got a basis that requires a gradient");
  return RandLoraLinear::apply(x, weight, optional(bias), term.A, term.B, term.lambda, term.gamma,
                               term.scale, term.dropout, term.pairing == RandLoraPairing::peft);
}

at::Tensor rand_lora_delta(int64_t out, int64_t in, const RandLoraTerm& term) {
  check_term(out, in, term);
  const at::NoGradGuard no_grad;
  return Update{term.A,
                term.B.contiguous(),
                term.lambda.detach(),
                term.gamma.detach(),
                term.scale,
                term.pairing,
                out >= in}
      .matrix();
}

}  // namespace graft::ops
