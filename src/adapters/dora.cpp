#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StorageImpl.h>
#include <graft/adapters/config_fields.h>
#include <graft/adapters/dora.h>
#include <graft/core/error.h>
#include <graft/ops/dora_linear.h>

#include <cmath>
#include <mutex>
#include <nlohmann/json.hpp>

#include "low_rank.h"

namespace graft::adapters {
namespace {

constexpr const char* kDropoutOnBase = "dora_dropout_on_base";

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  ConfigFields fields(config, "dora");
  DoraOptions options;
  read_lora_fields("dora", config, options);
  options.dropout_on_base = fields.flag(kDropoutOnBase, false);
  options.lr_ratio = fields.number("loraplus_lr_ratio", 1.0);
  GRAFT_CHECK(fields.flag("use_dora", true), "dora", "use_dora must be true; got false");
  GRAFT_CHECK(!fields.flag("lora_bias", false), "dora",
              "lora_bias must be off, PEFT has none for DoRA; got true");
  return make_recipe(options);
}

// The base weight as [outputs, inputs], a view where there is one.
at::Tensor weight_rows(const nn::FrozenLayer& base) {
  const at::Tensor weight = nn::weight_of(base).detach();
  if (std::holds_alternative<nn::FrozenEmbedding>(base)) return weight.t();
  return weight.reshape({weight.size(0), -1});
}

int64_t groups_of(const nn::FrozenLayer& base) {
  const auto* conv = std::get_if<nn::FrozenConv>(&base);
  return conv == nullptr ? 1 : conv->groups;
}

// The dense kernel [out, in * kernel] of a convolution with groups: the base's blocks on their own
// channels, plus s B A, whose hidden channels come in groups too but see all inputs.
at::Tensor dense_kernel(const at::Tensor& weight, int64_t groups, const at::Tensor& A,
                        const at::Tensor& B, double scale) {
  at::Tensor dense =
      at::bmm(B.reshape({groups, -1, B.size(1)}), A.reshape({groups, B.size(1), -1})).mul_(scale);
  const int64_t inputs = weight.numel() / weight.size(0);
  const at::Tensor blocks = weight.to(dense.scalar_type()).reshape({groups, -1, inputs});
  for (int64_t group = 0; group < groups; ++group)
    dense[group].narrow(1, group * inputs, inputs).add_(blocks[group]);
  return dense.reshape({weight.size(0), -1});
}

// v [out] as the factor of a convolution's output channels, with or without a batch.
at::Tensor by_channel(const nn::FrozenConv& base, const at::Tensor& v) {
  std::vector<int64_t> shape(base.weight.dim() - 1, 1);
  shape[0] = -1;
  return v.view(shape);
}

// Which tensor, at which state, without keeping its memory alive. The weak pointer keeps the
// storage's address from being used again.
struct Stamp {
  explicit Stamp(const at::Tensor& tensor)
      : storage(tensor.storage().getWeakStorageImpl()),
        offset(tensor.storage_offset()),
        version(tensor._version()),
        type(tensor.scalar_type()) {}

  bool operator==(const Stamp& other) const {
    return storage == other.storage && offset == other.offset && version == other.version &&
           type == other.type;
  }

  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  int64_t offset, version;
  at::ScalarType type;
};

}  // namespace

struct TensorMemo::State {
  std::mutex mutex;
  std::vector<Stamp> stamps;
  at::Tensor value;
};

std::shared_ptr<TensorMemo::State> TensorMemo::make_state() {
  return std::make_shared<State>();
}

at::Tensor TensorMemo::get(const std::vector<at::Tensor>& tensors,
                           const std::function<at::Tensor()>& compute) const {
  // What is kept may be asked for in training later.
  const c10::InferenceMode no_inference(false);
  const at::NoGradGuard no_grad;
  std::vector<Stamp> stamps;
  for (const auto& tensor : tensors) {
    if (tensor.is_inference()) return compute();  // has no version
    stamps.emplace_back(tensor);
  }
  const std::lock_guard lock(state_->mutex);
  if (!state_->value.defined() || state_->stamps != stamps) {
    state_->value = compute();
    state_->stamps = std::move(stamps);
  }
  return state_->value;
}

double DoraOptions::scale() const {
  return lora_scale(alpha, rank, rslora);
}

void DoraOptions::validate() const {
  check_options("dora", rank, alpha, dropout);
  GRAFT_CHECK(std::isfinite(lr_ratio) && lr_ratio > 0, "dora",
              "loraplus_lr_ratio must be positive; got ", lr_ratio);
}

DoraImpl::DoraImpl(const nn::FrozenLayer& base, const DoraOptions& options_in,
                   const LayerContext& context_in)
    : AdapterModule(options_in, context_in), scale(options_in.scale()) {
  options.validate();
  check_rank(kName, base, options.rank, options.dropout, context);
  embedding_ = std::holds_alternative<nn::FrozenEmbedding>(base);
  const auto [A, B] = make_factors(base, options.rank, options.init, context);
  lora_A = register_parameter("lora_A", A);
  lora_B = register_parameter("lora_B", B);
  std::vector<int64_t> shape = {B.size(0)};
  if (std::holds_alternative<nn::FrozenConv>(base)) {
    shape.assign(nn::weight_of(base).dim(), 1);
    shape[1] = B.size(0);
  }
  const at::Tensor m =
      context.initialise ? norm(base).clone().view(shape) : at::zeros(shape, B.options());
  lora_magnitude_vector = register_parameter("lora_magnitude_vector", m);
}

at::Tensor DoraImpl::norm(const nn::FrozenLayer& base) const {
  const at::Tensor& weight = nn::weight_of(base);
  return norm_.get({weight, lora_A, lora_B}, [&] {
    const int64_t rank = lora_A.size(0), groups = groups_of(base);
    if (groups > 1) {
      return ops::row_squares(dense_kernel(weight.detach(), groups, lora_A, lora_B, scale))
          .sqrt()
          .to(lora_A.scalar_type());
    }
    const at::Tensor rows = weight_rows(base);
    const at::Tensor squares = squares_.get({weight}, [&] { return ops::row_squares(rows); });
    return ops::dora_norm(rows, squares, lora_A.reshape({rank, -1}), lora_B.reshape({-1, rank}),
                          scale);
  });
}

at::Tensor DoraImpl::output_scale(const nn::FrozenLayer& base) const {
  return ops::dora_scale(lora_magnitude_vector.view(-1), norm(base));
}

at::Tensor DoraImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  return ops::dora_linear(x, base.weight, base.bias,
                          {lora_A, lora_B, lora_magnitude_vector, norm(base), scale,
                           next_dropout(options.dropout), options.dropout_on_base});
}

at::Tensor DoraImpl::forward(const nn::FrozenEmbedding& base, const at::Tensor& indices) {
  const at::Tensor y = base.apply(indices);
  const at::Tensor branch = embedding_branch(base, lora_A, lora_B, indices);
  return ((y + branch * scale) * output_scale(base)).to(y.scalar_type());
}

at::Tensor DoraImpl::forward(const nn::FrozenConv& base, const at::Tensor& x) {
  const at::Tensor y = base.apply(x), c = by_channel(base, output_scale(base));
  const ops::Dropout mask = next_dropout(options.dropout);
  const at::Tensor dropped = ops::dropout(x.to(lora_A.scalar_type()), mask);
  const at::Tensor branch = conv_branch(base, lora_A, lora_B, {}, dropped) * (c * scale);
  // Forms in which c = 1 leaves every bit of y.
  at::Tensor scaled;
  if (options.dropout_on_base && mask.active()) {
    const at::Tensor input = base.padded(dropped.to(x.scalar_type()));
    scaled = y + base.convolve(input, base.weight, {}, base.groups) * (c - 1);
  } else {
    scaled = y * c;
    if (base.bias.defined()) scaled = scaled + by_channel(base, base.bias) * (1 - c);
  }
  return (scaled + branch).to(y.scalar_type());
}

at::Tensor DoraImpl::merged_weight(const nn::FrozenLayer& base) const {
  check_mergeable(kName, base, context);
  const at::NoGradGuard no_grad;
  const at::Tensor weight = nn::weight_of(base).detach();
  const at::Tensor V = weight_rows(base) + dense_product(lora_A, lora_B, scale);
  const at::Tensor merged = V * output_scale(base).unsqueeze(1);
  return (embedding_ ? merged.t() : merged).reshape(weight.sizes()).to(weight.scalar_type());
}

std::vector<nn::Adapter::FileTensor> DoraImpl::file_tensors() const {
  std::vector<FileTensor> tensors = factor_tensors(lora_A, lora_B, embedding_);
  tensors.push_back({"lora_magnitude_vector", lora_magnitude_vector});
  return tensors;
}

void DoraImpl::write_config(const DoraOptions& options, nlohmann::json& config) {
  write_lora_fields(options, /*dora=*/true, /*bias=*/false, config);
  // PEFT warns of a key that it does not know and ignores it.
  if (options.dropout_on_base) config[kDropoutOnBase] = true;
}

ParameterRule DoraImpl::rule(const DoraOptions& options, std::string_view parameter) {
  return {parameter == "lora_A" ? 1.0 : options.lr_ratio, true};
}

std::string DoraImpl::describe(const DoraOptions& options) {
  std::string text = concat("rank ", options.rank, ", alpha ", options.alpha);
  if (options.rslora) text += ", rsLoRA";
  if (options.dropout > 0)
    text +=
        concat(", dropout ", options.dropout, options.dropout_on_base ? " on the base too" : "");
  if (options.init != "kaiming") text += ", init " + options.init;
  if (options.lr_ratio != 1.0) text += concat(", LoRA+ ratio ", options.lr_ratio);
  return text;
}

MethodEntry dora_entry() {
  return {"dora", "LORA", "LoRA for the direction, a trained length for each output: m V / ||V||",
          is_dora, read_config};
}

}  // namespace graft::adapters
