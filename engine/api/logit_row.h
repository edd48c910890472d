// What a step wants of a row's logits, and what it gets: the words of sampling between the
// scheduler that asks and the backend that answers.
#pragma once

#include <cstdint>
#include <span>

#include "engine/api/embedding.h"
#include "engine/api/request.h"
#include "engine/api/token_constraint.h"
#include "engine/api/token_event.h"

namespace lorikeet {

// A row whose logits are wanted, or its hidden state.
struct LogitRow {
  int32_t row = 0;                           // in [0, T)
  int32_t sequence = 0;                      // in [0, S)
  int32_t target = -1;                       // prompt log-probability of this token; -1: sample
  int32_t vocab = 0;                         // tokens of the row's own vocabulary; 0: the base's
  const SamplingParams* sampling = nullptr;
  std::span<const int32_t> history;          // tokens up to and including this row
  int32_t prompt_tokens = 0;                 // history[0, prompt_tokens) is the prompt
  std::span<const int32_t> forbidden;        // tokens that may not be sampled
  TokenConstraint* constraint = nullptr;     // what else may not; asked by the runner
  std::span<const uint32_t> allowed;         // its answer: a bit a token. Empty: all may
  Embedding* embedding = nullptr;            // gets the hidden state; no logits, no token

  // Its logits, where the base has so many.
  int32_t width(int32_t base_vocab) const { return vocab > 0 ? vocab : base_vocab; }
};

struct SampledToken {
  // The row's logits were no distribution (a NaN, say, from a broken adapter): its request ends
  // with an error, the others go on.
  static constexpr int32_t kNoToken = -1;

  int32_t token = 0;        // the sampled token; the target for prompt log-probabilities
  TokenLogprobs logprobs;   // filled if the request asked
};

}  // namespace lorikeet
