#include <graft/core/error.h>
#include <graft/nn/adapter_slot.h>
#include <graft/nn/frozen_layer.h>
#include <graft/nn/selector.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <regex>
#include <set>

namespace graft::nn {
namespace {

std::regex compile(const std::string& pattern, const char* what) {
  try {
    return std::regex(pattern, std::regex::ECMAScript);
  } catch (const std::regex_error& error) {
    fail("targets",
         concat(what, " must be a regular expression; got '", pattern, "': ", error.what()));
  }
}

// Patterns are few and used on every layer: each is compiled once.
const std::regex& compiled(const std::string& pattern, const char* what) {
  thread_local std::map<std::string, std::regex> cache;
  const auto it = cache.find(pattern);
  return it != cache.end() ? it->second
                           : cache.emplace(pattern, compile(pattern, what)).first->second;
}

bool full_match(const std::string& name, const std::string& pattern, const char* what) {
  return std::regex_match(name, compiled(pattern, what));
}

bool equals_or_ends_with(const std::string& name, const std::string& item) {
  return name == item || (name.size() > item.size() && name.ends_with(item) &&
                          name[name.size() - item.size() - 1] == '.');
}

bool in_list(const std::string& name, const std::vector<std::string>& items) {
  return std::any_of(items.begin(), items.end(),
                     [&](const auto& item) { return equals_or_ends_with(name, item); });
}

// The layer's number: the first one between dots after a leading component, or after one of the
// given names.
std::optional<int64_t> layer_number(const std::string& name,
                                    const std::vector<std::string>& patterns) {
  std::vector<std::string> expressions = {".*?\\.[^.]*\\.(\\d+)\\."};
  if (!patterns.empty()) {
    expressions.clear();
    for (const auto& pattern : patterns) expressions.push_back(".*?\\." + pattern + "\\.(\\d+)\\.");
  }
  for (const auto& expression : expressions) {
    std::smatch match;
    if (std::regex_search(name, match, compiled(expression, "layers_pattern"),
                          std::regex_constants::match_continuous)) {
      const std::string digits = match[1].str();
      int64_t number = 0;
      const auto [end, error] =
          std::from_chars(digits.data(), digits.data() + digits.size(), number);
      return error == std::errc() ? std::optional(number) : std::nullopt;
    }
  }
  return std::nullopt;
}

size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitution = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitution});
    }
  }
  return row[b.size()];
}

std::string last_component(const std::string& name) {
  return name.substr(name.rfind('.') + 1);
}

// The adaptable layers' last components, nearest to `wanted` first, as text.
std::string nearest(const std::vector<SelectedLayer>& layers, const std::string& wanted) {
  std::vector<std::string> names;
  for (const auto& layer : layers) {
    const std::string name = last_component(layer.name);
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  const std::string target = last_component(wanted);
  std::stable_sort(names.begin(), names.end(), [&](const auto& a, const auto& b) {
    return edit_distance(a, target) < edit_distance(b, target);
  });
  if (names.size() > 6) names.resize(6);
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none" : text;
}

// Whether `name` is one of the modules to save or lies in one.
bool is_skipped(const std::string& name, const std::vector<std::string>& skip) {
  return std::any_of(skip.begin(), skip.end(), [&](const auto& item) {
    return name == item || name.starts_with(item + ".") || equals_or_ends_with(name, item) ||
           name.find("." + item + ".") != std::string::npos;
  });
}

// What was asked for, for messages.
std::string describe(const Selector& selector) {
  if (selector.kind == Selector::Kind::all_linear) return "all-linear";
  if (selector.kind == Selector::Kind::pattern) return "/" + selector.pattern + "/";
  std::string text;
  for (const auto& name : selector.names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

bool excluded(const std::string& name, const Selector& selector) {
  if (!selector.exclude_pattern.empty() &&
      full_match(name, selector.exclude_pattern, "exclude_modules"))
    return true;
  return in_list(name, selector.exclude);
}

// Every module of the model that could carry an adapter or be named by mistake; adapters themselves
// left out.
std::vector<SelectedLayer> candidates(const torch::nn::Module& model,
                                      const std::vector<std::string>& skip) {
  std::vector<SelectedLayer> found;
  std::set<const torch::nn::Module*> seen;
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    const bool in_slot =
        item.key().find(std::string(".") + AdapterSlot::kChildName + ".") != std::string::npos ||
        item.key().ends_with(std::string(".") + AdapterSlot::kChildName);
    // A module that the model holds twice counts once, under its first name.
    if (in_slot || is_skipped(item.key(), skip) || !seen.insert(item.value().get()).second)
      continue;
    found.push_back({item.key(), item.value()});
  }
  return found;
}

}  // namespace

Selector Selector::regex(std::string pattern) {
  Selector selector;
  selector.kind = Kind::pattern;
  selector.pattern = std::move(pattern);
  return selector;
}

Selector Selector::all_linear() {
  Selector selector;
  selector.kind = Kind::all_linear;
  return selector;
}

void Selector::validate() const {
  GRAFT_CHECK(kind != Kind::list || !names.empty(), "targets",
              "the list of target modules must not be empty");
  GRAFT_CHECK(kind != Kind::pattern || !pattern.empty(), "targets",
              "the target pattern must not be empty");
  if (kind == Kind::pattern) {
    compiled(pattern, "the target pattern");
    GRAFT_CHECK(layers.empty() && layers_pattern.empty(), "targets",
                "layers_to_transform goes with a list of targets, not with a pattern; got /",
                pattern, "/");
  }
  if (!exclude_pattern.empty()) compiled(exclude_pattern, "exclude_modules");
  GRAFT_CHECK(layers_pattern.empty() || !layers.empty(), "targets",
              "layers_pattern needs layers_to_transform; got none");
}

bool Selector::matches(const std::string& name) const {
  if (excluded(name, *this)) return false;
  if (kind == Kind::pattern) return full_match(name, pattern, "the target pattern");
  if (kind == Kind::list) {
    if (std::find(names.begin(), names.end(), name) != names.end()) return true;
    if (!in_list(name, names)) return false;
  } else if (equals_or_ends_with(name, output_layer)) {
    return false;
  }
  if (layers.empty()) return true;
  const auto number = layer_number(name, layers_pattern);
  return number && std::find(layers.begin(), layers.end(), *number) != layers.end();
}

std::string exact_pattern_key(const std::string& name) {
  std::string key = "^";
  for (const char c : name) key += (c == '.' ? std::string("\\.") : std::string(1, c));
  return key;
}

bool pattern_key_matches(const std::string& key, const std::string& name) {
  return std::regex_search(name, compiled("(?:.*\\.)?(?:" + key + ")$", "a pattern key"),
                           std::regex_constants::match_continuous);
}

std::vector<SelectedLayer> select(const torch::nn::Module& model, const Selector& selector,
                                  const std::vector<std::string>& skip) {
  selector.validate();
  const auto all = candidates(model, skip);
  std::vector<SelectedLayer> adaptable, chosen;
  for (const auto& layer : all) {
    const bool fits = is_adaptable(*layer.module);
    if (fits) adaptable.push_back(layer);
    if (!selector.matches(layer.name)) continue;
    if (selector.kind == Selector::Kind::all_linear) {
      if (layer.module->as<torch::nn::LinearImpl>() != nullptr) chosen.push_back(layer);
      continue;
    }
    GRAFT_CHECK(fits, "targets", "a target must be a Linear, Embedding or Conv layer; got ",
                layer.module->name(), " (module '", layer.name, "')");
    chosen.push_back(layer);
  }
  const std::string wanted = selector.names.empty() ? selector.pattern : selector.names.front();
  GRAFT_CHECK(!chosen.empty(), "targets", "the targets must match at least one layer; got '",
              describe(selector), "', which matches 0 of ", adaptable.size(),
              " (nearest names: ", nearest(adaptable, wanted), ")");
  if (!selector.every_name_must_match) return chosen;
  for (const auto& item : selector.names) {
    const bool used = std::any_of(all.begin(), all.end(), [&](const auto& layer) {
      return equals_or_ends_with(layer.name, item);
    });
    GRAFT_CHECK(used, "targets", "every target must match a layer; got '", item,
                "', which matches none (nearest names: ", nearest(adaptable, item), ")");
  }
  return chosen;
}

}  // namespace graft::nn
