// From one row of logits to one token: penalties, temperature, filters, draw, log-probabilities.
// Pure host code: any thread, as long as each has its own scratch.
//
// The draw is a pure function of (logits, sampling parameters, history): its random number is
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by
// the request's seed and counted by the position the token will take. Chunking, batching,
// preemption and the other requests cannot change it.
//
// A bias is added to the raw logit; a token that is forbidden or not allowed counts as -inf from then
// on. Penalties: repetition (Keskar et al. 2019, "CTRL") over prompt and output divides positive and
// multiplies negative logits; frequency and presence (OpenAI's API) are then subtracted, over
// output alone. Filters keep a prefix of the tokens ordered by (logit descending, id ascending):
// top-k, then top-p over what top-k left, then min-p; at least one token always stays.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/api/logit_row.h"

namespace lorikeet {

// Reused from row to row so that a warm sampler does not allocate. Contents mean nothing outside.
struct SamplerScratch {
  std::vector<float> adjusted;    // [vocab] logits after penalties
  std::vector<float> weights;     // [vocab] unnormalised probabilities
  std::vector<float> block_max;   // [vocab / block]
  std::vector<float> sorted_max;  // [vocab / block]
  std::vector<uint64_t> keys;     // candidates, see sampler.cc
  std::vector<int32_t> counts;    // [vocab] all zero between calls
};

// Fills `out` for one logit row. `logits` are the model's raw logits of that row: [vocab], its
// own.
// row.target >= 0: `out` gets the target and its log-probability; otherwise a sampled token, the
// most likely with the lowest id when greedy. Log-probabilities are natural logs of the raw
// distribution, before penalties and temperature.
// Logits without a distribution (a NaN, +inf, or nothing finite) give token kNoToken and no
// log-probabilities. REQUIRES: every id in row.history is in [0, vocab).
void Sample(std::span<const float> logits, const LogitRow& row, SamplerScratch* scratch,
            SampledToken* out);

// Whether some logits are biased or left out before all else.
bool HasEdits(const LogitRow& row);
bool HasPenalties(const SamplingParams& params);
// Whether top-k or top-p can leave out tokens of a vocabulary of `vocab`.
bool HasPrefixFilter(const SamplingParams& params, int64_t vocab);
// The draw's random number, in [0, 1). `position`: of the token to be drawn.
double DrawUniform(uint64_t seed, uint64_t position);

// The generator behind the draw, public so that its published test vectors can be checked.
std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

}  // namespace lorikeet
