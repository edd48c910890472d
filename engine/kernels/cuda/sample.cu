#include "engine/kernels/cuda/sample.h"

#include <cmath>

#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int kThreads = 1024;

struct Best {
  float logit;
  int32_t token;
};

__device__ Best Better(Best a, Best b) {
  const bool first = a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
  return first ? a : b;
}

// A block a row: the maximum, then the total of what lies below it.
__global__ void __launch_bounds__(kThreads) RowPeaks(const Matrix logits, RowPeak* out) {
  __shared__ Best bests[kThreads / 32];
  __shared__ float totals[kThreads / 32];
  __shared__ bool broken;
  LetKernelAfterStart();
  WaitForKernelBefore();
  const float* row = logits.row(blockIdx.x);
  if (threadIdx.x == 0) broken = false;
  __syncthreads();
  Best best = {-INFINITY, INT32_MAX};
  for (int32_t i = threadIdx.x; i < logits.width; i += kThreads) {
    const float logit = row[i];
    if (isnan(logit)) broken = true;
    best = Better(best, {logit, i});
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    best = Better(best, {__shfl_xor_sync(~0u, best.logit, offset),
                         __shfl_xor_sync(~0u, best.token, offset)});
  }
  if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) best = Better(best, bests[w]);
  const bool valid = !broken && isfinite(best.logit);
  float total = 0;
  for (int32_t i = threadIdx.x; valid && i < logits.width; i += kThreads) {
    total += expf(row[i] - best.logit);
  }
  total = WarpSum(total);
  if (threadIdx.x % 32 == 0) totals[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  total = 0;
  for (int w = 0; w < kThreads / 32; ++w) total += totals[w];
  out[blockIdx.x] = {valid ? best.token : -1, best.logit, best.logit + logf(total)};
}

}  // namespace

cudaError_t LaunchRowPeaks(Matrix logits, RowPeak* out, cudaStream_t stream) {
  return Launch(RowPeaks, {dim3(logits.rows), kThreads}, stream, logits, out);
}

}  // namespace lorikeet::cuda
