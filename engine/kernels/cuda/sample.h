// The samplers' first look at a row of logits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/kernels/args.h"

namespace lorikeet::cuda {

struct RowPeak {
  int32_t token = 0;     // of the largest logit, the lowest id of equals; -1: no distribution
  float logit = 0;       // the largest
  float log_total = 0;   // log Σ exp(logit) over the vocabulary
};

// One entry a row of `logits` [rows, vocab] float32. A row with a NaN or +inf, or with nothing
// finite, is no distribution.
cudaError_t LaunchRowPeaks(Matrix logits, RowPeak* out, cudaStream_t stream);

}  // namespace lorikeet::cuda
