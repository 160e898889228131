#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/frozen_product.h>
#include <graft/ops/lora_group.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "cuda_dispatch.h"
#include "function_arguments.h"
#include "kept_rows.h"
#include "lora_device.h"
#include "tensor_rows.h"

namespace graft::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kArea = "lora group";
constexpr int64_t kMostTogether = 64;  // ranks of factors side by side

bool is_plain(const LoraLayer& layer) {
  const LoraTerm& t = layer.term;
  return !t.bias.defined() && !t.gate.defined() && !t.factor.defined() && t.ranks.empty() &&
         !layer.weight.requires_grad() && !(layer.bias.defined() && layer.bias.requires_grad());
}

// The kernels that take all layers, or null.
const DeviceKernels* group_kernels(const at::Tensor& x, const std::vector<LoraLayer>& layers) {
  if (layers.size() < 2 || !on_device(x) || !std::all_of(layers.begin(), layers.end(), is_plain))
    return nullptr;
  DeviceCase call{.op = DeviceOp::lora_group,
                  .type = x.scalar_type(),
                  .rows = x.numel() / std::max<int64_t>(1, x.size(-1)),
                  .columns = x.size(-1)};
  for (const LoraLayer& layer : layers) {
    call.columns = std::max(call.columns, layer.weight.size(0));
    call.rank = std::max(call.rank, layer.term.A.size(0));
    call.one_type = call.one_type && layer.term.A.scalar_type() != at::kDouble;
  }
  return kernels_for(call, x.device());
}

// Hidden matrices of all layers beside each other, and back. Each alone and all together are zero
// behind their ranks, up to the columns that kernels have.
class Together {
 public:
  explicit Together(std::vector<int64_t> ranks) : ranks_(std::move(ranks)) {
    for (const int64_t r : ranks_) sum_ += r;
  }
  at::Tensor join(const std::vector<at::Tensor>& each) const {
    std::vector<at::Tensor> parts;
    for (size_t i = 0; i < each.size(); ++i) parts.push_back(each[i].narrow(1, 0, ranks_[i]));
    return padded(at::cat(parts, 1), sum_);
  }
  std::vector<at::Tensor> part(const at::Tensor& all) const {
    std::vector<at::Tensor> each;
    int64_t first = 0;
    for (const int64_t r : ranks_) {
      each.push_back(padded(all.narrow(1, first, r), r).contiguous());
      first += r;
    }
    return each;
  }
  int64_t sum() const { return sum_; }

 private:
  static at::Tensor padded(const at::Tensor& hidden, int64_t rank) {
    const int64_t rest = hidden_columns(rank) - rank;
    return rest == 0 ? hidden : at::constant_pad_nd(hidden, {0, rest}, 0);
  }

  std::vector<int64_t> ranks_;
  int64_t sum_ = 0;
};

// The operation's tensors in the order of the layers.
struct Layers {
  std::vector<at::Tensor> A, B, weights, biases;
  std::vector<double> scales;
  std::vector<Dropout> dropouts;

  size_t count() const { return A.size(); }
  bool together() const {
    int64_t sum = 0;
    for (const at::Tensor& a : A) sum += a.size(0);
    return sum <= kMostTogether && std::none_of(dropouts.begin(), dropouts.end(),
                                                [](const Dropout& d) { return d.active(); });
  }
  Together ranks() const {
    std::vector<int64_t> ranks;
    for (const at::Tensor& a : A) ranks.push_back(a.size(0));
    return Together(ranks);
  }
};

std::vector<at::Tensor> hidden_of(const DeviceKernels& kernels, const at::Tensor& rows,
                                  const Layers& layers) {
  const auto type = rows.scalar_type();
  if (layers.together())
    return layers.ranks().part(kernels.lora_shrink(rows, wide(at::cat(layers.A), type), 1.0, {}));
  std::vector<at::Tensor> hidden;
  for (size_t i = 0; i < layers.count(); ++i)
    hidden.push_back(kernels.lora_shrink(rows, wide(layers.A[i], type), 1.0, layers.dropouts[i]));
  return hidden;
}

// dA of each layer. `dS`: of each, or joined where they are together.
std::vector<at::Tensor> factor_gradients(const DeviceKernels& kernels, const at::Tensor& rows,
                                         const std::vector<at::Tensor>& dS, const Layers& layers) {
  std::vector<at::Tensor> gradients;
  if (layers.together()) {
    const at::Tensor all = kernels.lora_outer(dS.front(), rows, layers.ranks().sum(),
                                              /*tall=*/false, 1.0, {});
    int64_t first = 0;
    for (const at::Tensor& a : layers.A) {
      gradients.push_back(all.narrow(0, first, a.size(0)).to(a.scalar_type()));
      first += a.size(0);
    }
    return gradients;
  }
  for (size_t i = 0; i < layers.count(); ++i)
    gradients.push_back(
        kernels
            .lora_outer(dS[i], rows, layers.A[i].size(0), /*tall=*/false, 1.0, layers.dropouts[i])
            .to(layers.A[i].scalar_type()));
  return gradients;
}

at::Tensor input_gradient(const DeviceKernels& kernels, const std::vector<at::Tensor>& dy,
                          const std::vector<at::Tensor>& dS, const Layers& layers) {
  const auto type = dy.front().scalar_type();
  at::Tensor dx;
  if (layers.together())
    dx = kernels.lora_expand(dS.front(), wide(at::cat(layers.A), type), 1.0, {}, {});
  else
    for (size_t i = 0; i < layers.count(); ++i)
      dx = kernels.lora_expand(dS[i], wide(layers.A[i], type), 1.0, layers.dropouts[i],
                               {.base = dx});
  for (size_t i = 0; i < layers.count(); ++i)
    add_frozen_product_backward(dx, dy[i], layers.weights[i]);
  return dx;
}

class LoraGroup : public torch::autograd::Function<LoraGroup> {
 public:
  // `factors`: A and B of each layer in turn.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList factors,
                               const Layers& layers, const DeviceKernels* kernels) {
    const at::Tensor rows = x.reshape({-1, x.size(-1)});
    const std::vector<at::Tensor> hidden = hidden_of(*kernels, rows, layers);
    std::vector<int64_t> shape = x.sizes().vec();
    variable_list outputs;
    bool any_A = false;
    int64_t wanted = x.requires_grad();
    for (size_t i = 0; i < layers.count(); ++i) {
      const at::Tensor y = kernels->lora_expand(hidden[i], tall(layers.B[i], rows.scalar_type()),
                                                layers.scales[i], {}, {.bias = layers.biases[i]});
      add_frozen_product(y, rows, layers.weights[i]);
      shape.back() = y.size(1);
      outputs.push_back(at::_unsafe_view(y, shape));
      any_A = any_A || factors[2 * i].requires_grad();
      wanted |= (int64_t{factors[2 * i].requires_grad()} << (1 + 2 * i)) |
                (int64_t{factors[2 * i + 1].requires_grad()} << (2 + 2 * i));
    }
    variable_list saved = {keep_rows(ctx, x, rows, any_A)};
    for (const auto* list : {&hidden, &layers.A, &layers.B, &layers.weights})
      saved.insert(saved.end(), list->begin(), list->end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["wanted"] = wanted;
    ctx->saved_data["scales"] = layers.scales;
    for (size_t i = 0; i < layers.count(); ++i)
      save_dropout(ctx, layers.dropouts[i], std::to_string(i));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_double_backward(kArea);
    const size_t count = grads.size();
    const variable_list saved = ctx->get_saved_variables();
    const auto list = [&](size_t number) {
      const auto first = saved.begin() + static_cast<std::ptrdiff_t>(1 + number * count);
      return std::vector<at::Tensor>(first, first + static_cast<std::ptrdiff_t>(count));
    };
    const std::vector<at::Tensor> hidden = list(0);
    Layers layers{list(1), list(2), list(3), {}, ctx->saved_data["scales"].toDoubleVector(), {}};
    for (size_t i = 0; i < count; ++i)
      layers.dropouts.push_back(saved_dropout(ctx, std::to_string(i)));
    const int64_t mask = ctx->saved_data["wanted"].toInt();
    const auto wanted = [mask](size_t input) { return (mask >> input & 1) != 0; };
    const DeviceKernels& kernels = *device_kernels();

    variable_list result(1 + 2 * count + 2);
    std::vector<at::Tensor> dy, dS;
    bool any_A = false;
    for (size_t i = 0; i < count; ++i) {
      const int64_t out = layers.weights[i].size(0);
      dy.push_back(grads[i].defined() ? grads[i].reshape({-1, out})
                                      : at::zeros({hidden[i].size(0), out}, hidden[i].options()));
      const LowRankFactor B = tall(layers.B[i], dy[i].scalar_type());
      if (wanted(2 + 2 * i)) {
        auto [dS_i, dB] = kernels.lora_backward(dy[i], hidden[i], B.values, layers.scales[i]);
        dS.push_back(dS_i);
        result[2 + 2 * i] = dB.to(layers.B[i].scalar_type());
      } else {
        dS.push_back(kernels.lora_shrink(dy[i], B, layers.scales[i], {}));
      }
      any_A = any_A || wanted(1 + 2 * i);
    }
    if ((any_A || wanted(0)) && layers.together()) dS = {layers.ranks().join(dS)};
    if (any_A) {
      const auto gradients = factor_gradients(kernels, kept_rows(ctx, saved[0]), dS, layers);
      for (size_t i = 0; i < count; ++i)
        if (wanted(1 + 2 * i)) result[1 + 2 * i] = gradients[i];
    }
    if (wanted(0)) {
      const at::Tensor dx = input_gradient(kernels, dy, dS, layers);
      const auto used =
          std::find_if(grads.begin(), grads.end(), [](const at::Tensor& g) { return g.defined(); });
      std::vector<int64_t> shape = used->sizes().vec();
      shape.back() = dx.size(1);
      result[0] = dx.view(shape);
    }
    return result;
  }
};

void check_layer(const at::Tensor& x, const LoraLayer& layer) {
  const auto& [weight, bias, term] = layer;
  check_dropout(term.dropout.p, kArea);
  GRAFT_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1) &&
                  term.A.dim() == 2 && term.B.dim() == 2 && term.A.size(1) == weight.size(1) &&
                  term.B.size(0) == weight.size(0) && term.A.size(0) == term.B.size(1),
              kArea,
              "weight must be [out, in], A [r, in] and B [out, r] for an input [..., in]; got ",
              weight.sizes(), ", ", term.A.sizes(), " and ", term.B.sizes(), " for ", x.sizes());
  check_one_device(kArea, {x, weight, bias, term.A, term.B});
}

}  // namespace

std::vector<at::Tensor> lora_linear_group(const at::Tensor& x,
                                          const std::vector<LoraLayer>& layers_in) {
  std::vector<at::Tensor> outputs;
  const DeviceKernels* kernels = group_kernels(x, layers_in);
  if (kernels == nullptr) {
    for (const auto& [weight, bias, term] : layers_in)
      outputs.push_back(lora_linear(x, weight, bias, term));
    return outputs;
  }
  Layers layers;
  std::vector<at::Tensor> factors;
  for (const LoraLayer& layer : layers_in) {
    check_layer(x, layer);
    factors.push_back(layer.term.A);
    factors.push_back(layer.term.B);
    layers.A.push_back(layer.term.A.detach());
    layers.B.push_back(layer.term.B.detach());
    layers.weights.push_back(layer.weight);
    layers.biases.push_back(layer.bias);
    layers.scales.push_back(layer.term.scale);
    layers.dropouts.push_back(layer.term.dropout);
  }
  return LoraGroup::apply(x, at::TensorList(factors), layers, kernels);
}

}  // namespace graft::ops
