// One request as the engine sees it: token ids in, token events out, or an embedding. Immutable
// once submitted.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/api/adapter_store.h"
#include "engine/api/embedding.h"
#include "engine/api/limits.h"
#include "engine/api/token_constraint.h"

namespace lorikeet {

using RequestId = uint64_t;

// Order of application: bias and what may not come, penalties, temperature, top-k, top-p, min-p,
// draw.
struct SamplingParams {
  float temperature = 1.0f;         // 0: greedy
  float top_p = 1.0f;               // (0, 1]
  int32_t top_k = 0;                // 0: off
  float min_p = 0.0f;               // [0, 1]; relative to the most likely token
  float repetition_penalty = 1.0f;  // > 0; over prompt and output (Keskar et al. 2019)
  float presence_penalty = 0.0f;    // [-2, 2]; over output
  float frequency_penalty = 0.0f;   // [-2, 2]; over output
  std::vector<std::pair<int32_t, float>> logit_bias;  // [-100, 100], added; each token once
  int32_t min_tokens = 0;                        // of the answer, before it may end by itself
  std::vector<std::vector<int32_t>> bad_words;   // token sequences that do not occur in the answer
  uint64_t seed = 0;                // same seed, same request: same tokens, whatever else runs
  int32_t top_logprobs = -1;        // -1: none; 0: the chosen token only; k: k best as well
  bool prompt_logprobs = false;     // also report log-probabilities of the prompt's tokens

  bool greedy() const { return temperature == 0.0f; }
};

// INVALID_ARGUMENT naming field, value and bound when a value is out of range or not finite.
absl::Status ValidateSampling(const SamplingParams& params);

struct Request {
  std::vector<int32_t> prompt;  // not empty
  SamplingParams sampling;
  int32_t max_new_tokens = 16;  // at least 1
  std::vector<int32_t> stop_token_ids;  // end the request; the stop token is the last one sent
  // What ends the request as the model's EOS does, instead of the model's own.
  std::optional<std::vector<int32_t>> eos_ids;
  bool ignore_eos = false;              // EOS ids do not end the request
  std::shared_ptr<TokenConstraint> constraint;  // nullptr: none; this request's alone
  // Not nullptr: the prompt's hidden states are pooled here, and the request ends without a token.
  std::shared_ptr<Embedding> embedding;
  AdapterLease adapter;                 // empty: base model
  std::string adapter_name;             // as the client named it; empty: base model
  std::string tenant;                   // whose request it is; empty: nobody's in particular
  // Keys and values are shared with requests of the same tenant and salt alone; at most kMaxCacheSaltBytes.
  std::string cache_salt;
  bool skip_prefix_cache = false;       // neither uses nor leaves shared keys and values
  int64_t deadline_us = std::numeric_limits<int64_t>::max();  // on the engine's Clock
};

}  // namespace lorikeet
