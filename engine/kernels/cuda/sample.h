// From rows of logits to tokens: the sampler of engine/kernels/sampler.h on the device.
//
// A vocabulary is cut into chunks. One pass over the logits leaves every chunk's maximum and, where
// something needs them, its sums of exponentials; then a block a row works on those and on the few
// chunks that matter: a chunk whose maximum is too small has no candidate. Sums that decide are
// taken in a fixed order or in integers, so that a row's result depends on the row alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/api/limits.h"
#include "engine/kernels/args.h"
#include "engine/kernels/cuda/sample_plan.h"

namespace lorikeet::cuda {

inline constexpr int32_t kChunk = 128;  // logits: four a lane of a warp
inline constexpr int32_t kMaxChunks = 4096;

// Of job j: entries [j * count, (j + 1) * count) of each array.
struct SampleChunks {
  int32_t count = 0;          // a job
  uint32_t* best = nullptr;   // the largest logit's ordered bits, see sample_row.cuh
  float* weights = nullptr;   // Σ 2^(scale (logit - largest))
  float* totals = nullptr;    // Σ e^(logit - largest)
};

struct SampleResult {
  int32_t token = -1;  // -1: no distribution
  float logprob = 0;
  double log_total = 0;
};

struct TopToken {
  int32_t id = 0;
  float logprob = 0;
};

struct SampleOutput {
  SampleResult* results = nullptr;  // [rows]
  TopToken* tops = nullptr;         // [rows, Limits::kMaxTopLogprobs] best first
};

// The first pass. `jobs` in device memory, `count` of them, at least one.
cudaError_t LaunchScanChunks(Matrix logits, const SampleJob* jobs, int32_t count,
                             const SampleChunks& chunks, cudaStream_t stream);
// Penalties, in place; `saved` gets what the logits of `seen` were.
cudaError_t LaunchPenalize(Matrix logits, const SampleJob* jobs, int32_t count,
                           const SeenToken* seen, int32_t most_seen, float* saved,
                           cudaStream_t stream);
// The rest, after a pass over the same jobs. Puts `saved` logits back.
cudaError_t LaunchChoose(Matrix logits, const SampleJob* jobs, int32_t count,
                         const SampleChunks& chunks, const SeenToken* seen, const float* saved,
                         const SampleOutput& out, cudaStream_t stream);

}  // namespace lorikeet::cuda
