/// Decoders turn tokens back into text.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "examples/text/json_node.h"

namespace graft::text {

/// Rewrites a list of tokens; the text is what the last decoder leaves, joined.
using Decoder = std::function<std::vector<std::string>(std::vector<std::string>)>;

/// Byte-level tokens to text; invalid UTF-8 becomes U+FFFD.
Decoder make_byte_level_decoder();

/// SentencePiece tokens to text: '▁' is a space, "<0xHH>" a byte, and `strip_space` drops the space
/// that encoding put in front.
Decoder make_sentencepiece_decoder(bool strip_space);

/// Builds the "decoder" of a tokenizer.json; an unknown type or option is refused by name.
Decoder read_decoder(const JsonNode& node);

}  // namespace graft::text
