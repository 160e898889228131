/// DyLoRA: one LoRA that works at every rank up to R.
///
///   Linear:     y = W x + b + s_b B[:, :b] A[:b] drop(x)         s_b = alpha / b
///   Embedding:  y = W[i] + s_b B[:, :b] A[:b, i]
///   ConvNd:     y = W * x + b + s_b B[:, :b] * (A[:b] * drop(x))
///
/// In training the rank b is drawn once per optimiser step, the same for all layers, so that the
/// leading units learn to do without the rest. `frozen` trains unit b - 1 alone (row b - 1 of A,
/// column b - 1 of B, counted from 0), otherwise units 0 to b - 1; what a step does not train, the
/// optimiser leaves as it is, bit for bit (nn::Adapter::live_rows). Afterwards the factors can be
/// cut to any b: the result is a plain LoRA of rank b and the same alpha.
/// Source: Valipour et al. 2022, arXiv 2210.07558. PEFT does not have the method.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/ops/dropout.h>

#include <string>
#include <utility>
#include <vector>

namespace graft::adapters {

class DyloraImpl;

/// Options of DyLoRA.
struct DyloraOptions {
  using Method = DyloraImpl;

  int64_t rank = 8;      ///< R, in [1, min(in, out)]
  double alpha = 16.0;   ///< numerator of the scale at every rank; not 0
  double dropout = 0.0;  ///< on the low-rank branch's input, in [0, 1); not for Embedding
  /// How A and B start (init/initialiser.h): "kaiming", "gaussian", "orthogonal".
  std::string init = "kaiming";
  int64_t rank_min = 1;  ///< smallest b that is drawn, in [1, rank_max]
  int64_t rank_max = 0;  ///< largest b that is drawn, in [rank_min, R]; 0: R
  /// Chances of rank_min ... rank_max, up to a common factor, none negative; empty: all equal.
  std::vector<double> rank_weights = {};
  bool frozen = true;     ///< train unit b - 1 alone, as the authors' GLUE script does
  int64_t eval_rank = 0;  ///< rank outside of training, in [1, R]; 0: R

  /// The largest b that is drawn.
  int64_t largest_drawn() const { return rank_max == 0 ? rank : rank_max; }
  /// Throws unless every option is in its range.
  void validate() const;
};

/// The rank of a training step: a function of the run's seed and the step alone (Philox), so that a
/// resumed run, every machine and every thread draw the same.
int64_t draw_rank(const DyloraOptions& options, uint64_t seed, int64_t step);

/// A and B of one layer, R units, and how many of them are in use.
class DyloraImpl : public AdapterModule<DyloraImpl, DyloraOptions> {
 public:
  static constexpr const char* kName = "dylora";

  /// Makes A and B on the base weight's device, fp32 (fp64 for an fp64 base). Throws for a rank
  /// that the layer cannot carry, an unknown initialiser, dropout on an Embedding, and a
  /// convolution with groups: its leading units are not the leading rows of A.
  DyloraImpl(const nn::FrozenLayer& base, const DyloraOptions& options,
             const LayerContext& context);

  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x);
  /// indices: [...]; returns [..., columns].
  at::Tensor forward(const nn::FrozenEmbedding& base, const at::Tensor& indices);
  /// x: [batch, in, size...]; returns [batch, out, size'...].
  at::Tensor forward(const nn::FrozenConv& base, const at::Tensor& x);

  /// W + s_b B[:, :b] A[:b] at the rank outside of training, rounded once to W's dtype.
  at::Tensor merged_weight(const nn::FrozenLayer& base) const;

  std::vector<FileTensor> file_tensors() const override;
  /// The rows of lora_A and columns of lora_B that the current step trains.
  std::optional<nn::LiveRows> live_rows(std::string_view parameter) const override;

  /// The rank outside of training, in [1, R]. See set_dylora_rank for a whole model.
  void set_rank(int64_t rank);
  /// The rank in force: in training mode the step's (R before the first step), else set_rank's.
  int64_t active_rank() const;

  /// Draws the step's rank and gives it to all layers, each at most its own R.
  static void begin_step(const std::vector<DyloraImpl*>& layers, const StepInfo& info);
  /// "rank": the step's b.
  static Figures figures(const std::vector<DyloraImpl*>& layers);
  static void write_config(const DyloraOptions& options, nlohmann::json& config);
  static std::string describe(const DyloraOptions& options);

  at::Tensor lora_A;  ///< [R, in]; Embedding: [R, rows]; Conv: [R, in, kernel...]
  at::Tensor lora_B;  ///< [out, R]; Embedding: [columns, R]; Conv: [out, R, 1...]

 private:
  struct Leading {
    at::Tensor A, B;
    double scale;
  };
  // The factors at the rank in force, as the forward pass uses them.
  Leading leading() const;

  int64_t step_rank_ = 0;  // b of the current step; 0 before the first
  int64_t eval_rank_;
  bool embedding_ = false;
};
TORCH_MODULE(Dylora);

/// Sets the rank outside of training of every DyLoRA layer in the model (of each at most its own
/// R): what a program's `--rank` calls after `attach_from`. Throws when the model has none, or for
/// a rank that no layer has.
void set_dylora_rank(torch::nn::Module& model, int64_t rank);

/// The built-in list's entry.
MethodEntry dylora_entry();

}  // namespace graft::adapters
