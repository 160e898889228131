/// AdaLoRA: triplets in the form of a singular value decomposition, and one budget of them that all
/// layers share and that shrinks while training.
///
///   y = W x + b + s' B (E * (A drop(x))),   s' = alpha / (r0 + 1e-5),   r0 the initial rank
///
/// A [r0, in], E [r0, 1] and B [out, r0] are trained; training switches triplets off by E_i = 0.
///   loss += gamma * mean over all A and B of |A A^T - I|_F and |B^T B - I|_F        (not squared)
///   importance of an entry p:  I = |p dL/dp|,  I' = b1 I' + (1 - b1) I,
///                              U' = b2 U' + (1 - b2) |I - I'|,  score = I' U'
///   of a triplet:              score(E_i) + mean_k score(A_ik) + mean_n score(B_ni)
/// After each step t the b0 - b(t) triplets of the lowest score lose their E; b(t) falls from all
/// of them at t = tinit to target_r a layer at t = total - tfinal along a cubic curve. From then on
/// the choice is final and is enforced after every step.
///
/// Source: Zhang et al. 2023, arXiv 2303.10512. Values at the start, order of the steps and files
/// are those of Hugging Face PEFT.
#pragma once

#include <graft/adapters/adapter_module.h>
#include <graft/adapters/recipe.h>
#include <graft/ops/dropout.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace graft::adapters {

class AdaLoraImpl;

/// Options of AdaLoRA; the names in brackets are PEFT's.
struct AdaLoraOptions {
  using Method = AdaLoraImpl;

  int64_t init_rank = 12;   ///< r0, in [1, min(in, out)] [init_r]
  int64_t target_rank = 8;  ///< triplets a layer at the end, on average, in [1, r0] [target_r]
  /// Numerator of the scale, positive. PEFT's AdaLoRA knows one for all layers, hence no
  /// alpha_pattern.
  double lora_alpha = 8.0;
  double dropout = 0.0;          ///< on the branch's input, in [0, 1) [lora_dropout]
  int64_t tinit = 0;             ///< steps before the budget starts to fall
  int64_t tfinal = 0;            ///< steps at the end in which the choice is final
  int64_t delta_t = 1;           ///< the choice is made anew every so many steps [deltaT]
  double beta1 = 0.85;           ///< of the smoothed importance, in (0, 1)
  double beta2 = 0.85;           ///< of its uncertainty, in (0, 1)
  double orth_reg_weight = 0.5;  ///< gamma, weight of the orthogonality penalty, >= 0
  /// Steps of the whole run; without it those that the training loop reports.
  std::optional<int64_t> total_step = std::nullopt;
  /// A, B and E all N(0, 1): no identity, for tests [init_lora_weights: false].
  bool random_start = false;
  /// Triplets left in a layer that was pruned when it was saved. Files set it, through their
  /// rank_pattern; such a layer computes, merges and converts, but trains no further.
  std::optional<int64_t> rank = std::nullopt;

  /// s'.
  double scale() const;
  /// Throws unless every option is in its range and the phases fit into total_step.
  void validate() const;
};

/// How many triplets all layers together may keep after each step.
struct AdaLoraSchedule {
  int64_t initial = 0;  ///< b0
  int64_t target = 0;   ///< bT
  int64_t tinit = 0, tfinal = 0, delta_t = 1, total = 0;

  /// The first step whose choice is final: total - tfinal.
  int64_t last_choice() const { return total - tfinal; }
  /// b(t).
  int64_t budget(int64_t step) const;
  /// Whether triplets are chosen after this step.
  bool chooses(int64_t step) const;
};

/// A, E and B of one layer, and the importance of their entries.
class AdaLoraImpl : public AdapterModule<AdaLoraImpl, AdaLoraOptions> {
 public:
  static constexpr const char* kName = "adalora";

  /// Makes A, B ~ N(0, 0.02^2) and E = 0 on the base weight's device, fp32 (fp64 for an fp64 base).
  /// Throws for a rank that the layer cannot carry and for a convolution with groups.
  AdaLoraImpl(const nn::FrozenLayer& base, const AdaLoraOptions& options,
              const LayerContext& context);

  /// x: [..., in]; returns [..., out].
  at::Tensor forward(const nn::FrozenLinear& base, const at::Tensor& x);
  /// x: [batch, in, size...]; returns [batch, out, size'...].
  at::Tensor forward(const nn::FrozenConv& base, const at::Tensor& x);

  /// W + s' B diag(E) A, summed in fp32 at least and rounded once to W's dtype.
  at::Tensor merged_weight(const nn::FrozenLinear& base) const;
  at::Tensor merged_weight(const nn::FrozenConv& base) const;

  std::vector<FileTensor> file_tensors() const override;
  /// The averages I' and U' of A, B and E, and which triplets are on.
  std::vector<FileTensor> state_tensors() override;

  /// The score of each triplet, [r0]; zeros before the first step.
  at::Tensor triplet_scores() const;
  /// How many triplets have E != 0.
  int64_t active_rank() const;

  /// Throws unless the number of steps is known and the phases fit into it.
  static void begin_step(const std::vector<AdaLoraImpl*>& adapters, const StepInfo& info);
  /// The orthogonality penalty of all layers; undefined when its weight is 0.
  static at::Tensor penalty(const std::vector<AdaLoraImpl*>& adapters);
  /// Updates the importance, and switches triplets off down to the budget.
  static void end_step(const std::vector<AdaLoraImpl*>& adapters, const StepInfo& info);
  /// budget: b(t) of the last step, all layers together; active_rank: triplets on, a layer.
  static Figures figures(const std::vector<AdaLoraImpl*>& adapters);

  static void write_config(const AdaLoraOptions& options, nlohmann::json& config);
  static std::string describe(const AdaLoraOptions& options);

  at::Tensor lora_A;   ///< [r0, in]; Conv: [r0, in * kernel]
  at::Tensor lora_B;   ///< [out, r0]
  at::Tensor lora_E;   ///< [r0, 1]
  const double scale;  ///< s'

 private:
  /// The smoothed importance of one parameter's entries, and its uncertainty.
  struct Importance {
    at::Tensor average, uncertainty;
    void update(const at::Tensor& parameter, double beta1, double beta2);
    at::Tensor score() const { return average * uncertainty; }
  };

  at::Tensor delta() const;
  /// Makes what `state_tensors` reports, once.
  void ensure_state();

  static AdaLoraSchedule schedule_of(const std::vector<AdaLoraImpl*>& adapters,
                                     const StepInfo& info);
  static void choose(const std::vector<AdaLoraImpl*>& adapters, int64_t off);

  std::array<Importance, 3> importance_;  // of A, B, E; undefined until the first step
  at::Tensor kept_;                       // [r0], bool: which triplets the last choice left on
  int64_t budget_ = -1;                   // b(t) of the last step, all layers; -1: none yet
};
TORCH_MODULE(AdaLora);

/// The built-in list's entry.
MethodEntry adalora_entry();

}  // namespace graft::adapters
