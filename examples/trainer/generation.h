/// Text from a model.
#pragma once

#include <functional>
#include <string>

#include "examples/models/load.h"

namespace graft::trainer {

/// How tokens are chosen.
struct GenerationOptions {
  int64_t max_new_tokens = 64;
  double temperature = 0.0;  ///< 0: always the likeliest token
  double top_p =
      1.0;  ///< sample among the likeliest tokens that hold this much probability, in (0, 1]
  uint64_t seed = 0;

  /// Throws unless every option is in its range.
  void validate() const;
};

/// Continues `prompt` until an end token or the limit; returns the new text. `on_text` receives it
/// piece by piece.
std::string generate(models::LoadedModel& model, const std::string& prompt,
                     const GenerationOptions& options, bool add_special_tokens = true,
                     const std::function<void(const std::string&)>& on_text = {});

}  // namespace graft::trainer
