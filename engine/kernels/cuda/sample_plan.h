// What the sampling kernels do with each row of a batch, worked out on the host without a device.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/api/logit_row.h"

namespace lorikeet::cuda {

// A token of a row's history, once.
struct SeenToken {
  int32_t id = 0;
  int32_t count = 0;  // in the output
};

// One look at a row of logits. Penalised rows that want log-probabilities have two: at the raw
// logits, then at the penalised ones.
struct SampleJob {
  enum Choice : int32_t { kNone, kTarget, kBest, kDraw };

  int32_t row = 0;  // of the logits and of the results
  int32_t vocab = 0;  // logits of the row
  Choice choice = kNone;
  int32_t target = -1;  // kTarget
  int32_t top = 0;      // best tokens to list
  // Sums over the vocabulary that are needed: of e^logit, and of 2^(scale logit).
  bool log_total = false;
  bool weigh = false;
  bool logprob = false;  // of the chosen token

  // kDraw.
  bool filter = false;  // some tokens may not be drawn
  int32_t top_k = 0;    // 0: off
  float top_p = 1.0f;
  float min_p = 0.0f;
  float scale = 0;  // log2(e) / temperature
  double uniform = 0;

  // Into SamplePlan::seen.
  int32_t first_seen = 0;
  int32_t seen_count = 0;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
};

// Raw jobs go first: penalties change the logits in place, and the last look undoes them.
struct SamplePlan {
  std::vector<SampleJob> raw;
  std::vector<SampleJob> penalized;
  std::vector<SeenToken> seen;
  int32_t most_seen = 0;   // of one job
  bool want_top = false;   // some job lists tokens
  int32_t most_vocab = 0;  // of one row
  std::vector<int32_t> counts;  // [vocab] all zero between plans
};

inline constexpr float kLog2E = 1.44269504088896341f;

// Row i of the logits belongs to rows[i]; `vocab`: of rows without one of their own. REQUIRES: every
// id in a history is in its row's vocabulary.
void PlanSamples(std::span<const LogitRow> rows, int32_t vocab, SamplePlan* plan);

}  // namespace lorikeet::cuda
