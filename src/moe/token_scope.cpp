#include <graft/core/error.h>
#include <graft/moe/token_scope.h>

#include <utility>

namespace graft::moe {
namespace {

thread_local const TokenScope* innermost = nullptr;

void check_type(const at::Tensor& tensor, at::ScalarType type, const char* name) {
  GRAFT_CHECK(!tensor.defined() || tensor.scalar_type() == type, "tokens", name, " must be ",
              at::toString(type), "; got ", tensor.toString());
}

}  // namespace

TokenScope::TokenScope(TokenFacts facts) : facts_(std::move(facts)), outer_(innermost) {
  check_type(facts_.valid, at::kBool, "valid");
  check_type(facts_.kinds, at::kLong, "kinds");
  check_type(facts_.sequence_types, at::kLong, "sequence_types");
  innermost = this;
}

TokenScope::~TokenScope() {
  innermost = outer_;
}

const TokenFacts& TokenScope::current() {
  static const TokenFacts nothing;
  return innermost == nullptr ? nothing : innermost->facts_;
}

}  // namespace graft::moe
