#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/adapters/lora.h>
#include <graft/core/error.h>
#include <graft/init/initialiser.h>
#include <graft/ops/lora_linear.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace graft::adapters {
namespace {

std::string place(const LayerContext& context) {
  return " (layer '" + context.name + "')";
}

// The dense sizes of B A: [out, in].
std::pair<int64_t, int64_t> dense_sizes(const nn::FrozenLayer& layer) {
  const at::Tensor& weight = nn::weight_of(layer);
  if (std::holds_alternative<nn::FrozenEmbedding>(layer)) return {weight.size(1), weight.size(0)};
  if (const auto* conv = std::get_if<nn::FrozenConv>(&layer))
    return {weight.size(0), weight.numel() / weight.size(0) * conv->groups};
  return {weight.size(0), weight.size(1)};
}

void check_fits(const nn::FrozenLayer& layer, const LoraOptions& options,
                const LayerContext& context) {
  const auto [out, in] = dense_sizes(layer);
  GRAFT_CHECK(options.rank <= std::min(in, out), "lora",
              "rank must be in [1, min(in, out)]; got rank=", options.rank, " for in=", in,
              ", out=", out, place(context));
  if (std::holds_alternative<nn::FrozenEmbedding>(layer)) {
    GRAFT_CHECK(options.dropout == 0.0 && !options.bias, "lora",
                "an Embedding takes neither dropout nor a lora bias; got dropout=", options.dropout,
                ", bias=", options.bias, place(context));
  }
  if (const auto* conv = std::get_if<nn::FrozenConv>(&layer)) {
    GRAFT_CHECK(options.rank % conv->groups == 0, "lora",
                "rank must be a multiple of the convolution's groups; got rank=", options.rank,
                " for groups=", conv->groups, place(context));
  }
}

// A [r, in, kernel...] and B [out, r / groups, 1...].
std::pair<std::vector<int64_t>, std::vector<int64_t>> factor_shapes(const nn::FrozenLayer& layer,
                                                                    int64_t rank) {
  const auto [out, in] = dense_sizes(layer);
  const auto* conv = std::get_if<nn::FrozenConv>(&layer);
  if (conv == nullptr) return {{rank, in}, {out, rank}};
  std::vector<int64_t> A = conv->weight.sizes().vec(), B(A.size(), 1);
  A[0] = rank;
  A[1] *= conv->groups;
  B[0] = out;
  B[1] = rank / conv->groups;
  return {A, B};
}

// PEFT's value of init_lora_weights and our name for it.
std::string init_from_config(const nlohmann::json& value) {
  if (value.is_boolean()) return value.get<bool>() ? "kaiming" : "random";
  GRAFT_CHECK(value.is_string(), "lora", "init_lora_weights must be a boolean or a name; got ",
              value.dump());
  return value.get<std::string>();
}

nlohmann::json init_to_config(const std::string& name) {
  if (name == "kaiming") return true;
  if (name == "random") return false;
  return name;
}

template <class T>
T take(nlohmann::json& config, const char* key, T fallback) {
  const auto it = config.find(key);
  if (it == config.end()) return fallback;
  T value = fallback;
  try {
    if (!it->is_null()) value = it->template get<T>();
  } catch (const nlohmann::json::exception&) {
    fail("lora", concat("option '", key, "' has a value of the wrong type; got ", it->dump()));
  }
  config.erase(it);
  return value;
}

std::shared_ptr<const Recipe> read_config(nlohmann::json& config) {
  LoraOptions options;
  options.rank = take<int64_t>(config, "r", 8);
  options.alpha = take<double>(config, "lora_alpha", 8.0);
  options.dropout = take<double>(config, "lora_dropout", 0.0);
  options.rslora = take<bool>(config, "use_rslora", false);
  options.bias = take<bool>(config, "lora_bias", false);
  options.init = "kaiming";
  if (const auto it = config.find("init_lora_weights"); it != config.end()) {
    options.init = init_from_config(*it);
    config.erase(it);
  }
  // These speak only to options that are off, or to how values were found that the file already
  // holds.
  for (const char* key : {"qalora_group_size", "megatron_core", "eva_config"}) config.erase(key);
  return make_recipe(options);
}

}  // namespace

double LoraOptions::scale() const {
  return alpha / (rslora ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank));
}

void LoraOptions::validate() const {
  GRAFT_CHECK(rank >= 1, "lora", "rank must be in [1, min(in, out)]; got rank=", rank);
  GRAFT_CHECK(std::isfinite(alpha) && alpha != 0.0, "lora",
              "alpha must be finite and not 0, which would switch the adapter off; got ", alpha);
  ops::check_dropout(dropout, "lora");
}

LoraImpl::LoraImpl(const nn::FrozenLayer& base, const LoraOptions& options_in,
                   const LayerContext& context_in)
    : AdapterModule(options_in, context_in), scale(options_in.scale()) {
  options.validate();
  check_fits(base, options, context);
  const at::Tensor& weight = nn::weight_of(base);
  GRAFT_CHECK(at::isFloatingType(weight.scalar_type()), "lora",
              "the base weight must be floating point; got ", weight.scalar_type(), place(context));
  const auto dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto master = at::TensorOptions().dtype(dtype);
  const auto [shape_A, shape_B] = factor_shapes(base, options.rank);
  at::Tensor A = at::zeros(shape_A, master), B = at::zeros(shape_B, master);
  embedding_ = std::holds_alternative<nn::FrozenEmbedding>(base);
  if (context.initialise) {
    const auto generator = at::detail::createCPUGenerator(context.layer_seed());
    if (embedding_)
      init::initialise_embedding(options.init, {A, B}, generator);
    else
      init::initialise(options.init, {A, B}, generator);
  }
  const auto device = weight.device();
  lora_A = register_parameter("lora_A", A.to(device));
  lora_B = register_parameter("lora_B", B.to(device));
  if (options.bias)
    lora_bias = register_parameter("lora_bias", at::zeros({shape_B[0]}, master.device(device)));
}

ops::Dropout LoraImpl::next_dropout() {
  if (options.dropout == 0.0 || !is_training()) return {};
  const auto site = static_cast<uint32_t>(random::hash_name(context.name));
  return {options.dropout, random::draw_key(context.seed, site, mask_counter_)};
}

at::Tensor LoraImpl::forward(const nn::FrozenLinear& base, const at::Tensor& x) {
  return ops::lora_linear(x, base.weight, base.bias,
                          {lora_A, lora_B, lora_bias, scale, next_dropout()});
}

at::Tensor LoraImpl::forward(const nn::FrozenEmbedding& base, const at::Tensor& indices) {
  const at::Tensor y = base.apply(indices);
  const at::Tensor S =
      at::embedding(lora_A.t(), indices, base.padding_idx, base.scale_grad_by_freq);
  return (y + S.matmul(lora_B.t()) * scale).to(y.scalar_type());
}

at::Tensor LoraImpl::forward(const nn::FrozenConv& base, const at::Tensor& x) {
  const at::Tensor padded = base.padded(x);
  const at::Tensor y = base.convolve(padded, base.weight, base.bias, base.groups);
  const ops::Dropout dropout = next_dropout();
  at::Tensor branch = x.to(lora_A.scalar_type());
  branch = dropout.active() ? base.padded(ops::dropout(branch, dropout))
                            : padded.to(lora_A.scalar_type());
  branch = base.convolve(branch, lora_A, {}, 1);
  const std::vector<int64_t> ones(base.stride.size(), 1), zeros(base.stride.size(), 0);
  const bool batched = branch.dim() == lora_B.dim();
  branch = at::convolution(batched ? branch : branch.unsqueeze(0), lora_B,
                           lora_bias.defined() ? std::optional(lora_bias) : std::nullopt, ones,
                           zeros, ones, false, zeros, base.groups);
  if (!batched) branch = branch.squeeze(0);
  return (y + branch * scale).to(y.scalar_type());
}

at::Tensor LoraImpl::delta() const {
  const int64_t rank = lora_A.size(0);
  return lora_B.detach()
      .reshape({lora_B.size(0), rank})
      .mm(lora_A.detach().reshape({rank, -1}))
      .mul_(scale);
}

at::Tensor LoraImpl::merged_weight(const nn::FrozenLinear& base) const {
  return (base.weight.detach() + delta()).to(base.weight.scalar_type());
}

at::Tensor LoraImpl::merged_weight(const nn::FrozenEmbedding& base) const {
  return (base.weight.detach() + delta().t()).to(base.weight.scalar_type());
}

at::Tensor LoraImpl::merged_weight(const nn::FrozenConv& base) const {
  GRAFT_CHECK(base.groups == 1, "lora",
              "a convolution with groups cannot be merged; got groups=", base.groups,
              place(context));
  return (base.weight.detach() + delta().view(base.weight.sizes())).to(base.weight.scalar_type());
}

at::Tensor LoraImpl::merged_bias(const nn::FrozenLayer& base) const {
  const at::Tensor bias = nn::bias_of(base);
  if (!lora_bias.defined()) return bias;
  GRAFT_CHECK(bias.defined(), "lora",
              "a lora bias can only be merged into a layer that has a bias; got none",
              place(context));
  return (bias.detach() + lora_bias.detach() * scale).to(bias.scalar_type());
}

std::vector<nn::Adapter::FileTensor> LoraImpl::file_tensors() const {
  if (embedding_) return {{"lora_embedding_A", lora_A}, {"lora_embedding_B", lora_B}};
  std::vector<FileTensor> tensors = {{"lora_A.weight", lora_A}, {"lora_B.weight", lora_B}};
  if (lora_bias.defined()) tensors.push_back({"lora_B.bias", lora_bias});
  return tensors;
}

void LoraImpl::set_counters(const std::vector<int64_t>& values) {
  GRAFT_CHECK(values.size() == 1, "lora", "a state has one counter a layer; got ", values.size(),
              place(context));
  mask_counter_ = static_cast<uint32_t>(values[0]);
}

void LoraImpl::write_config(const LoraOptions& options, nlohmann::json& config) {
  config["r"] = options.rank;
  const bool whole = options.alpha == std::floor(options.alpha) && std::abs(options.alpha) < 1e15;
  config["lora_alpha"] =
      whole ? nlohmann::json(static_cast<int64_t>(options.alpha)) : nlohmann::json(options.alpha);
  config["lora_dropout"] = options.dropout;
  config["use_rslora"] = options.rslora;
  config["lora_bias"] = options.bias;
  config["init_lora_weights"] = init_to_config(options.init);
  config["use_dora"] = false;
  config["fan_in_fan_out"] = false;
}

std::string LoraImpl::describe(const LoraOptions& options) {
  std::string text = concat("rank ", options.rank, ", alpha ", options.alpha);
  if (options.rslora) text += ", rsLoRA";
  if (options.dropout > 0) text += concat(", dropout ", options.dropout);
  if (options.bias) text += ", lora bias";
  if (options.init != "kaiming") text += ", init " + options.init;
  return text;
}

MethodEntry lora_entry() {
  return {"lora", "LORA", "low-rank adaptation, W + s B A (rsLoRA by --rslora)",
          [](const nlohmann::json& config) { return !config.value("use_dora", false); },
          read_config};
}

}  // namespace graft::adapters
