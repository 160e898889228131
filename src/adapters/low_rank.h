// What methods with factors A and B have in common: shapes, checks, values at the start.
#pragma once

#include <ATen/core/Tensor.h>
#include <graft/adapters/adapter_module.h>
#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <string>
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

/// Throws unless the rank suits the layer (at most min(in, out), a multiple of a convolution's
/// groups), the base is floating point, and an Embedding is asked for no dropout.
void check_rank(const char* method, const nn::FrozenLayer& layer, int64_t rank, double dropout,
                const LayerContext& context);

/// fp64 for an fp64 base, else fp32.
at::ScalarType master_type(const nn::FrozenLayer& layer);

/// A and B on the base's device with the values of that initialiser (init/initialiser.h), or zeros
/// when the context says that values are about to be loaded.
std::pair<at::Tensor, at::Tensor> make_factors(const nn::FrozenLayer& layer, int64_t rank,
                                               const std::string& init,
                                               const LayerContext& context);

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

}  // namespace graft::adapters
