// What the engine tells the front about one request, in order: any number of kToken events (with
// the prompt's log-probabilities first, if asked for), then exactly one kFinished.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace lorikeet {

enum class FinishReason : uint8_t {
  kNone,
  kLength,    // max_new_tokens or the context length reached
  kEos,       // an end-of-sequence id of the model
  kStop,      // one of the request's stop_token_ids
  kFormed,    // the request's constraint lets nothing follow
  kEmbedded,  // the request's embedding is there
  kCanceled,  // Engine::Cancel, by client or stop string
  kError,     // status says why
};

struct TokenLogprobs {
  float logprob = 0;                          // natural log, of the raw distribution
  std::vector<std::pair<int32_t, float>> top;  // best first, top_logprobs entries
};

struct TokenEvent {
  enum class Kind : uint8_t { kPromptLogprobs, kToken, kFinished };
  Kind kind = Kind::kToken;
  int32_t token = 0;                            // kToken
  TokenLogprobs logprobs;                       // kToken, if asked for
  std::vector<TokenLogprobs> prompt_logprobs;   // kPromptLogprobs: [prompt - 1], tokens 1, 2, ...
  FinishReason finish = FinishReason::kNone;    // kFinished
  absl::Status status;                          // kFinished with kError
  int32_t cached_tokens = 0;                    // of the prompt, computed by earlier requests
  int64_t adapter_copy_us = 0;                  // waited for the adapter's copy to the device
  int64_t time_us = 0;                          // on the engine's Clock
  int64_t admitted_us = 0;  // when the request's first step was planned; 0: not yet
};

}  // namespace lorikeet
