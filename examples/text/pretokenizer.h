/// Pre-tokenizers split text into the words that are tokenized one by one.
#pragma once

#include <functional>
#include <vector>

#include "examples/text/json_node.h"
#include "examples/text/piece.h"

namespace graft::text {

/// Splits pieces into smaller ones, perhaps rewriting them.
using PreTokenizer = std::function<std::vector<Piece>(std::vector<Piece>)>;

/// Splits at the matches of `matcher`.
PreTokenizer make_split(Matcher matcher, SplitBehavior behavior, bool invert = false);

/// Writes words in the byte-level alphabet; `use_regex`: after splitting them like GPT-2.
PreTokenizer make_byte_level(bool add_prefix_space, bool use_regex);

/// One after the other.
PreTokenizer make_sequence(std::vector<PreTokenizer> steps);

/// Builds the "pre_tokenizer" of a tokenizer.json; an unknown type or option is refused by name.
PreTokenizer read_pretokenizer(const JsonNode& node);

}  // namespace graft::text
