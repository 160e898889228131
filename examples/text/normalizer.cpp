#include "examples/text/normalizer.h"

#include <graft/core/error.h>

#include <functional>
#include <utility>

#include "examples/text/byte_level.h"
#include "examples/text/unicode.h"

namespace graft::text {
namespace {

/// A step that is one function of the piece.
class Step : public Normalizer {
 public:
  explicit Step(std::function<void(Piece&)> function) : function_(std::move(function)) {}
  void apply(Piece& piece) const override { function_(piece); }

 private:
  std::function<void(Piece&)> function_;
};

std::unique_ptr<Normalizer> make_step(std::function<void(Piece&)> function) {
  return std::make_unique<Step>(std::move(function));
}

/// A step that rewrites the text as a whole and keeps its first character first.
std::unique_ptr<Normalizer> make_rewrite(std::function<std::string(std::string_view)> rewrite) {
  return make_step([rewrite = std::move(rewrite)](Piece& piece) {
    piece.text = rewrite(piece.text);
    if (piece.from_start > 0)
      piece.from_start = piece.text.empty() ? 0 : utf8_length(piece.text[0]);
  });
}

std::unique_ptr<Normalizer> make_normal_form(NormalForm form) {
  return make_rewrite([form](std::string_view text) { return to_normal_form(text, form); });
}

void strip(Piece& piece, bool left, bool right) {
  const std::string& text = piece.text;
  size_t begin = 0;
  size_t end = text.size();
  while (left && begin < end && is_whitespace(code_point_at(text, begin)))
    begin += utf8_length(text[begin]);
  while (right && end > begin && is_whitespace(code_point_before(text, end))) {
    end = previous_position(text, end);
  }
  const bool start_is_gone = begin > 0;
  piece = piece.part(begin, end);
  if (start_is_gone) piece.from_start = 0;
}

void remove_marks(Piece& piece) {
  std::string kept;
  for (size_t at = 0; at < piece.text.size();) {
    const size_t length = utf8_length(piece.text[at]);
    if (!is_mark(code_point_at(piece.text, at))) {
      kept.append(piece.text, at, length);
    } else if (at < piece.from_start) {
      piece.from_start = kept.size();
    }
    at += length;
  }
  piece.text = std::move(kept);
}

std::unique_ptr<Normalizer> read_strip(const JsonNode& node) {
  node.allow_only({"type", "strip_left", "strip_right"});
  const bool left = node.at("strip_left").boolean();
  const bool right = node.at("strip_right").boolean();
  return make_step([=](Piece& piece) { strip(piece, left, right); });
}

std::unique_ptr<Normalizer> read_plain(const JsonNode& node, std::unique_ptr<Normalizer> made) {
  node.allow_only({"type"});
  return made;
}

}  // namespace

std::unique_ptr<Normalizer> make_prepend(std::string prefix) {
  return make_step([prefix = std::move(prefix)](Piece& piece) { piece.prepend(prefix); });
}

std::unique_ptr<Normalizer> make_replace(Matcher matcher, std::string content) {
  return make_step([matcher = std::move(matcher), content = std::move(content)](Piece& piece) {
    piece.replace(matcher, content);
  });
}

std::unique_ptr<Normalizer> make_nfc() {
  return make_normal_form(NormalForm::kNfc);
}

std::unique_ptr<Normalizer> make_sequence(std::vector<std::unique_ptr<Normalizer>> steps) {
  const auto shared = std::make_shared<std::vector<std::unique_ptr<Normalizer>>>(std::move(steps));
  return make_step([shared](Piece& piece) {
    for (const auto& step : *shared) step->apply(piece);
  });
}

Matcher read_pattern(const JsonNode& node) {
  node.allow_only({"String", "Regex"});
  if (const auto text = node.find("String")) return find_literal(text->string());
  const JsonNode expression = node.at("Regex");
  return Regex(expression.string(), expression.place());
}

std::unique_ptr<Normalizer> read_normalizer(const JsonNode& node) {
  const std::string& type = node.type();
  if (type == "NFC") return read_plain(node, make_nfc());
  if (type == "NFD") return read_plain(node, make_normal_form(NormalForm::kNfd));
  if (type == "NFKC") return read_plain(node, make_normal_form(NormalForm::kNfkc));
  if (type == "NFKD") return read_plain(node, make_normal_form(NormalForm::kNfkd));
  if (type == "Lowercase") return read_plain(node, make_rewrite(to_lowercase));
  if (type == "StripAccents") return read_plain(node, make_step(remove_marks));
  if (type == "ByteLevel") return read_plain(node, make_rewrite(to_byte_level));
  if (type == "Strip") return read_strip(node);
  if (type == "Prepend") {
    node.allow_only({"type", "prepend"});
    return make_prepend(node.at("prepend").string());
  }
  if (type == "Replace") {
    node.allow_only({"type", "pattern", "content"});
    return make_replace(read_pattern(node.at("pattern")), node.at("content").string());
  }
  if (type == "Sequence") {
    node.allow_only({"type", "normalizers"});
    std::vector<std::unique_ptr<Normalizer>> steps;
    for (const JsonNode& item : node.at("normalizers").items())
      steps.push_back(read_normalizer(item));
    return make_sequence(std::move(steps));
  }
  node.at("type").refuse("unknown normalizer");
}

}  // namespace graft::text
