/// adapter_config.json, as Hugging Face PEFT writes it.
#pragma once

#include <graft/adapters/attach_options.h>
#include <graft/adapters/recipe.h>

#include <filesystem>
#include <memory>
#include <string>

namespace graft::io {

/// What an adapter_config.json says: the method with its options, where it goes, and remarks on its
/// origin.
struct AdapterConfig {
  std::shared_ptr<const adapters::Recipe> recipe;
  AttachOptions attach;
  std::string base_model;               ///< base_model_name_or_path; may be empty
  std::string task_type = "CAUSAL_LM";  ///< may be empty
};

/// Reads a config file, or the adapter_config.json of a folder. Missing fields have PEFT's
/// defaults; a field that graft does not know is refused unless its value is neutral (null, false,
/// empty): it could change the numbers.
AdapterConfig read_adapter_config(const std::filesystem::path& file_or_folder);

/// The text of the file: sorted keys, two spaces, as PEFT writes it.
std::string write_adapter_config(const AdapterConfig& config);

}  // namespace graft::io
