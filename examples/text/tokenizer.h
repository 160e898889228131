/// Text to token ids and back, with the ids that Hugging Face `tokenizers` gives for the same file.
///
/// encode:  text -> added tokens cut out -> normalizer -> pre-tokenizer (words) -> BPE merges ->
/// post-processor decode:  ids -> tokens -> decoder -> text
///
/// Two families of byte-pair encoding are read, from a `tokenizer.json` or from the metadata of a
/// GGUF file: byte-level (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece style with byte fallback
/// (Llama 2, Mistral). A component or an option that is not implemented is refused by its name;
/// nothing is approximated.
///
/// Formats: https://huggingface.co/docs/tokenizers (components), GGUF specification
/// (`tokenizer.ggml.*` keys).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace graft::text {

/// The tokenizer part of a GGUF file's metadata; every field is named after its key.
struct GgufVocabulary {
  std::string model;  ///< tokenizer.ggml.model: "gpt2" (byte-level) or "llama" (SentencePiece)
  std::string pre;    ///< tokenizer.ggml.pre: how "gpt2" splits text; empty when the key is absent
  std::vector<std::string> tokens;  ///< tokenizer.ggml.tokens, the index is the id
  std::vector<float> scores;        ///< tokenizer.ggml.scores; needed by "llama", else may be empty
  std::vector<int32_t> token_types;  ///< tokenizer.ggml.token_type: 1 normal 2 unknown 3 control 4
                                     ///< user 5 unused 6 byte
  std::vector<std::string>
      merges;  ///< tokenizer.ggml.merges, "left right", best first; needed by "gpt2"
  std::optional<int32_t> bos_id;      ///< tokenizer.ggml.bos_token_id
  std::optional<int32_t> eos_id;      ///< tokenizer.ggml.eos_token_id
  std::optional<int32_t> unknown_id;  ///< tokenizer.ggml.unknown_token_id
  std::optional<int32_t> padding_id;  ///< tokenizer.ggml.padding_token_id
  std::optional<bool>
      add_bos_token;  ///< tokenizer.ggml.add_bos_token; absent: true for "llama", else false
  std::optional<bool> add_eos_token;  ///< tokenizer.ggml.add_eos_token; absent: false
  std::optional<bool>
      add_space_prefix;       ///< tokenizer.ggml.add_space_prefix; absent: true ("llama" only)
  std::string chat_template;  ///< tokenizer.chat_template, empty when absent
  std::string source;         ///< the file's name, for error messages
};

struct TokenizerParts;

/// An immutable tokenizer: cheap to copy, safe to use from several threads at once.
class Tokenizer {
 public:
  /// Reads a `tokenizer.json`; takes the chat template and the names of the special tokens from
  /// `tokenizer_config.json` and `chat_template.jinja` in the same folder where they exist.
  /// Truncation and padding settings in the file are ignored: they belong to the caller, in
  /// transformers too.
  static Tokenizer from_json_file(const std::string& path);

  /// Builds the tokenizer that a GGUF file describes; an unknown `model` or `pre` is refused by
  /// name.
  static Tokenizer from_gguf(const GgufVocabulary& vocabulary);

  /// Token ids of UTF-8 text. Special tokens written out in the text become their ids;
  /// `add_special_tokens` adds what the post-processor adds (often the beginning-of-sequence
  /// token). Throws on invalid UTF-8, with the byte position.
  std::vector<int32_t> encode(std::string_view utf8, bool add_special_tokens = false) const;

  /// The text of `ids`; bytes that are not valid UTF-8 become U+FFFD. Throws on an id outside the
  /// vocabulary.
  std::string decode(const std::vector<int32_t>& ids, bool skip_special_tokens) const;

  /// Largest id + 1; a model's embedding may have more rows, never fewer.
  int64_t vocabulary_size() const;

  /// The id of one token as it is spelled in the vocabulary (not of a text), if there is such a
  /// token.
  std::optional<int32_t> token_id(std::string_view token) const;

  /// The spelling of one token in the vocabulary; throws on an id outside it.
  const std::string& token(int32_t id) const;

  /// Whether `id` is a special token, one that `decode` can skip.
  bool is_special(int32_t id) const;

  std::optional<int32_t> bos_id() const;      ///< Beginning of sequence, if the files name one.
  std::optional<int32_t> eos_id() const;      ///< End of sequence, if the files name one.
  std::optional<int32_t> padding_id() const;  ///< Padding, if the files name one.

  /// The bos token's spelling, as chat templates want it; empty when there is none.
  std::string bos_token() const;

  /// The eos token's spelling, as chat templates want it; empty when there is none.
  std::string eos_token() const;

  /// The Jinja chat template of the files, empty when there is none; see chat_template.h.
  const std::string& chat_template() const;

  /// Wraps finished parts; the two readers above use it.
  explicit Tokenizer(std::shared_ptr<const TokenizerParts> parts);

 private:
  std::shared_ptr<const TokenizerParts> parts_;
};

/// Decodes a growing sequence for display: what it returns is always complete UTF-8, and the parts
/// joined are `decode` of the whole (except that a run of byte tokens which starts valid and turns
/// invalid keeps its valid start).
class StreamDecoder {
 public:
  StreamDecoder(Tokenizer tokenizer, bool skip_special_tokens);

  /// Takes one more id and returns the text that became certain, often one word, sometimes nothing.
  std::string push(int32_t id);

  /// Returns what is still held back (an unfinished character becomes U+FFFD) and starts afresh.
  std::string finish();

 private:
  Tokenizer tokenizer_;
  bool skip_special_tokens_;
  std::vector<int32_t> window_;  // tokens already shown that serve as context, then those held back
  std::string shown_;            // the text of the context
  size_t context_ = 0;           // how many of window_ are context
};

}  // namespace graft::text
