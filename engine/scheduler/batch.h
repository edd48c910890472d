// One step as flat arrays of integers: what the scheduler plans and the runner computes.
//
// Rows are tokens. Sequences are ordered so that rows of one adapter are adjacent (base rows
// first); every adapter segment is then one contiguous range of rows.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/api/adapter.h"
#include "engine/api/logit_row.h"

namespace lorikeet {

struct Batch {
  std::vector<RequestId> requests;      // [S] whose rows they are
  std::vector<int32_t> tokens;          // [T]
  std::vector<int32_t> positions;       // [T] position in the sequence
  std::vector<int32_t> sequence_begin;  // [S + 1] rows of sequence s: [begin[s], begin[s + 1])
  std::vector<int32_t> page_begin;      // [S + 1] into `pages`
  std::vector<int32_t> pages;           // page ids: block-major, pages_per_block ids a block
  // The same for the base's own keys and values of sequences whose adapter's gates need them (Gating).
  std::vector<int32_t> base_page_begin;  // [S + 1]
  std::vector<int32_t> base_pages;
  std::vector<AdapterSegment> segments;
  std::vector<LogitRow> logit_rows;     // ascending by row

  int32_t rows() const { return static_cast<int32_t>(tokens.size()); }
  int32_t sequences() const { return static_cast<int32_t>(sequence_begin.size()) - 1; }
};

struct StepResult {
  std::vector<SampledToken> sampled;  // [logit_rows] in the batch's order
};

}  // namespace lorikeet
