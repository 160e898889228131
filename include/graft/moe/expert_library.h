/// Adapters that were trained before, as the experts of a mixture.
#pragma once

#include <graft/adapters/recipe.h>
#include <graft/moe/linear_mixture.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace graft::moe {

/// Several adapters on the same layers; each has one rank and one scale.
class ExpertLibrary {
 public:
  /// One adapter: its plain LoRA form layer by layer.
  using Adapter = std::map<std::string, adapters::PlainLora>;

  /// Reads adapter folders (PEFT's or graft's) of methods with a plain LoRA form. Throws for a
  /// folder that trains biases or whole modules besides, and as the constructor does.
  static std::shared_ptr<const ExpertLibrary> read(
      const std::vector<std::filesystem::path>& folders);
  /// Throws unless all adapters have the same layers, and each one rank and one scale.
  explicit ExpertLibrary(std::vector<Adapter> adapters);
  /// The shapes alone, where values are about to be loaded.
  ExpertLibrary(std::vector<int64_t> ranks, std::vector<double> scales);

  int64_t count() const { return static_cast<int64_t>(ranks_.size()); }
  const std::vector<int64_t>& ranks() const { return ranks_; }
  const std::vector<double>& scales() const { return scales_; }
  /// The layers' names, for AttachOptions::targets; empty for shapes alone.
  std::vector<std::string> layers() const;

  /// Where the adapters were read from; empty where they were not.
  const std::vector<std::filesystem::path>& folders() const { return folders_; }

  /// The experts of one layer in the masters' type, on its device: values where there are some and
  /// the context asks for them, else zeros. Throws for a layer that the adapters do not have.
  Experts experts(const char* method, const nn::FrozenLayer& base,
                  const adapters::LayerContext& context) const;

  /// GenKnowSub as PEFT does it: from every A the mean of the general adapters' A, from every B the
  /// mean of their B. That is not the difference of the updates B A. All ranks must be the same.
  std::shared_ptr<const ExpertLibrary> without_general(const ExpertLibrary& general) const;

  /// "expert_ranks" and "expert_scales" of a configuration; `read_config` takes those, or
  /// "adapters", a list of folders.
  void write_config(nlohmann::json& config) const;
  static std::shared_ptr<const ExpertLibrary> read_config(const char* method,
                                                          nlohmann::json& config);

 private:
  std::vector<int64_t> ranks_;
  std::vector<double> scales_;
  std::vector<Adapter> adapters_;
  std::vector<std::filesystem::path> folders_;
};

/// Throws unless there are experts.
void check_library(const char* method, const std::shared_ptr<const ExpertLibrary>& library);

}  // namespace graft::moe
