#include <graft/core/error.h>

namespace graft {

void fail(std::string_view area, const std::string& message) {
  throw Error("[" + std::string(area) + "] " + message);
}

}  // namespace graft
