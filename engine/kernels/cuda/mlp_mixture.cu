#include "engine/kernels/cuda/mlp_mixture.h"

#include "engine/api/limits.h"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int kThreads = 128;
static_assert(Limits::kMaxExperts <= kThreads, "a thread a LoRA");

// A block a row: its scores, its pairs in the LoRAs' order, and x for each of them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    DealToLoras(const RowAdapters adapters, int32_t layer, const int32_t* rows, const Matrix x, const Routing routing,
                const Matrix taken) {
  __shared__ float scores[Limits::kMaxExperts];
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t row = rows[blockIdx.x];
  const MlpMixtureParts& mixture = adapters.of(row)->mixture;
  const PagedRows& router = mixture.routers[layer];
  const T* const from = x.row<T>(row);
  for (int32_t e = threadIdx.x / 32; e < mixture.experts; e += kThreads / 32) {
    const float sum = WarpDot(router.row<T>(e), from, x.width);
    if (threadIdx.x % 32 == 0) scores[e] = sum;
  }
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * routing.chosen;
  const int32_t mine = threadIdx.x;
  if (mine < routing.chosen) {
    routing.rows[first + mine] = row;
    if (mine >= mixture.chosen) routing.experts[first + mine] = -1;
  }
  const auto is_chosen = [&](int32_t e) {
    int32_t better = 0;  // the first of equals is
    for (int32_t o = 0; o < mixture.experts; ++o) better += scores[o] > scores[e] || (scores[o] == scores[e] && o < e);
    return better < mixture.chosen;
  };
  if (mine < mixture.experts && is_chosen(mine)) {
    float top = scores[mine], sum = 0;
    for (int32_t e = 0; e < mixture.experts; ++e) top = fmaxf(top, scores[e]);
    int32_t before = 0;
    for (int32_t e = 0; e < mixture.experts; ++e) {
      if (!is_chosen(e)) continue;
      sum += expf(scores[e] - top);
      before += e < mine;
    }
    routing.experts[first + before] = mine;
    routing.weights[first + before] = expf(scores[mine] - top) / sum;
  }
  for (int32_t c = threadIdx.x * 8; c < x.width; c += kThreads * 8) {
    const Vec8<T> values = LoadVec(from + c);
    for (int32_t k = 0; k < routing.chosen; ++k) StoreVec(taken.row<T>(first + k) + c, values);
  }
}

// A block a row.
template <typename T>
__global__ void SumLoras(const Matrix y, const Routing routing, const Matrix out) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int64_t first = int64_t{blockIdx.x} * routing.chosen;
  for (int32_t c = threadIdx.x * 8; c < out.width; c += blockDim.x * 8) {
    float sums[8] = {};
    for (int32_t k = 0; k < routing.chosen && routing.experts[first + k] >= 0; ++k) {
      const Vec8<T> values = LoadVec(y.row<T>(first + k) + c);
      const float weight = routing.weights[first + k];
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] += weight * ToFloat(values.v[j]);
    }
    Vec8<T> sum;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum.v[j] = FromFloat<T>(sums[j]);
    StoreVec(out.row<T>(routing.rows[first]) + c, sum);
  }
}

}  // namespace

cudaError_t LaunchDealToLoras(const RowAdapters& adapters, int32_t layer, const int32_t* rows, int32_t count, Matrix x,
                              const Routing& routing, Matrix taken, cudaStream_t stream) {
  return WithType(x.dtype, [&]<typename T>(T) {
    return Launch(DealToLoras<T>, {dim3(count), kThreads}, stream, adapters, layer, rows, x, routing, taken);
  });
}

cudaError_t LaunchSumLoras(Matrix y, int32_t count, const Routing& routing, Matrix out, cudaStream_t stream) {
  return WithType(y.dtype, [&]<typename T>(T) {
    return Launch(SumLoras<T>, {dim3(count), 256}, stream, y, routing, out);
  });
}

}  // namespace lorikeet::cuda
