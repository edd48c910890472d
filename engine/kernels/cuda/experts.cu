#include "engine/kernels/cuda/experts.h"

#include <algorithm>

#include "engine/api/limits.h"
#include "engine/kernels/cuda/copy_async.cuh"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/low_rank.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

// ---- who goes where

constexpr int kRouteThreads = 128;
constexpr int kScoresPerLane = kMaxExperts / 32;
constexpr int kDealThreads = 1024;
static_assert(kMaxExperts <= kDealThreads);

// The larger score, of equals the first expert's.
struct Candidate {
  float score;
  int32_t expert;
};

__device__ Candidate BetterOf(Candidate a, Candidate b) {
  return b.score > a.score || (b.score == a.score && b.expert < a.expert) ? b : a;
}

__device__ Candidate WarpBest(Candidate best) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const Candidate other = {__shfl_xor_sync(~0u, best.score, offset),
                             __shfl_xor_sync(~0u, best.expert, offset)};
    best = BetterOf(best, other);
  }
  return best;
}

// A warp a row.
template <typename T>
__global__ void __launch_bounds__(kRouteThreads)
    ChooseExperts(const Matrix scores, bool normalise, const Routing routing) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t row = (blockIdx.x * kRouteThreads + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (row >= scores.rows) return;
  const T* const from = scores.row<T>(row);
  float mine[kScoresPerLane];
  bool broken = false;  // its experts are some, and their weights NaN
#pragma unroll
  for (int i = 0; i < kScoresPerLane; ++i) {
    const int32_t expert = i * 32 + lane;
    const float score = expert < scores.width ? ToFloat(from[expert]) : -INFINITY;
    broken |= isnan(score);
    mine[i] = fmaxf(score, -INFINITY);
  }
  Candidate chosen = {-INFINITY, kMaxExperts};  // lane k: the k-th best
  float top = 0;
  uint32_t taken = 0;
  for (int32_t k = 0; k < routing.chosen; ++k) {
    Candidate best = {-INFINITY, kMaxExperts};
#pragma unroll
    for (int i = 0; i < kScoresPerLane; ++i) {
      const int32_t expert = i * 32 + lane;
      if (expert < scores.width && (taken >> i & 1) == 0) best = BetterOf(best, {mine[i], expert});
    }
    best = WarpBest(best);
    if (k == 0) top = best.score;
    if (best.expert % 32 == lane) taken |= 1u << best.expert / 32;
    if (k == lane) chosen = best;
  }
  float sum = 0;
  if (normalise) {
    if (lane < routing.chosen) sum = expf(chosen.score - top);
  } else {
#pragma unroll
    for (int i = 0; i < kScoresPerLane; ++i) sum += expf(mine[i] - top);
  }
  sum = __any_sync(~0u, broken) ? NAN : WarpSum(sum);
  int32_t rank = 0;  // among the row's experts
  for (int32_t k = 0; k < routing.chosen; ++k) {
    rank += __shfl_sync(~0u, chosen.expert, k) < chosen.expert;
  }
  if (lane >= routing.chosen) return;
  const int64_t at = int64_t{row} * routing.chosen + rank;
  routing.experts[at] = chosen.expert;
  routing.weights[at] = expf(chosen.score - top) / sum;
}

// One block. Where a row stands among its expert's makes no difference to what it gets.
__global__ void __launch_bounds__(kDealThreads) DealOut(const Routing routing, int32_t pairs) {
  __shared__ int32_t counts[kMaxExperts], firsts[kDealThreads], tiles[kDealThreads];
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t t = threadIdx.x;
  if (t < kMaxExperts) counts[t] = 0;
  __syncthreads();
  for (int32_t i = t; i < pairs; i += kDealThreads) atomicAdd(&counts[routing.experts[i]], 1);
  __syncthreads();
  const int32_t count = t < kMaxExperts ? counts[t] : 0;
  const int32_t tile_count = (count + kExpertTileRows - 1) / kExpertTileRows;
  firsts[t] = count;
  tiles[t] = tile_count;
  for (int offset = 1; offset < kDealThreads; offset *= 2) {
    __syncthreads();
    const int32_t first = t >= offset ? firsts[t - offset] : 0, tile = t >= offset ? tiles[t - offset] : 0;
    __syncthreads();
    firsts[t] += first;
    tiles[t] += tile;
  }
  if (t == kDealThreads - 1) *routing.tile_count = tiles[t];
  const int32_t first = firsts[t] - count, first_tile = tiles[t] - tile_count;
  for (int32_t i = 0; i < tile_count; ++i) {
    routing.tiles[first_tile + i] = {t, first + i * kExpertTileRows,
                                     min(kExpertTileRows, count - i * kExpertTileRows)};
  }
  __syncthreads();
  if (t < kMaxExperts) counts[t] = first;
  __syncthreads();
  for (int32_t i = t; i < pairs; i += kDealThreads) {
    const int32_t place = atomicAdd(&counts[routing.experts[i]], 1);
    routing.places[i] = place;
    routing.rows[place] = i / routing.chosen;
  }
}

// ---- the products

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kTileColumns = 128;  // of y, a block's
constexpr int kDepth = 64;         // elements contracted at a time: rows of 128 bytes
constexpr int kStages = 3;
constexpr int kRowChunks = kDepth / 8;
constexpr int kWarpRows = kExpertTileRows / 2, kWarpColumns = kTileColumns / 2;
constexpr int kStageBytes = (kExpertTileRows + kTileColumns) * kDepth * 2;

// Where a stage has chunk c of row r: rows of one column of chunks lie in different banks.
__device__ constexpr int32_t ChunkAt(int32_t r, int32_t c) { return (r * kRowChunks + (c ^ r % 8)) * 16; }

__device__ void LoadMatrices(const std::byte* at, uint32_t (&m)[4]) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(at));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}

__device__ const std::byte* RowOf(const ExpertProduct& product, const Routing& routing,
                                  int32_t position) {
  const int32_t row = product.gather ? routing.rows[position] : position;
  return reinterpret_cast<const std::byte*>(product.x.row<uint16_t>(row));
}

// Brings a stage: rows of x, then rows of the weight.
__device__ void BringStage(const ExpertProduct& product, const Routing& routing,
                           const ExpertTile& tile, const std::byte* weight, int32_t column,
                           int32_t depth, std::byte* stage) {
  const int32_t width = product.x.width;
  for (int32_t i = threadIdx.x; i < (kExpertTileRows + kTileColumns) * kRowChunks; i += kThreads) {
    const int32_t r = i / kRowChunks, c = i % kRowChunks, k = depth + c * 8;
    const bool of_x = r < kExpertTileRows;
    const int32_t n = column + r - kExpertTileRows;
    const bool there = k < width && (of_x ? r < tile.rows : n < product.y.width);
    const std::byte* from = weight;
    if (there) {
      from = (of_x ? RowOf(product, routing, tile.first + r) : weight + int64_t{n} * width * 2) + k * 2;
    }
    CopyAsync(stage + (of_x ? 0 : kExpertTileRows * kDepth * 2) +
                  ChunkAt(of_x ? r : r - kExpertTileRows, c), from, there);
  }
}

template <typename T>
__device__ void MultiplyStage(const std::byte* stage, int32_t warp_row, int32_t warp_column,
                              int32_t rows, float (&sums)[2][8][4]) {
  const std::byte* const w = stage + kExpertTileRows * kDepth * 2;
  const int32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int kk = 0; kk < kDepth / 16; ++kk) {
    uint32_t b[4][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int32_t r = warp_column + n * 16 + lane / 16 * 8 + lane % 8;
      LoadMatrices(w + ChunkAt(r, kk * 2 + lane / 8 % 2), b[n]);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (warp_row + m * 16 >= rows) continue;
      uint32_t a[4];
      LoadMatrices(stage + ChunkAt(warp_row + m * 16 + lane % 16, kk * 2 + lane / 16), a);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        Mma<T>(sums[m][n], a[0], a[1], a[2], a[3], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    MultiplyExperts(const ExpertProduct product, const Routing routing) {
  extern __shared__ __align__(128) std::byte shared[];
  LetKernelAfterStart();
  WaitForKernelBefore();
  if (static_cast<int32_t>(blockIdx.y) >= *routing.tile_count) return;
  const ExpertTile tile = routing.tiles[blockIdx.y];
  const auto* weight = static_cast<const std::byte*>(product.weights[tile.expert]);
  const int32_t column = blockIdx.x * kTileColumns, warp = threadIdx.x / 32;
  const int32_t warp_row = warp / 2 * kWarpRows, warp_column = warp % 2 * kWarpColumns;
  const int32_t steps = (product.x.width + kDepth - 1) / kDepth;
  const auto bring = [&](int32_t step) {
    if (step < steps) {
      BringStage(product, routing, tile, weight, column, step * kDepth,
                 shared + step % kStages * kStageBytes);
    }
    CommitCopies();
  };
  for (int32_t step = 0; step < kStages - 1; ++step) bring(step);
  float sums[2][8][4] = {};
  for (int32_t step = 0; step < steps; ++step) {
    WaitForCopies<kStages - 2>();
    __syncthreads();
    bring(step + kStages - 1);
    MultiplyStage<T>(shared + step % kStages * kStageBytes, warp_row, warp_column, tile.rows, sums);
  }
  const int32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t r = warp_row + m * 16 + half * 8 + g;
      if (r >= tile.rows) continue;
      T* const y = product.y.row<T>(tile.first + r);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int32_t c = column + warp_column + n * 8 + t * 2;
        if (c >= product.y.width) continue;
        *reinterpret_cast<uint32_t*>(y + c) = Pack2<T>(sums[m][n][half * 2], sums[m][n][half * 2 + 1]);
      }
    }
  }
}

// float32: a thread a column, plainly.
__global__ void __launch_bounds__(kThreads)
    MultiplyExpertsFloat(const ExpertProduct product, const Routing routing) {
  if (static_cast<int32_t>(blockIdx.y) >= *routing.tile_count) return;
  const ExpertTile tile = routing.tiles[blockIdx.y];
  const int32_t column = blockIdx.x * kTileColumns + threadIdx.x, width = product.x.width;
  if (column >= product.y.width) return;
  const float* const w = static_cast<const float*>(product.weights[tile.expert]) + int64_t{column} * width;
  for (int32_t r = 0; r < tile.rows; ++r) {
    const int32_t position = tile.first + r;
    const float* const x = product.x.row<float>(product.gather ? routing.rows[position] : position);
    float sum = 0;
    for (int32_t k = 0; k < width; ++k) sum += x[k] * w[k];
    product.y.row<float>(position)[column] = sum;
  }
}

// ---- adapters

// The expert of a position: tiles lie in order of their positions.
__device__ int32_t ExpertOf(const Routing& routing, int32_t position) {
  if (routing.tiles == nullptr) return routing.experts[position];
  int32_t low = 0, high = *routing.tile_count - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (routing.tiles[middle].first <= position) low = middle;
    else high = middle - 1;
  }
  return routing.tiles[low].expert;
}

// A block is one position and one part.
template <typename T>
__global__ void AdaptExperts(const ExpertProduct product, const ExpertDeltas deltas,
                             const Routing routing) {
  extern __shared__ float shrunk[];  // [rank]
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int32_t position = blockIdx.x, part = blockIdx.y, in = product.x.width, out = deltas.out;
  const RowTiles adapter = deltas.adapters[routing.rows[position]];
  if (adapter.tiles == nullptr) return;
  const int32_t expert = ExpertOf(routing, position);
  if (expert < 0) return;
  const ModuleId module = deltas.first_module + expert * deltas.expert_modules + part;
  const RankTile* const tiles = adapter.tiles + int64_t{module} * adapter.tiles_per_module;
  const int32_t tile_count = tiles[0].module_tiles;
  const RankTile& first = tiles[0];
  if (tile_count == 0 && first.out_scale == nullptr && first.bias == nullptr) return;
  const int32_t tile_ranks = first.ranks;  // of all but the last
  const int32_t rank = tile_count == 0 ? 0 : (tile_count - 1) * tile_ranks + tiles[tile_count - 1].ranks;
  const T* const x = product.x.row<T>(product.gather ? routing.rows[position] : position);
  for (int32_t k = threadIdx.x / 32; k < rank; k += blockDim.x / 32) {
    const RankTile& tile = tiles[k / tile_ranks];
    const RowSpan span = SpanOfA(tile, in);
    const T* const a = RankRow<T>(tile.a, tile.a_first, span, k % tile_ranks);
    float sum = 0;
    for (int32_t c = span.begin + threadIdx.x % 32 * 8; span.has(c); c += 32 * 8) {
      const Vec8<T> left = LoadVec(x + c), right = LoadVec(a + c);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += ToFloat(left.v[j]) * ToFloat(right.v[j]);
    }
    sum = WarpSum(sum);
    if (threadIdx.x % 32 == 0) shrunk[k] = ToFloat(FromFloat<T>(sum * tile.scale));
  }
  __syncthreads();
  T* const y = product.y.row<T>(position) + part * out;
  for (int32_t c = threadIdx.x * 8; c < out; c += blockDim.x * 8) {
    Vec8<T> values = LoadVec(y + c);
    float sums[8] = {};
    for (int32_t k = 0; k < rank; ++k) {
      const RankTile& tile = tiles[k / tile_ranks];
      const RowSpan span = SpanOfB(tile, out);
      if (!span.has(c)) continue;
      const Vec8<T> b = LoadVec(RankRow<T>(tile.b, tile.b_first, span, k % tile_ranks) + c);
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] += shrunk[k] * ToFloat(b.v[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float value = ToFloat(values.v[j]) + sums[j];
      if (first.out_scale != nullptr) value *= first.out_scale[c + j];
      if (first.bias != nullptr) value += first.bias[c + j];
      values.v[j] = FromFloat<T>(value);
    }
    StoreVec(y + c, values);
  }
}

// A block a row.
template <typename T>
__global__ void SumExperts(const Matrix y, const Matrix out, const Routing routing) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int64_t first = int64_t{blockIdx.x} * routing.chosen;
  for (int32_t c = threadIdx.x * 8; c < out.width; c += blockDim.x * 8) {
    float sums[8] = {};
    for (int32_t k = 0; k < routing.chosen; ++k) {
      const Vec8<T> values = LoadVec(y.row<T>(routing.places[first + k]) + c);
      const float weight = routing.weights[first + k];
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] += weight * ToFloat(values.v[j]);
    }
    Vec8<T> sum;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum.v[j] = FromFloat<T>(sums[j]);
    StoreVec(out.row<T>(blockIdx.x) + c, sum);
  }
}

template <typename T>
cudaError_t LaunchProduct(const ExpertProduct& product, const Routing& routing, cudaStream_t stream) {
  const dim3 grid(DivideUp(product.y.width, kTileColumns), product.tiles);
  if constexpr (std::is_same_v<T, float>) {
    MultiplyExpertsFloat<<<grid, kThreads, 0, stream>>>(product, routing);
    return cudaGetLastError();
  } else {
    constexpr int32_t kShared = kStages * kStageBytes;
    static const cudaError_t raised = cudaFuncSetAttribute(
        MultiplyExperts<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (raised != cudaSuccess) return raised;
    return Launch(MultiplyExperts<T>, {grid, kThreads, kShared}, stream, product, routing);
  }
}

}  // namespace

int32_t Routing::MostTiles(int32_t row_count, int32_t expert_count) const {
  const int32_t pairs = row_count * chosen;
  return std::min(pairs, expert_count + pairs / kExpertTileRows);
}

cudaError_t LaunchRoute(Matrix scores, bool normalise, const Routing& routing, cudaStream_t stream) {
  const LaunchShape rows{dim3(DivideUp(scores.rows, kRouteThreads / 32)), kRouteThreads};
  const cudaError_t error = WithType(scores.dtype, [&]<typename T>(T) {
    return Launch(ChooseExperts<T>, rows, stream, scores, normalise, routing);
  });
  if (error != cudaSuccess) return error;
  return Launch(DealOut, {dim3(1), kDealThreads}, stream, routing, scores.rows * routing.chosen);
}

cudaError_t LaunchExpertProduct(const ExpertProduct& product, const Routing& routing,
                                cudaStream_t stream) {
  return WithType(product.x.dtype,
                  [&]<typename T>(T) { return LaunchProduct<T>(product, routing, stream); });
}

cudaError_t LaunchExpertDeltas(const ExpertProduct& product, const ExpertDeltas& deltas,
                               const Routing& routing, cudaStream_t stream) {
  const LaunchShape shape{dim3(product.y.rows, deltas.parts), 256,
                          Limits::kMaxAdapterRank * int32_t{sizeof(float)}};
  return WithType(product.x.dtype, [&]<typename T>(T) {
    return Launch(AdaptExperts<T>, shape, stream, product, deltas, routing);
  });
}

cudaError_t LaunchSumExperts(Matrix y, Matrix out, const Routing& routing, cudaStream_t stream) {
  return WithType(y.dtype, [&]<typename T>(T) {
    return Launch(SumExperts<T>, {dim3(out.rows), 256}, stream, y, out, routing);
  });
}

}  // namespace lorikeet::cuda
