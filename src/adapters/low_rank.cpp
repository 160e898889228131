#include "low_rank.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/core/error.h>
#include <graft/init/initialiser.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace graft::adapters {

std::string place(const LayerContext& context) {
  return " (layer '" + context.name + "')";
}

std::pair<int64_t, int64_t> dense_sizes(const nn::FrozenLayer& layer) {
  const at::Tensor& weight = nn::weight_of(layer);
  if (std::holds_alternative<nn::FrozenEmbedding>(layer)) return {weight.size(1), weight.size(0)};
  if (const auto* conv = std::get_if<nn::FrozenConv>(&layer))
    return {weight.size(0), weight.numel() / weight.size(0) * conv->groups};
  return {weight.size(0), weight.size(1)};
}

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

double lora_scale(double alpha, int64_t rank, bool rslora) {
  return alpha / (rslora ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank));
}

void check_options(const char* method, int64_t rank, double alpha, double dropout) {
  GRAFT_CHECK(rank >= 1, method, "rank must be in [1, min(in, out)]; got rank=", rank);
  GRAFT_CHECK(std::isfinite(alpha) && alpha != 0.0, method,
              "alpha must be finite and not 0, which would switch the adapter off; got ", alpha);
  ops::check_dropout(dropout, method);
}

void check_rank(const char* method, const nn::FrozenLayer& layer, int64_t rank, double dropout,
                const LayerContext& context) {
  const auto [out, in] = dense_sizes(layer);
  GRAFT_CHECK(rank >= 1 && rank <= std::min(in, out), method,
              "rank must be in [1, min(in, out)]; got rank=", rank, " for in=", in, ", out=", out,
              place(context));
  GRAFT_CHECK(dropout == 0.0 || !std::holds_alternative<nn::FrozenEmbedding>(layer), method,
              "an Embedding takes no dropout; got dropout=", dropout, place(context));
  if (const auto* conv = std::get_if<nn::FrozenConv>(&layer)) {
    GRAFT_CHECK(rank % conv->groups == 0, method,
                "rank must be a multiple of the convolution's groups; got rank=", rank,
                " for groups=", conv->groups, place(context));
  }
  const auto type = nn::weight_of(layer).scalar_type();
  GRAFT_CHECK(at::isFloatingType(type), method, "the base weight must be floating point; got ",
              type, place(context));
}

void check_no_groups(const char* method, const nn::FrozenLayer& layer,
                     const LayerContext& context) {
  if (const auto* conv = std::get_if<nn::FrozenConv>(&layer))
    GRAFT_CHECK(conv->groups == 1, method,
                "the factors of a convolution with groups would mix them; got groups=",
                conv->groups, place(context));
}

at::ScalarType master_type(const nn::FrozenLayer& layer) {
  return nn::weight_of(layer).scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor dense_weight(const nn::FrozenLayer& layer) {
  const auto [out, in] = dense_sizes(layer);
  const at::Tensor weight = nn::weight_of(layer).detach();
  return std::holds_alternative<nn::FrozenEmbedding>(layer) ? weight.t()
                                                            : weight.reshape({out, in});
}

at::Tensor times_core(const at::Tensor& B, const at::Tensor& M) {
  return B.reshape({B.size(0), -1}).mm(M).reshape(B.sizes());
}

std::vector<nn::Adapter::FileTensor> factor_tensors(const at::Tensor& A, const at::Tensor& B,
                                                    bool embedding) {
  if (embedding) return {{"lora_embedding_A", A}, {"lora_embedding_B", B}};
  return {{"lora_A.weight", A}, {"lora_B.weight", B}};
}

const at::Tensor& stored(const char* method, const StoredLayer& layer, const std::string& suffix) {
  const auto it = layer.find(suffix);
  GRAFT_CHECK(it != layer.end(), method, "a stored layer must hold ", suffix, "; got none");
  return it->second;
}

std::pair<at::Tensor, at::Tensor> stored_factors(const char* method, const StoredLayer& layer) {
  const bool embedding = layer.count("lora_embedding_A") > 0;
  return {stored(method, layer, embedding ? "lora_embedding_A" : "lora_A.weight"),
          stored(method, layer, embedding ? "lora_embedding_B" : "lora_B.weight")};
}

std::pair<at::Tensor, at::Tensor> since_start(const at::Tensor& A, const at::Tensor& B,
                                              const at::Tensor& start_A,
                                              const at::Tensor& start_B) {
  return {at::cat({A - start_A, start_A}, 0), at::cat({B, B - start_B}, 1)};
}

at::Tensor dense_product(const at::Tensor& A, const at::Tensor& B, double scale) {
  const int64_t rank = A.size(0);
  return B.detach().reshape({B.size(0), rank}).mm(A.detach().reshape({rank, -1})).mul_(scale);
}

void check_mergeable(const char* method, const nn::FrozenLayer& base, const LayerContext& context) {
  const auto* conv = std::get_if<nn::FrozenConv>(&base);
  GRAFT_CHECK(conv == nullptr || conv->groups == 1, method,
              "a convolution with groups cannot be merged; got groups=", conv->groups,
              place(context));
}

at::Tensor add_to_weight(const nn::FrozenLayer& base, const at::Tensor& delta) {
  const at::Tensor weight = nn::weight_of(base).detach();
  const bool transposed = std::holds_alternative<nn::FrozenEmbedding>(base);
  return (weight + (transposed ? delta.t() : delta).reshape(weight.sizes()))
      .to(weight.scalar_type());
}

at::Tensor embedding_branch(const nn::FrozenEmbedding& base, const at::Tensor& A,
                            const at::Tensor& B, const at::Tensor& indices) {
  const at::Tensor hidden =
      at::embedding(A.t(), indices, base.padding_idx, base.scale_grad_by_freq);
  return hidden.matmul(B.t());
}

at::Tensor conv_branch(const nn::FrozenConv& base, const at::Tensor& A, const at::Tensor& B,
                       const at::Tensor& bias, const at::Tensor& x) {
  const at::Tensor hidden = base.convolve(base.padded(x), A, {}, 1);
  const std::vector<int64_t> ones(base.stride.size(), 1), zeros(base.stride.size(), 0);
  const bool batched = hidden.dim() == B.dim();
  const at::Tensor y = at::convolution(batched ? hidden : hidden.unsqueeze(0), B,
                                       bias.defined() ? std::optional(bias) : std::nullopt, ones,
                                       zeros, ones, false, zeros, base.groups);
  return batched ? y : y.squeeze(0);
}

std::string init_from_config(const char* method, nlohmann::json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end()) return "kaiming";
  const nlohmann::json value = std::move(*it);
  config.erase(it);
  if (value.is_boolean()) return value.get<bool>() ? "kaiming" : "random";
  GRAFT_CHECK(value.is_string(), method, key, " must be a boolean or a name; got ", value.dump());
  return find_factor_kind(value.get<std::string>()).name;
}

nlohmann::json init_to_config(const std::string& name) {
  if (name == "kaiming") return true;
  if (name == "random") return false;
  return name;
}

void write_factor_fields(nlohmann::json& config, int64_t rank, double alpha, double dropout,
                         const std::string& init) {
  config["r"] = rank;
  config["lora_alpha"] = number_field(alpha);
  config["lora_dropout"] = dropout;
  config["init_lora_weights"] = init_to_config(init);
}

void write_lora_switches(nlohmann::json& config, bool rslora, bool dora, bool bias) {
  config["use_rslora"] = rslora;
  config["use_dora"] = dora;
  config["lora_bias"] = bias;
  config["fan_in_fan_out"] = false;
}

}  // namespace graft::adapters
