// What turns text into a model's tokens and back. An adapter may bring its own.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/api/adapter.h"
#include "server/text/chat_template.h"
#include "server/text/grammar.h"
#include "server/text/tokenizer.h"

namespace lorikeet {

struct ModelText {
  const Tokenizer* tokenizer = nullptr;
  const Grammars* grammars = nullptr;           // nullptr: no end of sequence to end one with
  const ChatTemplate* chat_template = nullptr;  // nullptr: none
  int32_t vocab_size = 0;                       // rows of logits
  const std::vector<int32_t>* eos_ids = nullptr;  // nullptr: the model's
  // Keeps what is an adapter's; what is the model's outlives every request.
  std::shared_ptr<const AdapterText> owner = nullptr;
};

}  // namespace lorikeet
