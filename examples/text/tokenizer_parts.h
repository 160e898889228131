/// What a Tokenizer is made of; the readers fill it in.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "examples/text/added_tokens.h"
#include "examples/text/bpe.h"
#include "examples/text/decoder.h"
#include "examples/text/normalizer.h"
#include "examples/text/pretokenizer.h"

namespace graft::text {

/// Ids that a post-processor puts around the text.
struct PostProcessor {
  std::vector<int32_t> before, after;
};

/// The parts; a missing normalizer, pre-tokenizer or decoder is empty.
struct TokenizerParts {
  explicit TokenizerParts(BpeOptions options) : source(options.source), model(std::move(options)) {}

  std::string source;  // for error messages
  Bpe model;
  std::unique_ptr<Normalizer> normalizer;
  PreTokenizer pretokenizer;
  AddedTokens added;
  PostProcessor post_processor;
  Decoder decoder;
  std::optional<int32_t> bos_id, eos_id, padding_id;
  std::string chat_template;

  /// The id of an added token or of a token of the model.
  std::optional<int32_t> id_of(std::string_view token) const {
    const AddedToken* known = added.find(token);
    return known != nullptr ? std::optional<int32_t>(known->id) : model.id(token);
  }
};

/// Builds the "post_processor" of a tokenizer.json; an unknown type or option is refused by name.
PostProcessor read_post_processor(const JsonNode& node);

}  // namespace graft::text
