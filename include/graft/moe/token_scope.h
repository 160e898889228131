/// What a layer cannot see in its input: which tokens are padding, and of which kind tokens and
/// sequences are.
///
///   const moe::TokenScope batch({.valid = mask, .sequence_types = types});
///   loss = ...; loss.backward();
#pragma once

#include <ATen/core/Tensor.h>

namespace graft::moe {

/// All optional. The leading dimensions are those of the layers' inputs, [sequences, tokens].
struct TokenFacts {
  at::Tensor valid = {};           ///< bool [...]: padding is false and goes to no expert
  at::Tensor kinds = {};           ///< int64 [...]: which expert works on a token (MM-LoRA)
  at::Tensor sequence_types = {};  ///< int64 [sequences], 0 or 1 (LoRAMoE)
};

/// While it lives, mixtures on the thread that made it hear these facts. Scopes nest; the innermost
/// one counts alone. Keep it until backward is over where blocks are checkpointed.
class TokenScope {
 public:
  explicit TokenScope(TokenFacts facts);
  ~TokenScope();
  TokenScope(const TokenScope&) = delete;
  TokenScope& operator=(const TokenScope&) = delete;

  /// The innermost scope's facts; nothing known without a scope.
  static const TokenFacts& current();

 private:
  const TokenFacts facts_;
  const TokenScope* const outer_;
};

}  // namespace graft::moe
