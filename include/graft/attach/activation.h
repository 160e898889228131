/// Adapters for models whose layers are torch::nn's own.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace torch::nn {
class Module;
}

namespace graft {

/// While it lives, products, convolutions and look-ups with the adapted layers' weights run the
/// layers' active adapters, on the thread that made it. It works above autograd and autocast:
/// gradients flow as through any layer, inference mode and no_grad are served, and the model's code
/// is not touched. Scopes nest.
///
/// How: kernels registered at a dispatch key that is off by default and switched on by the scope
/// recognise a weight by its storage. Another thread needs a scope of its own. Models in
/// TorchScript are not served.
class ActivationScope {
 public:
  /// Names and layers whose adapters run. Throws when another library has taken the mechanism.
  explicit ActivationScope(
      const std::vector<std::pair<std::string, std::shared_ptr<torch::nn::Module>>>& layers);
  ~ActivationScope();
  ActivationScope(ActivationScope&&) noexcept;
  ActivationScope(const ActivationScope&) = delete;
  ActivationScope& operator=(const ActivationScope&) = delete;
  ActivationScope& operator=(ActivationScope&&) = delete;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace graft
