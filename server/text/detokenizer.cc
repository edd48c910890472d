#include "server/text/detokenizer.h"

namespace lorikeet {

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool skip_special, Start start)
    : pieces_(tokenizer.pieces()),
      skip_special_(skip_special),
      strip_left_(start == Start::kText ? pieces_.strip_max : 0) {}

void Detokenizer::Append(int32_t id, std::string* text) {
  if (!pieces_.has(id, TokenPieces::kExists)) return;
  if (skip_special_ && pieces_.has(id, TokenPieces::kSpecial)) return;
  const std::string_view piece = pieces_.piece(id);
  if (pieces_.join == TokenPieces::Join::kBytes) {
    repairer_.Append(piece, text);
  } else if (pieces_.has(id, TokenPieces::kByte)) {
    byte_run_.append(piece);
  } else {
    EndByteRun(text);
    AppendStripped(piece, text);
  }
}

void Detokenizer::Finish(std::string* text) {
  repairer_.Finish(text);
  EndByteRun(text);
}

void Detokenizer::EndByteRun(std::string* text) {
  if (byte_run_.empty()) return;
  if (ValidateUtf8(byte_run_, "byte run").ok()) {
    AppendStripped(byte_run_, text);
  } else {
    for (size_t i = 0; i < byte_run_.size(); ++i) AppendStripped("\xEF\xBF\xBD", text);
  }
  byte_run_.clear();
}

void Detokenizer::AppendStripped(std::string_view piece, std::string* text) {
  while (strip_left_ > 0 && piece.starts_with(pieces_.strip)) {
    piece.remove_prefix(pieces_.strip.size());
    --strip_left_;
  }
  if (!piece.empty()) strip_left_ = 0;
  text->append(piece);
}

}  // namespace lorikeet
