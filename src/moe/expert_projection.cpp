#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <graft/core/error.h>
#include <graft/init/initialiser.h>
#include <graft/moe/mix_lora.h>
#include <graft/ops/dora_linear.h>

#include <algorithm>
#include <cmath>

#include "../ops/aten_experts.h"
#include "../ops/cuda_dispatch.h"

namespace graft::moe {
namespace {

constexpr const char* kArea = "mixlora";

void check(const nn::FrozenLinear& base, const ExpertOptions& options,
           const adapters::LayerContext& context) {
  const int64_t out = base.weight.size(0), in = base.weight.size(1);
  GRAFT_CHECK(options.rank <= std::min(in, out), kArea,
              "rank must be in [1, min(in, out)]; got rank=", options.rank, " for in=", in,
              ", out=", out, " (layer '", context.name, "')");
}

}  // namespace

void ExpertOptions::validate() const {
  GRAFT_CHECK(rank >= 1, kArea, "rank must be at least 1; got ", rank);
  GRAFT_CHECK(std::isfinite(alpha) && alpha != 0.0, kArea,
              "alpha must be finite and not 0, which would switch the experts off; got ", alpha);
  ops::check_dropout(dropout, kArea);
  GRAFT_CHECK(init::find_kind(init).needs == init::Needs::nothing, kArea,
              "experts start at random; got init=", init);
}

double ExpertOptions::scale() const {
  const double r = static_cast<double>(rank);
  return alpha / (rslora ? std::sqrt(r) : r);
}

ExpertProjectionImpl::ExpertProjectionImpl(const nn::FrozenLinear& base, int64_t experts,
                                           const ExpertOptions& options,
                                           const adapters::LayerContext& context)
    : torch::nn::Module("ExpertProjection"),
      options_(options),
      seed_(context.seed),
      site_(static_cast<uint32_t>(random::hash_name(context.name))) {
  check(base, options, context);
  const int64_t out = base.weight.size(0), in = base.weight.size(1), rank = options.rank;
  const auto type = base.weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor A = at::zeros({experts, rank, in}, type), B = at::zeros({experts, out, rank}, type);
  if (context.initialise) {
    const auto generator = at::detail::createCPUGenerator(context.layer_seed());
    for (int64_t e = 0; e < experts; ++e) {
      at::Tensor one_A = A[e], one_B = B[e];
      init::initialise(options.init, {one_A, one_B}, generator);
    }
  }
  const auto device = base.weight.device();
  lora_A = register_parameter("lora_A", A.to(device));
  lora_B = register_parameter("lora_B", B.to(device));
  if (!options.dora) return;
  const at::Tensor m =
      context.initialise ? norms(base).clone() : at::zeros({experts, out}, lora_B.options());
  lora_magnitude_vector = register_parameter("lora_magnitude_vector", m.detach());
}

ops::ExpertTerm ExpertProjectionImpl::term() {
  ops::ExpertTerm term{lora_A, lora_B, options_.scale(), {}};
  if (options_.dropout > 0 && is_training())
    term.dropout = {options_.dropout, random::draw_key(seed_, site_, mask_counter)};
  return term;
}

at::Tensor ExpertProjectionImpl::norms(const nn::FrozenLinear& base) const {
  return norms_.get({base.weight, lora_A, lora_B}, [&] {
    const at::Tensor squares =
        squares_.get({base.weight}, [&] { return ops::row_squares(base.weight.detach()); });
    std::vector<at::Tensor> all;
    for (int64_t e = 0; e < lora_A.size(0); ++e)
      all.push_back(ops::dora_norm(base.weight, squares, lora_A[e], lora_B[e], options_.scale()));
    return at::stack(all);
  });
}

// b + c_e * product row by row; rows without expert: b + product.
at::Tensor ExpertProjectionImpl::scaled(const at::Tensor& product, const nn::FrozenLinear& base,
                                        const DispatchPlan& plan) const {
  const at::Tensor c = ops::dora_scale(lora_magnitude_vector, norms(base));
  const auto with_bias = [&](const at::Tensor& y) {
    return base.bias.defined() ? y + base.bias.to(y.scalar_type()) : y;
  };
  if (ops::on_device(product)) {
    // A row picks its expert's factors by a product with ones and zeros: the gradient's sums have
    // an order, and nothing waits for the device.
    const at::Tensor expert = ops::aten::expert_of_rows(plan.rows).unsqueeze(1);
    const at::Tensor is_own =
        (expert == at::arange(c.size(0) + 1, expert.options())).to(c.scalar_type());
    const at::Tensor ones = at::ones({1, c.size(1)}, c.options().requires_grad(false));
    return with_bias(product * is_own.mm(at::cat({c, ones})));
  }
  const int64_t* offsets = plan.rows.offsets.const_data_ptr<int64_t>();
  const int64_t experts = plan.rows.experts(), routed = plan.rows.routed();
  std::vector<at::Tensor> parts;
  for (int64_t e = 0; e < experts; ++e)
    if (const int64_t count = offsets[e + 1] - offsets[e]; count > 0)
      parts.push_back(product.narrow(0, offsets[e], count) * c[e]);
  if (routed < plan.rows.rows() || parts.empty())
    parts.push_back(product.narrow(0, routed, plan.rows.rows() - routed));
  return with_bias(parts.size() == 1 ? parts[0] : at::cat(parts));
}

at::Tensor ExpertProjectionImpl::rows(const nn::FrozenLinear& base, const at::Tensor& x,
                                      const DispatchPlan& plan, bool by_row) {
  const auto product = by_row ? ops::expert_row_linear : ops::expert_linear;
  if (!options_.dora) return product(x, base.weight, base.bias, term(), plan.rows);
  const at::Tensor unscaled = product(x, base.weight, {}, term(), plan.rows);
  return scaled(unscaled.to(lora_A.scalar_type()), base, plan).to(x.scalar_type());
}

ops::ExpertLayer ExpertProjectionImpl::layer(const nn::FrozenLinear& base) {
  GRAFT_CHECK(!options_.dora, kArea,
              "DoRA experts cannot be combined before the down projection; got dora=true");
  return {base.weight, base.bias, term()};
}

}  // namespace graft::moe
