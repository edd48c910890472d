// One step as flat arrays of integers: what the scheduler plans and the runner computes.
//
// Rows are tokens. Sequences are ordered so that rows of one adapter are adjacent (base rows
// first); every adapter segment is then one contiguous range of rows.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/api/adapter.h"
#include "engine/api/request.h"
#include "engine/api/token_event.h"

namespace lorikeet {

// A row whose logits are wanted.
struct LogitRow {
  int32_t row = 0;                           // in [0, T)
  int32_t sequence = 0;                      // in [0, S)
  int32_t target = -1;                       // prompt log-probability of this token; -1: sample
  const SamplingParams* sampling = nullptr;
  std::span<const int32_t> history;          // tokens up to and including this row
  int32_t prompt_tokens = 0;                 // history[0, prompt_tokens) is the prompt
};

struct Batch {
  std::vector<int32_t> tokens;          // [T]
  std::vector<int32_t> positions;       // [T] position in the sequence
  std::vector<int32_t> sequence_begin;  // [S + 1] rows of sequence s: [begin[s], begin[s + 1])
  std::vector<int32_t> page_begin;      // [S + 1] into `pages`
  std::vector<int32_t> pages;           // page ids: block-major, pages_per_block ids a block
  std::vector<AdapterSegment> segments;
  std::vector<LogitRow> logit_rows;     // ascending by row

  int32_t rows() const { return static_cast<int32_t>(tokens.size()); }
  int32_t sequences() const { return static_cast<int32_t>(sequence_begin.size()) - 1; }
};

// One entry a logit row, in the batch's order.
struct SampledToken {
  // The row's logits were no distribution (a NaN, say, from a broken adapter): its request ends
  // with an error, the others go on.
  static constexpr int32_t kNoToken = -1;

  int32_t token = 0;        // the sampled token; the target for prompt log-probabilities
  TokenLogprobs logprobs;   // filled if the request asked
};

struct StepResult {
  std::vector<SampledToken> sampled;  // [logit_rows]
};

}  // namespace lorikeet
