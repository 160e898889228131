// The built-in methods, one line each. A list rather than self-registration: a linker drops what
// nobody names.
#include <graft/adapters/lora.h>

namespace graft::adapters {

std::vector<MethodEntry> builtin_methods() {
  return {
      lora_entry(),
  };
}

}  // namespace graft::adapters
