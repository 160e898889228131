/// Which layers of a model to adapt, by the rules of Hugging Face PEFT.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace torch::nn {
class Module;
}

namespace graft::nn {

/// Names are dotted paths relative to the model ("layers.3.self_attn.q_proj").
///   a list     matches a name that equals an item or ends with "." + item; items are literal text
///   a pattern  a regular expression that must match the whole name
///   all_linear every Linear layer but the output layer
/// Exclusion comes first, then the list or pattern, then the layer numbers; a name that equals a
/// list item exactly is chosen whatever its layer number (PEFT's rule).
struct Selector {
  enum class Kind { list, pattern, all_linear };

  Selector() = default;
  /// A list: attach(model, options, {.targets = {"q_proj", "v_proj"}}).
  Selector(std::initializer_list<const char*> items) : names(items.begin(), items.end()) {}
  explicit Selector(std::vector<std::string> items) : names(std::move(items)) {}
  /// A regular expression over whole names.
  static Selector regex(std::string pattern);
  /// Every Linear layer but those named `output_layer`.
  static Selector all_linear();

  Kind kind = Kind::list;
  std::vector<std::string> names;    ///< for a list
  std::string pattern;               ///< for a pattern
  std::vector<std::string> exclude;  ///< list rule; these are never adapted
  std::string exclude_pattern;       ///< pattern rule; empty: none
  std::vector<int64_t> layers;       ///< layers_to_transform: only these numbers; empty: all
  std::vector<std::string>
      layers_pattern;  ///< the name before the number; empty: the first number after a dot
  std::string output_layer =
      "lm_head";  ///< all_linear leaves out names that equal this or end with "." + this

  /// Whether a list item that matches no layer is an error; off for lists that come from a file, as
  /// in PEFT.
  bool every_name_must_match = true;

  /// Whether a list or pattern chooses this name (all_linear also asks what the layer is: see
  /// `select`).
  bool matches(const std::string& name) const;
  /// Throws for an empty or contradictory choice and for a pattern that is no regular expression.
  void validate() const;
};

/// A chosen layer.
struct SelectedLayer {
  std::string name;
  std::shared_ptr<torch::nn::Module> module;
};

/// The model's layers that the selector chooses, in the model's order. `skip` are names of modules
/// that are left out with everything below them (modules_to_save). Throws when nothing is chosen
/// (and prints the nearest names), when a chosen module cannot be adapted, or when a list item
/// chooses nothing although others do.
std::vector<SelectedLayer> select(const torch::nn::Module& model, const Selector& selector,
                                  const std::vector<std::string>& skip = {});

/// rank_pattern and alpha_pattern: the value of the first key, in the given order, that matches
/// `(.*\.)?(key)$` from the name's beginning; keys are regular expressions.
template <class T>
using LayerPattern = std::vector<std::pair<std::string, T>>;

/// A pattern key that matches the layer of that name alone.
std::string exact_pattern_key(const std::string& name);

/// Whether a rank_pattern or alpha_pattern key matches a layer's name.
bool pattern_key_matches(const std::string& key, const std::string& name);

/// The value of the first matching key, or nothing.
template <class T>
std::optional<T> find_pattern(const LayerPattern<T>& pattern, const std::string& name) {
  for (const auto& [key, value] : pattern)
    if (pattern_key_matches(key, name)) return value;
  return std::nullopt;
}

}  // namespace graft::nn
