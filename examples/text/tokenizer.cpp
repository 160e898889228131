#include "examples/text/tokenizer.h"

#include <graft/core/error.h>

#include <algorithm>
#include <utility>

#include "examples/text/tokenizer_parts.h"
#include "examples/text/unicode.h"

namespace graft::text {
namespace {

constexpr std::string_view kReplacement = "\uFFFD";
// No decoder needs more tokens than this to finish a character; then what is held back is text for
// good.
constexpr size_t kMostHeldBack = 32;

}  // namespace

Tokenizer::Tokenizer(std::shared_ptr<const TokenizerParts> parts) : parts_(std::move(parts)) {}

std::vector<int32_t> Tokenizer::encode(std::string_view utf8, bool add_special_tokens) const {
  const size_t invalid = find_invalid_utf8(utf8);
  GRAFT_CHECK(invalid == std::string_view::npos, "tokenizer", "text must be valid UTF-8; got byte ",
              static_cast<int>(static_cast<unsigned char>(utf8[invalid])), " at position ", invalid,
              " (", parts_->source, ")");
  std::vector<int32_t> ids;
  const PostProcessor& around = parts_->post_processor;
  if (add_special_tokens) ids = around.before;
  for (Fragment& fragment : parts_->added.split(utf8, parts_->normalizer.get())) {
    if (fragment.id) {
      ids.push_back(*fragment.id);
      continue;
    }
    std::vector<Piece> words;
    words.push_back(std::move(fragment.piece));
    if (parts_->pretokenizer) words = parts_->pretokenizer(std::move(words));
    for (const Piece& word : words) parts_->model.encode(word.text, ids);
  }
  if (add_special_tokens) ids.insert(ids.end(), around.after.begin(), around.after.end());
  return ids;
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids, bool skip_special_tokens) const {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (const int32_t id : ids) {
    const AddedToken* added = parts_->added.find(id);
    const std::string& spelling = added != nullptr ? added->spelling : token(id);
    if (!(skip_special_tokens && added != nullptr && added->special)) tokens.push_back(spelling);
  }
  const bool decodes = static_cast<bool>(parts_->decoder);
  if (decodes) tokens = parts_->decoder(std::move(tokens));
  std::string text;
  for (const std::string& piece : tokens) {
    // Without a decoder nobody knows where spaces belong; the reference puts them everywhere.
    if (!decodes && !text.empty()) text += ' ';
    text += piece;
  }
  return text;
}

int64_t Tokenizer::vocabulary_size() const {
  return std::max(parts_->model.end_id(), parts_->added.end_id());
}

std::optional<int32_t> Tokenizer::token_id(std::string_view token) const {
  return parts_->id_of(token);
}

const std::string& Tokenizer::token(int32_t id) const {
  if (const AddedToken* added = parts_->added.find(id)) return added->content;
  const std::string* known = parts_->model.token(id);
  GRAFT_CHECK(known != nullptr, "tokenizer", "a token id must be in the vocabulary of ",
              vocabulary_size(), "; got ", id, " (", parts_->source, ")");
  return *known;
}

bool Tokenizer::is_special(int32_t id) const {
  const AddedToken* added = parts_->added.find(id);
  return added != nullptr && added->special;
}

std::optional<int32_t> Tokenizer::bos_id() const {
  return parts_->bos_id;
}
std::optional<int32_t> Tokenizer::eos_id() const {
  return parts_->eos_id;
}
std::optional<int32_t> Tokenizer::padding_id() const {
  return parts_->padding_id;
}
std::string Tokenizer::bos_token() const {
  return parts_->bos_id ? token(*parts_->bos_id) : "";
}
std::string Tokenizer::eos_token() const {
  return parts_->eos_id ? token(*parts_->eos_id) : "";
}
const std::string& Tokenizer::chat_template() const {
  return parts_->chat_template;
}

StreamDecoder::StreamDecoder(Tokenizer tokenizer, bool skip_special_tokens)
    : tokenizer_(std::move(tokenizer)), skip_special_tokens_(skip_special_tokens) {}

std::string StreamDecoder::push(int32_t id) {
  if (skip_special_tokens_ && tokenizer_.is_special(id)) return "";
  window_.push_back(id);
  const std::string text = tokenizer_.decode(window_, skip_special_tokens_);
  const bool grows = text.size() > shown_.size() && text.starts_with(shown_);
  const bool may_change = text.ends_with(kReplacement) && window_.size() - context_ < kMostHeldBack;
  if (!grows || may_change) return "";
  std::string news = text.substr(shown_.size());
  // What was just shown becomes the context: decoders treat the first token of a text differently.
  window_.erase(window_.begin(), window_.begin() + static_cast<std::ptrdiff_t>(context_));
  context_ = window_.size();
  shown_ = tokenizer_.decode(window_, skip_special_tokens_);
  return news;
}

std::string StreamDecoder::finish() {
  const std::string text = tokenizer_.decode(window_, skip_special_tokens_);
  std::string rest;
  if (text.starts_with(shown_)) {
    rest = text.substr(shown_.size());
  } else {
    window_.erase(window_.begin(), window_.begin() + static_cast<std::ptrdiff_t>(context_));
    rest = tokenizer_.decode(window_, skip_special_tokens_);
  }
  window_.clear();
  shown_.clear();
  context_ = 0;
  return rest;
}

}  // namespace graft::text
