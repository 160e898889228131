// What methods with factors A and B have in common: shapes, checks, values at the start.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/adapters/adapter_module.h>
#include <graft/adapters/config_fields.h>
#include <graft/adapters/recipe.h>
#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace graft::adapters {

/// " (layer 'q_proj')", the end of an error's line.
std::string place(const LayerContext& context);

/// The dense sizes of B A: {out, in}; an Embedding's are {columns, rows}, a convolution's in counts
/// the kernel.
std::pair<int64_t, int64_t> dense_sizes(const nn::FrozenLayer& layer);

/// The shapes of A [r, in, kernel...] and B [out, r / groups, 1...].
std::pair<std::vector<int64_t>, std::vector<int64_t>> factor_shapes(const nn::FrozenLayer& layer,
                                                                    int64_t rank);

/// alpha / r, or alpha / sqrt(r) with `rslora`.
double lora_scale(double alpha, int64_t rank, bool rslora);

/// Throws unless rank, alpha and dropout are sound whatever the layer.
void check_options(const char* method, int64_t rank, double alpha, double dropout);

/// Throws unless the rank suits the layer (at most min(in, out), a multiple of a convolution's
/// groups), the base is floating point, and an Embedding is asked for no dropout.
void check_rank(const char* method, const nn::FrozenLayer& layer, int64_t rank, double dropout,
                const LayerContext& context);

/// Throws for a convolution with groups, where factors that are taken from the weight, or have a
/// matrix between them, would mix channels that the base keeps apart.
void check_no_groups(const char* method, const nn::FrozenLayer& layer, const LayerContext& context);

/// fp64 for an fp64 base, else fp32.
at::ScalarType master_type(const nn::FrozenLayer& layer);

/// The base weight as a matrix [out, in (* kernel)], an Embedding's transposed.
at::Tensor dense_weight(const nn::FrozenLayer& layer);

/// What `find` makes of the layer's dense weight, which it is handed on the CPU in the masters'
/// type; fills the context's report and adds the layer to what `find` throws.
init::Start found_start(const nn::FrozenLayer& layer, const LayerContext& context,
                        const std::function<init::Start(const at::Tensor& weight)>& find);

/// The initialiser of that name; throws for one that needs a core between A and B.
init::Kind find_factor_kind(std::string_view name);

/// A and B on the base's device with the values of that initialiser (init/initialiser.h), or zeros
/// when the context says that values are about to be loaded. Throws for one that subtracts or needs
/// a core.
std::pair<at::Tensor, at::Tensor> make_factors(const nn::FrozenLayer& layer, int64_t rank,
                                               const std::string& init, const LayerContext& context,
                                               const init::StartOptions& start = {});

/// The factors of an initialiser that subtracts: the update is s (B A - start_B start_A).
struct StartedFactors {
  at::Tensor A, B;              ///< trained
  at::Tensor start_A, start_B;  ///< their values at the start
};

/// The same with what is subtracted; throws for an initialiser that does not. The rank may be lower
/// than asked for (init::rank_of_start).
StartedFactors make_started_factors(const nn::FrozenLayer& layer, int64_t rank,
                                    const init::Kind& kind, const init::StartOptions& options,
                                    double scale, const LayerContext& context);

/// B M in B's shape, M [r, r]; differentiable.
at::Tensor times_core(const at::Tensor& B, const at::Tensor& M);

/// A and B under PEFT's names.
std::vector<nn::Adapter::FileTensor> factor_tensors(const at::Tensor& A, const at::Tensor& B,
                                                    bool embedding);

/// The tensor of that suffix; throws when the file has none.
const at::Tensor& stored(const char* method, const StoredLayer& layer, const std::string& suffix);

/// A and B of a stored layer, a convolution's or an Embedding's too.
std::pair<at::Tensor, at::Tensor> stored_factors(const char* method, const StoredLayer& layer);

/// B A - B0 A0 as B (A - A0) + (B - B0) A0, factors of twice the rank: no large products cancel, so
/// the update is exactly 0 at the start, and what was learnt survives factors rounded to 16 bits.
std::pair<at::Tensor, at::Tensor> since_start(const at::Tensor& A, const at::Tensor& B,
                                              const at::Tensor& start_A, const at::Tensor& start_B);

/// scale * B A as a dense matrix [out, in (* kernel)], detached.
at::Tensor dense_product(const at::Tensor& A, const at::Tensor& B, double scale);

/// Throws for a convolution with groups, whose B A mixes channels that the base keeps apart.
void check_mergeable(const char* method, const nn::FrozenLayer& base, const LayerContext& context);

/// W + delta in the base weight's layout and type, summed in the delta's type and rounded once.
/// delta: [out, in (* kernel)].
at::Tensor add_to_weight(const nn::FrozenLayer& base, const at::Tensor& delta);

/// s B A x of an Embedding, [..., columns]: rows of A's transpose, then B.
at::Tensor embedding_branch(const nn::FrozenEmbedding& base, const at::Tensor& A,
                            const at::Tensor& B, const at::Tensor& indices);

/// B * (A * x) of a convolution: A with the base's geometry, B with a kernel of one (and the base's
/// groups). `x` is not padded yet; `bias` [out] or undefined.
at::Tensor conv_branch(const nn::FrozenConv& base, const at::Tensor& A, const at::Tensor& B,
                       const at::Tensor& bias, const at::Tensor& x);

/// PEFT's value of init_lora_weights and graft's name for it.
std::string init_from_config(const char* method, nlohmann::json& config, const char* key);
nlohmann::json init_to_config(const std::string& name);

/// The options of initialisers: PEFT's lora_ga_config, eva_config and corda_config.
void read_start_options(const char* method, nlohmann::json& config, init::StartOptions& options);
/// The sub-configuration that belongs to the initialiser, where it has one.
void write_start_options(const init::Kind& kind, const init::StartOptions& options,
                         nlohmann::json& config);

/// What the configurations of methods with peft_type LORA have in common.
template <class Options>
void read_lora_fields(const char* method, nlohmann::json& config, Options& options) {
  ConfigFields fields(config, method);
  options.rank = fields.integer("r", 8);
  options.alpha = fields.number("lora_alpha", 8.0);
  options.dropout = fields.number("lora_dropout", 0.0);
  options.rslora = fields.flag("use_rslora", false);
  options.init = init_from_config(method, config, "init_lora_weights");
  if constexpr (requires { options.start; })
    read_start_options(method, config, options.start);
  else  // it says how values were found that the file already holds
    fields.ignore({"eva_config"});
  fields.ignore({"qalora_group_size", "megatron_core"});  // of options that are off
}

/// The same for writing; also what methods with factors A and B and another type share.
void write_factor_fields(nlohmann::json& config, int64_t rank, double alpha, double dropout,
                         const std::string& init);
void write_lora_switches(nlohmann::json& config, bool rslora, bool dora, bool bias);
template <class Options>
void write_lora_fields(const Options& options, bool dora, bool bias, nlohmann::json& config) {
  write_factor_fields(config, options.rank, options.alpha, options.dropout, options.init);
  write_lora_switches(config, options.rslora, dora, bias);
}

}  // namespace graft::adapters
