#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/moe/xlora.h>
#include <graft/nn/adapter_slot.h>
#include <graft/nn/batch_rows.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "expert_fields.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = XloraImpl::kName;
constexpr const char* kFilePrefix = "base_model.internal_xlora_classifier.";

// {"0": folder, "1": folder}: by number where all keys are numbers, else by name.
std::vector<std::filesystem::path> folders_of(const nlohmann::json& adapters) {
  GRAFT_CHECK(adapters.is_object() && !adapters.empty(), kArea,
              "adapters must name the adapters' folders; got ", adapters.dump());
  std::vector<std::pair<std::string, std::string>> named;
  bool numbers = true;
  for (const auto& [name, folder] : adapters.items()) {
    GRAFT_CHECK(folder.is_string(), kArea, "adapters must name the adapters' folders; got ",
                folder.dump(), " for ", name);
    named.emplace_back(name, folder.get<std::string>());
    numbers = numbers && !name.empty() && name.find_first_not_of("0123456789") == std::string::npos;
  }
  if (numbers)
    std::sort(named.begin(), named.end(), [](const auto& a, const auto& b) {
      return std::pair(a.first.size(), a.first) < std::pair(b.first.size(), b.first);
    });
  std::vector<std::filesystem::path> folders;
  for (const auto& [name, folder] : named) folders.emplace_back(folder);
  return folders;
}

std::shared_ptr<const adapters::Recipe> read_config(nlohmann::json& config) {
  adapters::ConfigFields fields(config, kArea);
  XloraOptions options;
  options.experts = ExpertLibrary::read(folders_of(config.value("adapters", nlohmann::json())));
  fields.ignore({"adapters"});
  options.hidden_size = fields.integer("hidden_size", options.hidden_size);
  options.depth = fields.integer("xlora_depth", options.depth);
  options.size = fields.integer("xlora_size", options.size);
  options.dropout_p = fields.number("xlora_dropout_p", options.dropout_p);
  options.layerwise = fields.flag("layerwise_scalings", options.layerwise);
  options.softmax = fields.flag("enable_softmax", options.softmax);
  options.temperature = fields.number("softmax_temperature", options.temperature);
  options.top_k = fields.integer("top_k_lora");
  options.softmax_topk = fields.flag("enable_softmax_topk", options.softmax_topk);
  options.scaling_pass_value = fields.number("scaling_pass_value", options.scaling_pass_value);
  options.global_scaling_weight =
      fields.number("global_scaling_weight", options.global_scaling_weight);
  GRAFT_CHECK(!fields.flag("use_trainable_adapters", false), kArea,
              "use_trainable_adapters must be off, the adapters are frozen; got true");
  // PEFT's configuration names no layers: they are the adapters'.
  if (!config.contains("target_modules")) config["target_modules"] = options.experts->layers();
  return adapters::make_recipe(options);
}

}  // namespace

// PEFT's torch.nn.Sequential, whose activations and dropout have numbers too.
class XloraImpl::Classifier : public torch::nn::Module {
 public:
  Classifier(const XloraOptions& options, int64_t layers, at::TensorOptions type,
             const adapters::LayerContext& context)
      : torch::nn::Module("Classifier"), options_(options), seed_(context.seed), layers_(layers) {
    const auto generator = at::detail::createCPUGenerator(random::hash_name("xlora.classifier") ^
                                                          (context.seed * 0x9E3779B97F4A7C15u));
    const int64_t step = options.dropout_p > 0 ? 3 : 2;  // linear, ReLU, dropout
    const int64_t out = options.experts->count() * (options.layerwise ? layers : 1);
    auto list = register_module("layers", std::make_shared<torch::nn::Module>("layers"));
    for (int64_t i = 0; i < options.depth; ++i) {
      const int64_t from = i == 0 ? options.hidden_size : options.size,
                    to = i + 1 == options.depth ? out : options.size;
      const double bound = 1 / std::sqrt(static_cast<double>(from));
      auto linear = std::make_shared<torch::nn::LinearImpl>(from, to);
      linear->to(type.device(), c10::typeMetaToScalarType(type.dtype()));
      const at::NoGradGuard no_grad;
      for (at::Tensor parameter : linear->parameters())
        if (context.initialise)
          parameter.copy_(
              at::zeros(parameter.sizes(), at::kFloat).uniform_(-bound, bound, generator));
        else
          parameter.zero_();
      linears_.push_back(list->register_module(std::to_string(i * step), linear));
      places_.push_back(i * step);
    }
  }

  at::Tensor forward(const at::Tensor& hidden) {
    at::Tensor x = hidden.to(linears_.front()->weight.scalar_type());
    for (size_t i = 0; i < linears_.size(); ++i) {
      x = linears_[i]->forward(x);
      if (i + 1 == linears_.size()) break;
      x = at::relu(x);
      if (options_.dropout_p > 0 && is_training())
        x = ops::dropout(x, {options_.dropout_p,
                             random::draw_key(seed_, static_cast<uint32_t>(i), mask_counter)});
    }
    if (options_.layerwise) x = x.unflatten(-1, {layers_, options_.experts->count()});
    return options_.softmax ? at::softmax(x / options_.temperature, -1) : x;
  }

  std::vector<nn::Adapter::FileTensor> file_tensors() const {
    std::vector<nn::Adapter::FileTensor> tensors;
    for (size_t i = 0; i < linears_.size(); ++i) {
      const std::string key = concat(kFilePrefix, "layers.", places_[i]);
      tensors.push_back({key + ".weight", linears_[i]->weight});
      tensors.push_back({key + ".bias", linears_[i]->bias});
    }
    return tensors;
  }

  int64_t next_layer() { return made_++; }

  at::Tensor scalings;  // of the current scope, or undefined
  uint32_t mask_counter = 0;

 private:
  const XloraOptions options_;
  const uint64_t seed_;
  const int64_t layers_;
  std::vector<std::shared_ptr<torch::nn::LinearImpl>> linears_;
  std::vector<int64_t> places_;
  int64_t made_ = 0;
};

void XloraOptions::validate() const {
  check_library(kArea, experts);
  GRAFT_CHECK(hidden_size >= 1 && depth >= 1 && size >= 1, kArea,
              "hidden_size, xlora_depth and xlora_size must be at least 1; got ", hidden_size, ", ",
              depth, " and ", size);
  ops::check_dropout(dropout_p, kArea);
  GRAFT_CHECK(std::isfinite(temperature) && temperature > 0, kArea,
              "softmax_temperature must be positive; got ", temperature);
  GRAFT_CHECK(!top_k || (*top_k >= 1 && *top_k <= experts->count()), kArea,
              "top_k_lora must be in [1, number of adapters]; got ", top_k.value_or(0), " for ",
              experts->count());
  GRAFT_CHECK(std::isfinite(scaling_pass_value) && std::isfinite(global_scaling_weight), kArea,
              "scaling_pass_value and global_scaling_weight must be finite; got ",
              scaling_pass_value, " and ", global_scaling_weight);
}

XloraImpl::XloraImpl(const nn::FrozenLayer& base, const XloraOptions& options_in,
                     const adapters::LayerContext& context_in)
    : LinearMixture(options_in, context_in) {
  check_supports(base, context.name);
  options.validate();
  adapters::LayerContext with_values = context;
  with_values.initialise = true;
  experts = options.experts->experts(kArea, base, with_values);
  register_buffer("lora_A", experts.A);
  register_buffer("lora_B", experts.B);
  classifier_ = context.shared ? std::static_pointer_cast<Classifier>(context.shared)
                               : make_shared_part(options, {{context.name, base}}, context);
  index_ = classifier_->next_layer();
  if (index_ == 0) register_module("classifier", classifier_);
}

std::shared_ptr<XloraImpl::Classifier> XloraImpl::make_shared_part(
    const XloraOptions& options, const std::vector<std::pair<std::string, nn::FrozenLayer>>& layers,
    const adapters::LayerContext& context) {
  for (const auto& [name, layer] : layers) check_supports(layer, name);
  const auto& first = layers.front().second;
  return std::make_shared<Classifier>(
      options, static_cast<int64_t>(layers.size()),
      at::TensorOptions(adapters::master_type(first)).device(nn::weight_of(first).device()),
      context);
}

at::Tensor XloraImpl::gates(const at::Tensor& x) {
  const double weight = options.global_scaling_weight;
  at::Tensor c = classifier_->scalings;
  if (!c.defined())
    return at::full({experts.count()}, options.scaling_pass_value * weight,
                    experts.A.options().requires_grad(false));
  GRAFT_CHECK(!is_training() || at::GradMode::is_enabled() || !c.requires_grad(), kArea,
              "a pass by trained scalings must keep its graph; got one without, as gradient "
              "checkpointing makes them (layer '",
              context.name, "')");
  if (options.layerwise) c = c.select(-2, index_);
  c = c.reshape({-1, experts.count()}).to(experts.A.scalar_type());
  const int64_t tokens = x.size(-1) == 0 ? 0 : x.numel() / x.size(-1);
  GRAFT_CHECK(c.size(0) == tokens, kArea, "the scalings must be those of this pass's tokens; got ",
              c.size(0), " for ", tokens, " (layer '", context.name, "')");
  if (options.top_k) {
    const at::Tensor largest = std::get<1>(c.detach().topk(*options.top_k, -1));
    c = c * at::zeros_like(c).scatter_(-1, largest, 1.0);
  }
  if (options.softmax_topk) {
    const at::Tensor left = c.detach() != 0;
    const at::Tensor any = left.any(-1, /*keepdim=*/true);
    const at::Tensor logits =
        c.masked_fill(left.logical_not() & any, -std::numeric_limits<double>::infinity());
    c = at::softmax(logits, -1).masked_fill(left.logical_not(), 0);
  }
  return c * weight;
}

std::vector<int64_t> XloraImpl::counters() const {
  return {classifier_->mask_counter};
}

void XloraImpl::set_counters(const std::vector<int64_t>& values) {
  GRAFT_CHECK(values.size() == 1, kArea, "a state has one counter; got ", values.size(),
              " (layer '", context.name, "')");
  classifier_->mask_counter = static_cast<uint32_t>(values[0]);
}

at::Tensor XloraImpl::classify(const at::Tensor& hidden) {
  GRAFT_CHECK(hidden.dim() >= 1 && hidden.size(-1) == options.hidden_size, kArea,
              "hidden states must be [..., ", options.hidden_size, "]; got ", hidden.sizes());
  return classifier_->forward(hidden);
}

std::vector<nn::Adapter::FileTensor> XloraImpl::shared_file_tensors() const {
  return classifier_->file_tensors();
}

XloraImpl& xlora_of(nn::Adapter& adapter) {
  auto* layer = dynamic_cast<XloraImpl*>(&adapter);
  GRAFT_CHECK(layer != nullptr, kArea, "the adapter must be X-LoRA; got ", adapter.method());
  return *layer;
}

XloraImpl* active_xlora(const torch::nn::Module& model) {
  XloraImpl* found = nullptr;
  for (const auto& module : model.modules(/*include_self=*/false)) {
    const auto* slot = dynamic_cast<const nn::AdapterSlot*>(module.get());
    if (slot == nullptr || !slot->enabled) continue;
    for (const auto& adapter : slot->active_adapters()) {
      auto* layer = dynamic_cast<XloraImpl*>(adapter.get());
      if (layer == nullptr) continue;
      GRAFT_CHECK(found == nullptr || found->classifier_ == layer->classifier_, kArea,
                  "one X-LoRA can be active at a time; got two (layer '", layer->context.name,
                  "')");
      found = layer;
    }
  }
  GRAFT_CHECK(found == nullptr || !nn::BatchRows::current(), kArea,
              "X-LoRA takes two passes over a batch of its own; got a batch in parts");
  return found;
}

XloraScope::XloraScope(XloraImpl& layer, const at::Tensor& hidden)
    : classifier_(layer.classifier_), outer_(classifier_->scalings) {
  classifier_->scalings = layer.classify(hidden);
}

XloraScope::~XloraScope() {
  classifier_->scalings = outer_;
}

void XloraImpl::write_config(const XloraOptions& options, nlohmann::json& config) {
  nlohmann::json adapters = nlohmann::json::object();
  const auto& folders = options.experts->folders();
  for (size_t i = 0; i < folders.size(); ++i) adapters[std::to_string(i)] = folders[i].string();
  config["adapters"] = adapters;
  config["hidden_size"] = options.hidden_size;
  config["xlora_depth"] = options.depth;
  config["xlora_size"] = options.size;
  config["xlora_dropout_p"] = options.dropout_p;
  config["layerwise_scalings"] = options.layerwise;
  config["enable_softmax"] = options.softmax;
  config["softmax_temperature"] = options.temperature;
  config["top_k_lora"] = options.top_k ? nlohmann::json(*options.top_k) : nlohmann::json();
  config["enable_softmax_topk"] = options.softmax_topk;
  config["scaling_pass_value"] = options.scaling_pass_value;
  config["global_scaling_weight"] = options.global_scaling_weight;
  config["use_trainable_adapters"] = false;
}

std::string XloraImpl::describe(const XloraOptions& options) {
  std::string text = concat(options.experts->count(), " frozen adapters, a classifier of depth ",
                            options.depth, options.layerwise ? ", by layer" : "");
  if (options.top_k) text += concat(", top ", *options.top_k);
  return text;
}

adapters::MethodEntry xlora_entry() {
  adapters::MethodEntry entry{kArea,
                              "XLORA",
                              "frozen adapters mixed by a classifier over the last hidden states",
                              {},
                              read_config};
  entry.keys = {
      .rank = "", .alpha = "", .dropout = "", .rslora = "", .init = "", .top_k = "top_k_lora"};
  entry.tensor_prefix = "internal_xlora_classifier.";
  return entry;
}

}  // namespace graft::moe
