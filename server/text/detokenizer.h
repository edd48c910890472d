// Tokens that arrive one by one to text.
#pragma once

#include <cstdint>
#include <string>

#include "server/text/tokenizer.h"
#include "server/text/utf8.h"

namespace lorikeet {

// The texts appended, one after the other, are exactly Tokenizer::Decode of the whole sequence;
// each is valid UTF-8 and never holds a part of a character. Text is passed on as soon as no later
// token can change it: a character whose bytes are spread over tokens waits for its last byte, and
// a run of byte-fallback tokens waits for its end (Hugging Face's decoder judges it as a whole).
// Costs a copy of the text, however long the sequence. Not thread-safe; one per stream.
class Detokenizer {
 public:
  enum class Start {
    kText,          // the first token begins a text: decoders that strip a leading space do so
    kContinuation,  // it follows a prompt: a leading space belongs to the text
  };

  // `tokenizer` must outlive this.
  Detokenizer(const Tokenizer& tokenizer, bool skip_special, Start start);

  // Appends to *text what `id` completes. An id that does not exist contributes nothing.
  void Append(int32_t id, std::string* text);
  // The end of the sequence: what is unfinished becomes U+FFFD.
  void Finish(std::string* text);

 private:
  void EndByteRun(std::string* text);
  void AppendStripped(std::string_view piece, std::string* text);

  const TokenPieces& pieces_;
  bool skip_special_;
  uint32_t strip_left_;
  Utf8Repairer repairer_;  // kBytes
  std::string byte_run_;   // kByteFallback
};

}  // namespace lorikeet
