// Frequencies and tables. The operations and their order are those of Hugging Face's rope
// functions, all in float32, so that the tables agree with a model trained there.
#include <ATen/ATen.h>
#include <graft/core/error.h>
#include <graft/ops/rope.h>

#include <cmath>
#include <numbers>

namespace graft::ops {
namespace {

constexpr const char* kArea = "rope";

// Llama 3.1: long waves are slowed by `factor`, short ones kept, those between interpolated.
at::Tensor llama3_frequencies(const at::Tensor& frequencies, const RopeOptions& options) {
  const auto original = static_cast<double>(options.original_max_position_embeddings);
  const double longest_kept = original / options.high_freq_factor;
  const double shortest_slowed = original / options.low_freq_factor;
  const at::Tensor wave = (2 * std::numbers::pi) / frequencies;
  const at::Tensor slowed = frequencies / options.factor;
  const at::Tensor smooth = (original / wave - options.low_freq_factor) /
                            (options.high_freq_factor - options.low_freq_factor);
  const at::Tensor between = (1 - smooth) * frequencies / options.factor + smooth * frequencies;
  const at::Tensor ends = at::where(wave > shortest_slowed, slowed, frequencies);
  return at::where((wave >= longest_kept).logical_and(wave <= shortest_slowed), between, ends);
}

}  // namespace

void RopeOptions::validate() const {
  GRAFT_CHECK(std::isfinite(theta) && theta > 0.0, kArea, "theta must be > 0; got ", theta);
  GRAFT_CHECK(head_dim >= 2 && head_dim % 2 == 0 && head_dim <= (int64_t{1} << 20), kArea,
              "head_dim must be even, in [2, 2^20]; got ", head_dim);
  GRAFT_CHECK(type == "default" || type == "linear" || type == "llama3", kArea,
              "type must be one of default, linear, llama3; got '", type, "'");
  if (type == "default") return;
  GRAFT_CHECK(std::isfinite(factor) && factor >= 1.0, kArea, "factor must be >= 1; got ", factor);
  if (type == "linear") return;
  GRAFT_CHECK(low_freq_factor > 0.0 && std::isfinite(high_freq_factor) &&
                  high_freq_factor > low_freq_factor,
              kArea, "low_freq_factor must be > 0 and below high_freq_factor; got ",
              low_freq_factor, " and ", high_freq_factor);
  GRAFT_CHECK(original_max_position_embeddings >= 1, kArea,
              "original_max_position_embeddings must be >= 1; got ",
              original_max_position_embeddings);
}

at::Tensor rope_inverse_frequencies(const RopeOptions& options) {
  options.validate();
  const at::Tensor exponent =
      at::arange(0, options.head_dim, 2, at::kLong).to(at::kFloat) / options.head_dim;
  const at::Tensor frequencies = 1.0 / at::pow(at::Scalar(options.theta), exponent);
  if (options.type == "linear") return frequencies / options.factor;
  if (options.type == "llama3") return llama3_frequencies(frequencies, options);
  return frequencies;
}

RopeTable rope_table(const RopeOptions& options, const at::Tensor& positions) {
  GRAFT_CHECK(positions.defined() && positions.scalar_type() == at::kLong &&
                  (positions.dim() == 1 || positions.dim() == 2),
              kArea, "positions must be an int64 tensor [tokens] or [batch, tokens]");
  const at::Tensor angles =
      positions.to(at::kFloat).unsqueeze(-1) * rope_inverse_frequencies(options);
  return {angles.cos(), angles.sin()};
}

RopeTable rope_table(const RopeOptions& options, int64_t tokens) {
  GRAFT_CHECK(tokens >= 0, kArea, "tokens must be >= 0; got ", tokens);
  return rope_table(options, at::arange(tokens, at::kLong));
}

}  // namespace graft::ops
