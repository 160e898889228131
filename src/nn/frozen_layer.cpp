#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/nn/frozen_layer.h>
#include <graft/nn/gated_mlp.h>
#include <graft/ops/frozen_product.h>
#include <graft/ops/swiglu.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>

namespace graft::nn {
namespace {

// torch keeps a convolution's padding as numbers, or as the word same or valid.
template <size_t D>
void set_padding(FrozenConv& conv, const typename torch::nn::detail::ConvNdOptions<D>& options) {
  std::vector<int64_t> left(D, 0), right(D, 0);
  if (const auto* numbers = std::get_if<torch::ExpandingArray<D>>(&options.padding())) {
    std::copy_n((*numbers)->begin(), D, left.begin());
    right = left;
  } else if (std::holds_alternative<torch::enumtype::kSame>(options.padding())) {
    for (size_t i = 0; i < D; ++i) {
      const int64_t total = (*options.dilation())[i] * ((*options.kernel_size())[i] - 1);
      left[i] = total / 2;
      right[i] = total - left[i];
    }
  }
  const bool zeros = std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode());
  conv.padding.assign(D, 0);
  if (zeros && left == right) {
    conv.padding = left;
    return;
  }
  // The last dimension comes first. With 'same' and another mode than zeros torch's C++ layers (not
  // Python's) put the first one there, and this is a view of those layers.
  const bool same = std::holds_alternative<torch::enumtype::kSame>(options.padding());
  for (size_t k = 0; k < D; ++k) {
    const size_t i = same && !zeros ? k : D - 1 - k;
    conv.before.push_back(left[i]);
    conv.before.push_back(right[i]);
  }
  if (!zeros) conv.before_mode = torch::enumtype::get_enum_name(options.padding_mode()).substr(1);
}

template <size_t D, class Impl>
FrozenConv frozen_conv(const Impl& module) {
  FrozenConv conv;
  conv.weight = module.weight;
  conv.bias = module.bias;
  conv.stride.assign(module.options.stride()->begin(), module.options.stride()->end());
  conv.dilation.assign(module.options.dilation()->begin(), module.options.dilation()->end());
  conv.groups = module.options.groups();
  set_padding<D>(conv, module.options);
  return conv;
}

// torch names the modes kReflect, kReplicate, kCircular.
std::string pad_mode(std::string name) {
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return name;
}

}  // namespace

at::Tensor FrozenLinear::apply(const at::Tensor& x) const {
  if (weight.requires_grad() || (bias.defined() && bias.requires_grad()))
    return at::linear(x, weight, bias);
  return ops::frozen_linear(x, weight, bias);
}

at::Tensor FrozenEmbedding::apply(const at::Tensor& indices) const {
  return at::embedding(weight, indices, padding_idx, scale_grad_by_freq, /*sparse=*/false);
}

at::Tensor FrozenConv::padded(const at::Tensor& x) const {
  return before.empty() ? x : at::pad(x, before, pad_mode(before_mode));
}

at::Tensor FrozenConv::convolve(const at::Tensor& x, const at::Tensor& kernel,
                                const at::Tensor& kernel_bias, int64_t kernel_groups) const {
  const bool batched = x.dim() == kernel.dim();
  const at::Tensor y = at::convolution(
      batched ? x : x.unsqueeze(0), kernel,
      kernel_bias.defined() ? std::optional(kernel_bias) : std::nullopt, stride, padding, dilation,
      /*transposed=*/false, std::vector<int64_t>(stride.size(), 0), kernel_groups);
  return batched ? y : y.squeeze(0);
}

at::Tensor FrozenConv::apply(const at::Tensor& x) const {
  return convolve(padded(x), weight, bias, groups);
}

at::Tensor FrozenGatedMlp::apply(const at::Tensor& x) const {
  return down.apply(ops::swiglu(gate.apply(x), up.apply(x)));
}

std::string kind_name(const FrozenLayer& layer) {
  if (std::holds_alternative<FrozenLinear>(layer)) return "Linear";
  if (std::holds_alternative<FrozenEmbedding>(layer)) return "Embedding";
  if (std::holds_alternative<FrozenGatedMlp>(layer)) return "GatedMlp";
  return "Conv" + std::to_string(std::get<FrozenConv>(layer).dimensions()) + "d";
}

const at::Tensor& weight_of(const FrozenLayer& layer) {
  return std::visit(
      [](const auto& base) -> const at::Tensor& {
        if constexpr (requires { base.weight; })
          return base.weight;
        else
          return base.gate.weight;
      },
      layer);
}

at::Tensor bias_of(const FrozenLayer& layer) {
  return std::visit(
      [](const auto& base) -> at::Tensor {
        if constexpr (requires { base.bias; })
          return base.bias;
        else
          return {};
      },
      layer);
}

at::Tensor apply(const FrozenLayer& layer, const at::Tensor& x) {
  return std::visit([&](const auto& base) { return base.apply(x); }, layer);
}

bool is_adaptable(const torch::nn::Module& module) {
  return module.as<torch::nn::LinearImpl>() != nullptr ||
         module.as<torch::nn::EmbeddingImpl>() != nullptr ||
         module.as<torch::nn::Conv1dImpl>() != nullptr ||
         module.as<torch::nn::Conv2dImpl>() != nullptr ||
         module.as<torch::nn::Conv3dImpl>() != nullptr;
}

FrozenLayer frozen_layer(const torch::nn::Module& module) {
  if (const auto* block = module.as<GatedMlpImpl>()) return block->frozen();
  if (const auto* linear = module.as<torch::nn::LinearImpl>())
    return FrozenLinear{linear->weight, linear->bias};
  if (const auto* embedding = module.as<torch::nn::EmbeddingImpl>()) {
    const auto& options = embedding->options;
    GRAFT_CHECK(!options.max_norm() && !options.sparse(), "attach",
                "an Embedding with max_norm or sparse gradients cannot be adapted; got max_norm=",
                options.max_norm() ? "set" : "none", ", sparse=", options.sparse());
    const int64_t rows = embedding->weight.size(0);
    int64_t padding_idx = options.padding_idx().value_or(-1);
    if (options.padding_idx() && padding_idx < 0) padding_idx += rows;
    return FrozenEmbedding{embedding->weight, padding_idx, options.scale_grad_by_freq()};
  }
  if (const auto* conv = module.as<torch::nn::Conv1dImpl>()) return frozen_conv<1>(*conv);
  if (const auto* conv = module.as<torch::nn::Conv2dImpl>()) return frozen_conv<2>(*conv);
  if (const auto* conv = module.as<torch::nn::Conv3dImpl>()) return frozen_conv<3>(*conv);
  fail("attach",
       "a layer must be Linear, Embedding, Conv1d, Conv2d or Conv3d; got " + module.name());
}

}  // namespace graft::nn
