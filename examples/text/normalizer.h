/// Normalizers rewrite a stretch of text before it is split into words.
#pragma once

#include <memory>
#include <vector>

#include "examples/text/json_node.h"
#include "examples/text/piece.h"

namespace graft::text {

/// One rewriting step.
class Normalizer {
 public:
  virtual ~Normalizer() = default;
  virtual void apply(Piece& piece) const = 0;
};

/// Puts `prefix` in front of text that is not empty.
std::unique_ptr<Normalizer> make_prepend(std::string prefix);

/// Replaces every match by `content`.
std::unique_ptr<Normalizer> make_replace(Matcher matcher, std::string content);

/// Normal form C.
std::unique_ptr<Normalizer> make_nfc();

/// One step after the other.
std::unique_ptr<Normalizer> make_sequence(std::vector<std::unique_ptr<Normalizer>> steps);

/// Builds the "normalizer" of a tokenizer.json; an unknown type or option is refused by name.
std::unique_ptr<Normalizer> read_normalizer(const JsonNode& node);

/// Reads {"String": text} or {"Regex": expression}, as several components hold it.
Matcher read_pattern(const JsonNode& node);

}  // namespace graft::text
