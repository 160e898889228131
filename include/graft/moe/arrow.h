/// Arrow: routing over a library of adapters without training anything.
///
///   y = W x + b + sum_{e in S} g_e s_e B_e A_e x,   score_e = |<x, v_e>|,
///   S = the top_k largest scores,   g = softmax(score_S / temperature)
///
/// v_e [in] is the direction that the adapter amplifies most: the right singular vector of the
/// largest singular value of B_e A_e, found from the QR decompositions of B_e and A_e^T and the
/// SVD of the r x r matrix between them, without forming B_e A_e. The scores are no cosines: a
/// longer x is routed more sharply. Nothing is trained.
/// Source: Ostapenko et al. 2024, arXiv 2405.11157; Hugging Face PEFT, which finds v by 15 steps of
/// power iteration from a random start.
#pragma once

#include <graft/moe/expert_library.h>

namespace graft::moe {

/// Options of Arrow.
struct ArrowOptions {
  using Method = class ArrowImpl;

  std::shared_ptr<const ExpertLibrary> experts = nullptr;
  int64_t top_k = 3;         ///< in [1, number of experts] [top_k]
  double temperature = 1.0;  ///< positive [router_temperature]

  /// Throws unless every option is in its range.
  void validate() const;
  /// How scores become gates.
  RouterOptions router() const;
};

/// v of the update B A: the right singular vector of its largest singular value, of length 1, its
/// entry of the largest magnitude positive; 0 for an update of zeros.  A: [r, in], B: [out, r].
at::Tensor arrow_prototype(const at::Tensor& A, const at::Tensor& B);

/// The experts of one layer, all of them frozen.
class ArrowImpl : public LinearMixture<ArrowImpl, ArrowOptions> {
 public:
  static constexpr const char* kName = "arrow";

  ArrowImpl(const nn::FrozenLayer& base, const ArrowOptions& options,
            const adapters::LayerContext& context);

  at::Tensor gates(const at::Tensor& x);

  /// The adapters' factors; the prototypes follow from them.
  std::vector<FileTensor> file_tensors() const override { return experts.file_tensors(); }
  void take_file_tensors(const std::vector<FileTensor>& values) override;

  static void write_config(const ArrowOptions& options, nlohmann::json& config);
  static std::string describe(const ArrowOptions& options);

  at::Tensor prototypes;  ///< v, [E, in]; a buffer

 private:
  void find_prototypes();
};
TORCH_MODULE(Arrow);

/// The built-in list's entry.
adapters::MethodEntry arrow_entry();

}  // namespace graft::moe
