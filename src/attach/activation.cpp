#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <graft/attach/activation.h>
#include <graft/core/error.h>
#include <graft/nn/adapter_slot.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/library.h>
#include <torch/nn/modules/conv.h>

#include <unordered_map>

namespace graft {
namespace {

// A key above autograd and autocast that nothing includes by default. Its name is the only thing
// about it that is for testing: it has been stable for years. The self-test below speaks up if
// another library uses it too.
constexpr auto kKey = c10::DispatchKey::TESTING_ONLY_GenericMode;

struct Entry {
  at::Tensor weight;  // keeps the storage alive
  const torch::nn::Module* layer;
  std::shared_ptr<nn::AdapterSlot> slot;
};

using Index = std::unordered_multimap<const c10::StorageImpl*, Entry>;
thread_local const Index* active_index = nullptr;
thread_local int64_t probes_seen =
    -1;  // counts kernels that ran during the self-test; -1 outside of it

// Backward's own products must not be taken for forward ones; a recomputation in backward has
// gradients switched on.
bool in_plain_backward() {
  return torch::autograd::get_current_graph_task_id() != -1 && !at::GradMode::is_enabled();
}

// The adapted layer whose weight this is, if its adapters are to run.
const Entry* find(const at::Tensor& weight) {
  if (probes_seen >= 0) ++probes_seen;
  if (active_index == nullptr || !weight.has_storage() || in_plain_backward()) return nullptr;
  const auto [begin, end] = active_index->equal_range(weight.storage().unsafeGetStorageImpl());
  for (auto it = begin; it != end; ++it) {
    const at::Tensor& w = it->second.weight;
    if (w.storage_offset() == weight.storage_offset() && w.sizes() == weight.sizes() &&
        w.strides() == weight.strides() && it->second.slot->engaged())
      return &it->second;
  }
  return nullptr;
}

// The same for a weight that comes transposed, as linear layers hand it to addmm and matmul.
const Entry* find_transposed(const at::Tensor& weight) {
  return weight.dim() == 2 ? find(weight.t()) : nullptr;
}

at::Tensor run_linear(const Entry& entry, const at::Tensor& x, const at::Tensor& bias) {
  return entry.slot->apply(nn::FrozenLinear{entry.weight, bias}, x);
}

at::Tensor linear_kernel(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kKey);
  if (const Entry* entry = find(weight)) return run_linear(*entry, x, bias.value_or(at::Tensor()));
  return at::linear(x, weight, bias);
}

at::Tensor addmm_kernel(const at::Tensor& bias, const at::Tensor& x, const at::Tensor& weight,
                        const at::Scalar& beta, const at::Scalar& alpha) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kKey);
  const bool plain = bias.dim() == 1 && beta.equal(1) && alpha.equal(1);
  if (const Entry* entry = plain ? find_transposed(weight) : nullptr)
    return run_linear(*entry, x, bias);
  return at::addmm(bias, x, weight, beta, alpha);
}

at::Tensor matmul_kernel(const at::Tensor& x, const at::Tensor& weight) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kKey);
  if (const Entry* entry = find_transposed(weight)) return run_linear(*entry, x, {});
  return at::matmul(x, weight);
}

at::Tensor mm_kernel(const at::Tensor& x, const at::Tensor& weight) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kKey);
  if (const Entry* entry = find_transposed(weight)) return run_linear(*entry, x, {});
  return at::mm(x, weight);
}

at::Tensor embedding_kernel(const at::Tensor& weight, const at::Tensor& indices,
                            c10::SymInt padding_idx, bool scale_grad_by_freq, bool sparse) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kKey);
  if (const Entry* entry = find(weight))
    return entry->slot->apply(nn::frozen_layer(*entry->layer), indices);
  return at::embedding_symint(weight, indices, std::move(padding_idx), scale_grad_by_freq, sparse);
}

// torch pads with anything but zeros before it calls the convolution: then x arrives padded.
template <class Impl>
bool arrives_padded(const torch::nn::Module& layer) {
  const auto* conv = layer.as<Impl>();
  return conv != nullptr &&
         !std::holds_alternative<torch::enumtype::kZeros>(conv->options.padding_mode());
}

at::Tensor run_conv(const Entry& entry, const at::Tensor& x) {
  auto base = std::get<nn::FrozenConv>(nn::frozen_layer(*entry.layer));
  if (arrives_padded<torch::nn::Conv1dImpl>(*entry.layer) ||
      arrives_padded<torch::nn::Conv2dImpl>(*entry.layer) ||
      arrives_padded<torch::nn::Conv3dImpl>(*entry.layer))
    base.before.clear();
  return entry.slot->apply(base, x);
}

// conv1d, conv2d and conv3d, with padding in numbers or as a word.
template <auto Original, class Padding>
at::Tensor conv_kernel(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
                       Padding padding, c10::SymIntArrayRef dilation, c10::SymInt groups) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kKey);
  if (const Entry* entry = find(weight)) return run_conv(*entry, x);
  return Original(x, weight, bias, stride, padding, dilation, std::move(groups));
}

template <auto Original>
constexpr auto numbers_kernel = conv_kernel<Original, c10::SymIntArrayRef>;
template <auto Original>
constexpr auto word_kernel = conv_kernel<Original, std::string_view>;

struct Kernels {
  torch::Library aten{torch::Library::IMPL, "aten", kKey, __FILE__, __LINE__};
  torch::Library others{torch::Library::IMPL, "_", kKey, __FILE__, __LINE__};

  Kernels() {
    aten.impl("linear", linear_kernel);
    aten.impl("addmm", addmm_kernel);
    aten.impl("matmul", matmul_kernel);
    aten.impl("mm", mm_kernel);
    aten.impl("embedding", embedding_kernel);
    using Numbers =
        at::Tensor (*)(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                       c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymInt);
    using Word =
        at::Tensor (*)(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                       c10::SymIntArrayRef, std::string_view, c10::SymIntArrayRef, c10::SymInt);
    aten.impl("conv1d", numbers_kernel<static_cast<Numbers>(at::conv1d_symint)>);
    aten.impl("conv2d", numbers_kernel<static_cast<Numbers>(at::conv2d_symint)>);
    aten.impl("conv3d", numbers_kernel<static_cast<Numbers>(at::conv3d_symint)>);
    aten.impl("conv1d.padding", word_kernel<static_cast<Word>(at::conv1d_symint)>);
    aten.impl("conv2d.padding", word_kernel<static_cast<Word>(at::conv2d_symint)>);
    aten.impl("conv3d.padding", word_kernel<static_cast<Word>(at::conv3d_symint)>);
    others.fallback(torch::CppFunction::makeFallthrough());
  }
};

// Registers once and proves that the kernels are reached.
void ensure_kernels() {
  static const Kernels kernels;
  const c10::impl::IncludeDispatchKeyGuard guard(kKey);
  probes_seen = 0;
  at::mm(at::zeros({1, 2}), at::zeros({2, 1}));
  const bool reached = probes_seen > 0;
  probes_seen = -1;
  GRAFT_CHECK(reached, "attach",
              "the activation scope needs a dispatch key that another library has taken in this "
              "process; use graft::nn "
              "layers instead");
}

}  // namespace

struct ActivationScope::State {
  Index index;
  const Index* previous;
  std::optional<c10::impl::IncludeDispatchKeyGuard> guard;
};

ActivationScope::ActivationScope(
    const std::vector<std::pair<std::string, std::shared_ptr<torch::nn::Module>>>& layers)
    : state_(std::make_unique<State>()) {
  ensure_kernels();
  state_->previous = active_index;
  if (state_->previous != nullptr) state_->index = *state_->previous;
  for (const auto& [name, layer] : layers) {
    const at::Tensor weight = nn::weight_of(nn::frozen_layer(*layer));
    auto slot = nn::AdapterSlot::find(*layer);
    GRAFT_CHECK(slot != nullptr, "attach",
                "a layer to activate must have adapters; got none (layer '", name, "')");
    GRAFT_CHECK(weight.has_storage() && weight.is_contiguous(), "attach",
                "a layer to activate must have an ordinary dense weight (layer '", name, "')");
    for (auto [it, end] = state_->index.equal_range(weight.storage().unsafeGetStorageImpl());
         it != end; ++it)
      GRAFT_CHECK(
          it->second.slot == slot || it->second.weight.storage_offset() != weight.storage_offset(),
          "attach",
          "two adapted layers of torch::nn must not share a weight: a scope cannot tell them apart "
          "(layer '",
          name, "')");
    state_->index.emplace(weight.storage().unsafeGetStorageImpl(),
                          Entry{weight, layer.get(), std::move(slot)});
  }
  active_index = &state_->index;
  state_->guard.emplace(kKey);
}

ActivationScope::ActivationScope(ActivationScope&&) noexcept = default;

ActivationScope::~ActivationScope() {
  if (state_ != nullptr) active_index = state_->previous;
}

}  // namespace graft
