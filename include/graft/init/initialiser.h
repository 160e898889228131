/// How the factors of a low-rank adapter start.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>
#include <vector>

namespace graft::init {

/// The factors to fill. B A is [out, in]; trailing kernel dimensions of A count as inputs.
struct Factors {
  at::Tensor& A;  ///< [r, in...]
  at::Tensor& B;  ///< [out, r...]
};

/// Fills A and B from the generator, under the law of that name; throws for an unknown name,
/// listing the known ones.
///   kaiming     A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0   (kaiming_uniform with a = sqrt(5): PEFT's
///   `true`) gaussian    A ~ N(0, (1/r)^2), B = 0                (PEFT's "gaussian") orthogonal  A
///   = (G Q_odd)^T / 10 and B = H Q_even / 10 with the odd and even rows of one random orthogonal
///   [r, r]
///               matrix and Gaussian G, H: B A = 0 to rounding although neither is zero; r even
///               (PEFT's "orthogonal")
///   random      A and B ~ U(-1/sqrt(fan in), 1/sqrt(fan in)): not the identity, for tests (PEFT's
///   `false`)
void initialise(std::string_view name, Factors factors, at::Generator generator);

/// Embedding: the zero factor is A, and B ~ N(0, 1), whatever the name ("random": A ~ N(0, 1) too),
/// as in PEFT; throws for an unknown name.
void initialise_embedding(std::string_view name, Factors factors, at::Generator generator);

/// The known names.
const std::vector<std::string>& names();

}  // namespace graft::init
