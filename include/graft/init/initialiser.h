/// How the factors of a low-rank adapter start: by name.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace graft::init {

/// What an initialiser has to know of a layer before it can fill the factors.
enum class Needs {
  nothing,   ///< random numbers
  weight,    ///< the base weight
  gradient,  ///< the loss's gradient with respect to the weight, over some batches
  inputs,    ///< the layer's inputs, over some batches
};

/// A known initialiser.
struct Kind {
  std::string name;  ///< PEFT's spelling where it has it
  Needs needs = Needs::nothing;
  /// Whether the model starts from W - s B A, so that the update is s (B A - B0 A0).
  bool subtracts = false;
  /// N of "pissa_niter_N"; -1: exact.
  int64_t iterations = -1;

  /// Whether the weight alone gives the same start again, on any machine to rounding.
  bool is_reproducible() const { return needs == Needs::weight && iterations < 0; }
  /// Whether the start has a matrix between A and B: LoRA-XS's own.
  bool has_core() const { return name == "svd" || name == "lora_sb"; }
};

/// The initialiser of that name, '-' and '_' and upper and lower case being the same; throws for an
/// unknown name, listing the known ones.
///   kaiming      A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0: kaiming_uniform with a = sqrt(5) (PEFT's
///                `true`)
///   gaussian     A ~ N(0, (1/r)^2), B = 0
///   orthogonal   A = (G Q_odd)^T / 10 and B = H Q_even / 10 with the odd and even rows of one
///                random orthogonal [r, r] matrix and Gaussian G, H: B A = 0 to rounding although
///                neither is zero; r even
///   random       A and B ~ U(-1/sqrt(fan in), 1/sqrt(fan in)): not the identity, for tests (PEFT's
///                `false`)
///   pissa, pissa_niter_N (N iterations of randomised SVD), olora, nystrom, lora_ga, corda, eva:
///   see start.h
///   svd          LoRA-XS's: A and B from W's singular triplets, the core close to 0
///   lora_sb      LoRA-XS's too: all three from the first step of full training, see start.h
Kind find_kind(std::string_view name);

/// The known names, "pissa_niter_N" for the family.
const std::vector<std::string>& names();

/// The factors to fill. B A is [out, in]; trailing kernel dimensions of A count as inputs.
struct Factors {
  at::Tensor& A;  ///< [r, in...]
  at::Tensor& B;  ///< [out, r...]
};

/// Fills A and B from the generator, for the names that need nothing else; throws for another.
void initialise(std::string_view name, Factors factors, at::Generator generator);

/// Embedding: the zero factor is A, and B ~ N(0, 1), whatever the name ("random": A ~ N(0, 1) too),
/// as in PEFT; throws for an unknown name.
void initialise_embedding(std::string_view name, Factors factors, at::Generator generator);

}  // namespace graft::init
