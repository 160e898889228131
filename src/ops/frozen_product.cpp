#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <graft/core/error.h>
#include <graft/ops/frozen_product.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <vector>

#include "function_arguments.h"
#include "packed_product.h"
#include "tensor_rows.h"

namespace graft::ops {
namespace {

// oneDNN's linear layer, reached through the dispatcher because LibTorch exports no header for it.
// Ordinary dense fp32 tensors, true fp32 arithmetic.
using OneDnnLinear = at::Tensor(const at::Tensor&, const at::Tensor&,
                                const std::optional<at::Tensor>&, std::string_view,
                                c10::List<std::optional<at::Scalar>>,
                                std::optional<std::string_view>);

std::optional<c10::TypedOperatorHandle<OneDnnLinear>> find_onednn() {
  const auto schema = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (!schema) return std::nullopt;
  return schema->typed<OneDnnLinear>();
}

const auto& onednn_operator() {
  static const auto handle = find_onednn();
  return handle;
}

// oneDNN has no fast product for a part of a wider matrix, as VeRA's bases are.
at::Tensor dense(const at::Tensor& matrix) {
  return matrix.is_non_overlapping_and_dense() ? matrix : matrix.contiguous();
}

at::Tensor onednn_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return onednn_operator()->call(dense(x), dense(weight), optional(bias), "none",
                                 c10::List<std::optional<at::Scalar>>(), std::nullopt);
}

// Seconds of the faster of a few runs: the least disturbed one.
template <class Product>
double best_time(Product&& product) {
  double best = 1e9;
  for (int i = 0; i < 6; ++i) {
    const auto start = std::chrono::steady_clock::now();
    product();
    best = std::min(
        best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// A matrix whose rows or columns have adjacent elements, as packed_product takes it.
struct Strided {
  at::Tensor tensor;
  int64_t stride;
  bool transposed;  // columns are adjacent
};

Strided strided(const at::Tensor& matrix) {
  if (matrix.stride(1) == 1 || matrix.size(1) == 1) return {matrix, matrix.stride(0), false};
  if (matrix.stride(0) == 1) return {matrix, matrix.stride(1), true};
  const at::Tensor dense = matrix.contiguous();
  return {dense, dense.stride(0), false};
}

// x w for w [k, n] in any layout, plus the term, into y.
void packed_linear(const at::Tensor& y, const at::Tensor& x, const at::Tensor& w,
                   const at::Tensor& bias, const LowRankTerm& term) {
  std::vector<Strided> kept;  // keeps copies alive
  std::vector<ProductTerm> terms;
  const auto add = [&](const at::Tensor& left, const at::Tensor& right) {
    const at::Tensor rows = left.stride(1) == 1 ? left : left.contiguous();
    kept.push_back({rows, rows.stride(0), false});
    kept.push_back(strided(right));
    const Strided& matrix = kept.back();
    terms.push_back({rows.const_data_ptr<float>(), rows.stride(0),
                     matrix.tensor.const_data_ptr<float>(), matrix.stride, matrix.transposed,
                     left.size(1)});
  };
  add(x, w);
  if (term.left.defined()) add(term.left, term.right);
  const at::Tensor dense_bias = bias.defined() ? bias.contiguous() : bias;
  packed_product(terms, bias.defined() ? dense_bias.const_data_ptr<float>() : nullptr,
                 y.mutable_data_ptr<float>(), y.stride(0), x.size(0), w.size(1));
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias,
                         const LowRankTerm& term) {
  at::Tensor y = at::empty({x.size(0), w.size(1)}, x.options());
  packed_linear(y, x, w, bias, term);
  return y;
}

bool available(ProductLibrary library) {
  if (library == ProductLibrary::onednn) return onednn_operator().has_value();
  return library != ProductLibrary::graft || packed_product_available();
}

at::Tensor product_by(ProductLibrary library, const at::Tensor& x, const at::Tensor& w,
                      const at::Tensor& bias) {
  if (library == ProductLibrary::graft) return packed_linear(x, w, bias, {});
  if (library == ProductLibrary::onednn) return onednn_linear(x, w.t(), bias);
  return bias.defined() ? at::addmm(bias, x, w) : at::mm(x, w);
}

struct Choice {
  ProductLibrary library;
  std::string reason;
};

// The fastest on a forward and a backward product of a small layer.
Choice measure() {
  const at::NoGradGuard no_grad;
  const at::Tensor x = at::full({512, 576}, 0.5f), weight = at::full({576, 576}, 0.25f);
  const auto seconds = [&](ProductLibrary library) {
    return best_time([&] { product_by(library, x, weight.t(), {}); }) +
           best_time([&] { product_by(library, x, weight, {}); });
  };
  const double mkl = seconds(ProductLibrary::mkl);
  Choice fastest{ProductLibrary::mkl, ""};
  double best = mkl;
  for (const auto library : {ProductLibrary::onednn, ProductLibrary::graft}) {
    if (!available(library)) continue;
    if (const double time = seconds(library); time < best) {
      best = time;
      fastest.library = library;
    }
  }
  fastest.reason = "measured: " + std::to_string(mkl / best).substr(0, 4) + " times mkl";
  return fastest;
}

std::mutex choice_mutex;
std::optional<Choice> choice;
std::atomic<int> chosen{-1};  // the choice's library once it is made: products ask without a lock

void check_available(ProductLibrary library) {
  GRAFT_CHECK(available(library), "products", "this machine must have the library; got ",
              product_library_name(library));
}

Choice current_choice() {
  const std::lock_guard lock(choice_mutex);
  if (!choice) {
    if (const char* name = std::getenv("GRAFT_PRODUCTS"); name != nullptr && *name != '\0') {
      const ProductLibrary library = parse_product_library(name);
      check_available(library);
      choice = Choice{library, "set by GRAFT_PRODUCTS"};
    } else {
      choice = measure();
    }
    chosen = static_cast<int>(choice->library);
  }
  return *choice;
}

// The library for x w. The others than MKL pay where the product is fp32 and not tiny. graft's is
// made for the shapes of layers: few rows do not repay its packing, and of a product that is much
// deeper than wide (the output layer's backward) it would read x once too often.
ProductLibrary library_for(const at::Tensor& x, const at::Tensor& w) {
  if (x.scalar_type() != at::kFloat || !x.is_cpu() || x.size(0) * x.size(1) * w.size(1) < 1 << 16)
    return ProductLibrary::mkl;
  const ProductLibrary library = product_library();
  const bool misfit = x.size(0) < 32 || x.size(1) > 8 * w.size(1);
  return library == ProductLibrary::graft && misfit ? ProductLibrary::mkl : library;
}

// x w (+ bias) (+ term) for w [k, n].
at::Tensor product(const at::Tensor& x, const at::Tensor& w, const at::Tensor& bias,
                   const LowRankTerm& term) {
  const ProductLibrary library = library_for(x, w);
  const bool one_type = !term.left.defined() || term.left.scalar_type() == at::kFloat;
  if (library == ProductLibrary::graft && one_type) return packed_linear(x, w, bias, term);
  at::Tensor y = product_by(library, x, w, bias);
  if (term.left.defined()) y = y.to(term.left.scalar_type()).addmm_(term.left, term.right);
  return y;
}

void check_term(const LowRankTerm& term, int64_t rows, int64_t columns) {
  GRAFT_CHECK(!term.left.defined() ||
                  (term.left.dim() == 2 && term.right.dim() == 2 && term.left.size(0) == rows &&
                   term.right.size(1) == columns && term.left.size(1) == term.right.size(0)),
              "products", "a term must be [", rows, ", r] and [r, ", columns, "]; got ",
              term.left.sizes(), " and ", term.right.sizes());
}

at::Tensor same_type(const at::Tensor& weight, const at::Tensor& x) {
  return weight.scalar_type() == x.scalar_type() ? weight : weight.to(x.scalar_type());
}

class FrozenLinear : public torch::autograd::Function<FrozenLinear> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
    ctx->save_for_backward({weight});
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = weight.size(0);
    return at::_unsafe_view(
        frozen_product(x.reshape({-1, weight.size(1)}), weight, bias.value_or(at::Tensor())),
        shape);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    refuse_double_backward("products");
    const at::Tensor weight = ctx->get_saved_variables()[0];
    std::vector<int64_t> shape = grads[0].sizes().vec();
    shape.back() = weight.size(1);
    return {frozen_product_backward(grads[0].reshape({-1, weight.size(0)}), weight).view(shape),
            at::Tensor(), at::Tensor()};
  }
};

}  // namespace

ProductLibrary product_library() {
  const int library = chosen.load(std::memory_order_relaxed);
  return library >= 0 ? static_cast<ProductLibrary>(library) : current_choice().library;
}

void set_product_library(ProductLibrary library) {
  check_available(library);
  const std::lock_guard lock(choice_mutex);
  choice = Choice{library, "set by the program"};
  chosen = static_cast<int>(library);
}

std::string_view product_library_name(ProductLibrary library) {
  return library == ProductLibrary::mkl      ? "mkl"
         : library == ProductLibrary::onednn ? "onednn"
                                             : "graft";
}

std::string describe_product_library() {
  const Choice current = current_choice();
  return std::string(product_library_name(current.library)) + " (" + current.reason + ")";
}

ProductLibrary parse_product_library(std::string_view name) {
  for (const auto library : {ProductLibrary::mkl, ProductLibrary::onednn, ProductLibrary::graft})
    if (product_library_name(library) == name) return library;
  fail("products", concat("library must be mkl, onednn or graft; got '", name, "'"));
}

at::Tensor frozen_product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                          const LowRankTerm& term) {
  GRAFT_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "products",
              "x [m, k] and weight [n, k] must agree in k; got ", x.sizes(), " and ",
              weight.sizes());
  check_term(term, x.size(0), weight.size(0));
  return product(x, same_type(weight, x).t(), bias.defined() ? same_type(bias, x) : bias, term);
}

void frozen_product_into(const at::Tensor& y, const at::Tensor& x, const at::Tensor& weight) {
  GRAFT_CHECK(y.dim() == 2 && x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) &&
                  y.size(0) == x.size(0) && y.size(1) == weight.size(0) && y.stride(1) == 1 &&
                  y.scalar_type() == x.scalar_type(),
              "products", "y must be [m, n] for x [m, k] and weight [n, k]; got ", y.sizes(), ", ",
              x.sizes(), " and ", weight.sizes());
  const at::Tensor w = same_type(weight, x).t();
  const ProductLibrary library = library_for(x, w);
  if (library == ProductLibrary::graft)
    packed_linear(y, x, w, {}, {});
  else
    at::Tensor(y).copy_(product_by(library, x, w, {}));
}

at::Tensor frozen_product_backward(const at::Tensor& dy, const at::Tensor& weight,
                                   const LowRankTerm& term) {
  GRAFT_CHECK(dy.dim() == 2 && weight.dim() == 2 && dy.size(1) == weight.size(0), "products",
              "dy [m, n] and weight [n, k] must agree in n; got ", dy.sizes(), " and ",
              weight.sizes());
  check_term(term, dy.size(0), weight.size(1));
  return product(dy, same_type(weight, dy), {}, term);
}

void add_frozen_product(const at::Tensor& y, const at::Tensor& x, const at::Tensor& weight) {
  at::Tensor(y).addmm_(x, same_type(weight, x).t());
}

void add_frozen_product_backward(const at::Tensor& dx, const at::Tensor& dy,
                                 const at::Tensor& weight) {
  at::Tensor(dx).addmm_(dy, same_type(weight, dy));
}

at::Tensor thin_product(const at::Tensor& a, const at::Tensor& b) {
  const bool onednn = a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat &&
                      a.is_cpu() && a.numel() >= 1 << 12 && onednn_operator();
  return onednn ? onednn_linear(a, b, {}) : at::mm(a, b.t());
}

at::Tensor frozen_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  GRAFT_CHECK(x.dim() >= 1 && x.size(-1) == weight.size(1), "products",
              "the input's last dimension must be ", weight.size(1), "; got ", x.sizes());
  return FrozenLinear::apply(x, weight, optional(bias));
}

}  // namespace graft::ops
