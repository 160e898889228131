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

at::Tensor onednn_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return onednn_operator()->call(x, weight, bias.defined() ? std::optional(bias) : std::nullopt,
                                 "none", c10::List<std::optional<at::Scalar>>(), std::nullopt);
}

at::Tensor mkl_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return bias.defined() ? at::addmm(bias, x, weight.t()) : at::mm(x, weight.t());
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

struct Choice {
  ProductLibrary library;
  std::string reason;
};

Choice measure() {
  if (!onednn_operator()) return {ProductLibrary::mkl, "this LibTorch has no oneDNN linear"};
  const at::NoGradGuard no_grad;
  const at::Tensor x = at::full({512, 576}, 0.5f), weight = at::full({576, 576}, 0.25f);
  const at::Tensor dy = at::full({512, 576}, 0.5f), transposed = weight.t(), none;
  const double mkl =
      best_time([&] { mkl_linear(x, weight, none); }) + best_time([&] { at::mm(dy, weight); });
  const double onednn = best_time([&] { onednn_linear(x, weight, none); }) +
                        best_time([&] { onednn_linear(dy, transposed, none); });
  const auto ratio = [](double r) { return std::to_string(r).substr(0, 4); };
  if (onednn < mkl)
    return {ProductLibrary::onednn, "measured: " + ratio(mkl / onednn) + " times mkl"};
  return {ProductLibrary::mkl, "measured: " + ratio(onednn / mkl) + " times onednn"};
}

std::mutex choice_mutex;
std::optional<Choice> choice;
std::atomic<int> chosen{-1};  // the choice's library once it is made: products ask without a lock

Choice current_choice() {
  const std::lock_guard lock(choice_mutex);
  if (!choice) {
    if (const char* name = std::getenv("GRAFT_PRODUCTS"); name != nullptr && *name != '\0') {
      choice = Choice{parse_product_library(name), "set by GRAFT_PRODUCTS"};
      GRAFT_CHECK(choice->library == ProductLibrary::mkl || onednn_operator(), "products",
                  "this LibTorch has no oneDNN linear; got GRAFT_PRODUCTS=", name);
    } else {
      choice = measure();
    }
    chosen = static_cast<int>(choice->library);
  }
  return *choice;
}

// oneDNN pays where the product is fp32 and not tiny; MKL handles everything else.
bool use_onednn(const at::Tensor& x, const at::Tensor& weight) {
  return x.scalar_type() == at::kFloat && x.is_cpu() &&
         x.size(0) * x.size(1) * weight.size(0) >= 1 << 16 &&
         product_library() == ProductLibrary::onednn;
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
  GRAFT_CHECK(library == ProductLibrary::mkl || onednn_operator(), "products",
              "this LibTorch has no oneDNN linear; got onednn");
  const std::lock_guard lock(choice_mutex);
  choice = Choice{library, "set by the program"};
  chosen = static_cast<int>(library);
}

std::string describe_product_library() {
  const Choice current = current_choice();
  return std::string(current.library == ProductLibrary::mkl ? "mkl" : "onednn") + " (" +
         current.reason + ")";
}

ProductLibrary parse_product_library(std::string_view name) {
  if (name == "mkl") return ProductLibrary::mkl;
  GRAFT_CHECK(name == "onednn", "products", "library must be mkl or onednn; got '", name, "'");
  return ProductLibrary::onednn;
}

at::Tensor frozen_product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  GRAFT_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "products",
              "x [m, k] and weight [n, k] must agree in k; got ", x.sizes(), " and ",
              weight.sizes());
  const at::Tensor w = same_type(weight, x), b = bias.defined() ? same_type(bias, x) : bias;
  return use_onednn(x, w) ? onednn_linear(x, w, b) : mkl_linear(x, w, b);
}

at::Tensor frozen_product_backward(const at::Tensor& dy, const at::Tensor& weight) {
  GRAFT_CHECK(dy.dim() == 2 && weight.dim() == 2 && dy.size(1) == weight.size(0), "products",
              "dy [m, n] and weight [n, k] must agree in n; got ", dy.sizes(), " and ",
              weight.sizes());
  const at::Tensor w = same_type(weight, dy);
  return use_onednn(dy, w.t()) ? onednn_linear(dy, w.t(), {}) : at::mm(dy, w);
}

at::Tensor thin_product(const at::Tensor& a, const at::Tensor& b) {
  const bool onednn = a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat &&
                      a.is_cpu() && a.numel() >= 1 << 12 && onednn_operator();
  return onednn ? onednn_linear(a, b, {}) : at::mm(a, b.t());
}

at::Tensor frozen_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  GRAFT_CHECK(x.dim() >= 1 && x.size(-1) == weight.size(1), "products",
              "the input's last dimension must be ", weight.size(1), "; got ", x.sizes());
  // An undefined tensor is no valid argument of a Function; an empty optional is.
  return FrozenLinear::apply(x, weight, bias.defined() ? std::optional(bias) : std::nullopt);
}

}  // namespace graft::ops
