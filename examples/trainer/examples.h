/// Examples to learn from, one JSON object a line.
///
///   {"text": ...}                          all of it is learnt
///   {"prompt": ..., "completion": ...}     the completion is learnt
///   {"messages": [{"role", "content"}...]} the assistant's turns are learnt, as the model's chat
///                                          template writes them
///
/// An example begins with the tokenizer's own beginning (often a beginning-of-sequence token) and,
/// but for messages, whose template ends a turn, ends with the end-of-sequence token where there is
/// one. Prompt and completion are tokenised apart, so that the border is a token's.
#pragma once

#include <string>
#include <vector>

#include "examples/text/tokenizer.h"
#include "examples/trainer/data.h"

namespace graft::trainer {

/// The examples of a .jsonl text; empty lines are skipped. Throws for a line that is none of these,
/// naming its number, and for messages without a chat template.
std::vector<Example> read_examples(const std::string& jsonl, const text::Tokenizer& tokenizer);

}  // namespace graft::trainer
