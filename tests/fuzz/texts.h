// The properties of what makes text of a model's files and of its tokens, for any bytes. A broken
// property aborts. Run by libFuzzer and, on seeds made of the goldens, by corpus_test.
#pragma once

#include <cstddef>
#include <span>

namespace lorikeet::testing {

enum class TextReader : char {
  kGgufTokenizer = 'g',  // a GGUF file: its tokenizer reads and writes text, or is refused
  kTokenizerFiles = 'f',  // a tokenizer_config.json beside a tokenizer.json that is sound
  kChatTemplate = 'c',    // a template, a zero byte, messages in JSON: rendered or refused
  kTokens = 't',          // token ids of two bytes: pieces of a stream are the text of the whole
};

// The first byte chooses the reader.
void FuzzText(std::span<const std::byte> bytes);

}  // namespace lorikeet::testing
