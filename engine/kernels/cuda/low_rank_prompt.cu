#include <algorithm>

#include "engine/kernels/cuda/copy_async.cuh"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/low_rank.cuh"
#include "engine/kernels/cuda/low_rank.h"
#include "engine/kernels/cuda/low_rank_prompt.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int kThreads = kShrinkThreads;
constexpr int kRows = kPromptTileRows;

// ---- shrink: x in stages through shared memory, factors as early straight to registers

constexpr int kStageWidth = 64;  // elements of `in` a stage
constexpr int kStages = 4;
constexpr int kStageBytesPerRow = kStageWidth * 2 + 64;  // the pad spreads rows over the banks
constexpr int kStageBytes = kRows * kStageBytesPerRow;

template <typename T>
__device__ void CopyStage(const LowRankArgs& args, const PromptShrinkTask& work, int32_t column,
                          std::byte* stage) {
  constexpr int kChunks = kStageWidth * 2 / 16;
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int local = i / kChunks, c = column + i % kChunks * 8;
    const int32_t row = work.item.row_begin + local - args.first_row;
    const bool there =
        local < work.item.rows && row >= 0 && row < args.x.rows && c < args.x.width;
    CopyAsync(stage + local * kStageBytesPerRow + i % kChunks * 16,
              there ? args.x.row<T>(row) + c : args.x.data, there);
  }
}

template <typename T>
__device__ void LoadFactors(const Share& share, int32_t in, int32_t column, uint4 (&a)[2][2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const RowSpan span = SpanOfA(share.tile, in);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const int32_t c = column + s * 32 + t * 8;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int k = g + high * 8;
      const bool there = k < share.tile.ranks && span.has(c);
      a[s][high] = there ? LoadCached(RankRow<T>(share.tile.a, share.tile.a_first, span, k) + c) : kZero;
    }
  }
}

// Sums over one slice of `in` to slots [shrink item, part, slice].
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    PromptShrink(const __grid_constant__ LowRankArgs args, int32_t slices, int32_t groups) {
  extern __shared__ __align__(16) std::byte stages[];
  LetKernelAfterStart();
  const PromptShrinkTask work = ReadTask(args, blockIdx.x, slices, groups);
  if (work.pairs <= 0) return WaitForKernelBefore();
  const Share share = ShareOf(args, work);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int32_t in = args.x.width, slice_width = PromptSliceWidth(in), begin = work.slice * slice_width;
  const int32_t steps = DivideUp(min(slice_width, in - begin), kStageWidth);
  const auto copy = [&](int32_t s) {
    if (s < steps) CopyStage<T>(args, work, begin + s * kStageWidth, stages + s % kStages * kStageBytes);
    CommitCopies();
  };
  uint4 a[kStages][2][2];
  const auto load = [&](int32_t s, uint4(&to)[2][2]) {
    if (s < steps) LoadFactors<T>(share, in, begin + s * kStageWidth, to);
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) load(s, a[s]);
  WaitForKernelBefore();  // factors are none of its
  for (int s = 0; s < kStages - 1; ++s) copy(s);
  float sums[kMostRowTiles][4] = {};
  for (int32_t first = 0; first < steps; first += kStages) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      const int32_t s = first + i;
      if (s >= steps) break;
      WaitForCopies<kStages - 2>();
      __syncthreads();
      copy(s + kStages - 1);
      load(s + kStages - 1, a[(i + kStages - 1) % kStages]);
      const std::byte* stage = stages + i * kStageBytes;
#pragma unroll
      for (int r = 0; r < kMostRowTiles; ++r) {
        if (r >= share.row_tiles) break;
        const std::byte* row = stage + (share.first_row + r * 8 + g) * kStageBytesPerRow + t * 16;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          MmaRows<T>(sums[r], a[i][half][0], a[i][half][1], LoadCached(row + half * 64));
        }
      }
    }
  }
  StoreSums(args, work, share, slices, sums);
}

// The slices of a pair, scaled, in 16 bits; a block is a pair.
template <typename T, bool kScaled>
__global__ void __launch_bounds__(kThreads) PromptSum(const __grid_constant__ LowRankArgs args, int32_t slices, T* shrunk) {
  static_assert(kSumFloats == 4 * kThreads);
  LetKernelAfterStart();
  const int32_t pairs = args.parts * args.max_tiles, pair = blockIdx.x % pairs;
  const ExpandItem item = args.list->expands[blockIdx.x / pairs];
  const int32_t tiles = item.tiles_per_module;
  if (pair >= args.parts * tiles) return WaitForKernelBefore();
  const ModuleId module = args.first_module + pair / tiles;
  const float scale = item.tiles[int64_t{module} * tiles + pair % tiles].scale;
  const int64_t at = int64_t{item.first_shrink} * args.parts + pair;
  WaitForKernelBefore();
  float4 sum = AddSlots(args.slots + at * slices * kSumFloats + threadIdx.x * 4, slices, kSumFloats);
  if constexpr (kScaled) {
    const int32_t local = threadIdx.x * 4 / kTileRanks, k = threadIdx.x * 4 % kTileRanks;
    const RankTile* const module_tiles = item.tiles + int64_t{module} * tiles;
    const int32_t first = pair % tiles * module_tiles[0].ranks + k, ranks = module_tiles[pair % tiles].ranks;
    const bool there = local < item.rows && k < ranks;
    const PairScales scales =
        there ? ScalesOf(args, item.row_begin + local - args.first_row, pair / tiles) : PairScales();
    sum.x *= scales.of_rank(first);
    if (k + 1 < ranks) sum.y *= scales.of_rank(first + 1);
    if (k + 2 < ranks) sum.z *= scales.of_rank(first + 2);
    if (k + 3 < ranks) sum.w *= scales.of_rank(first + 3);
  }
  reinterpret_cast<uint2*>(shrunk + at * kSumFloats)[threadIdx.x] = {
      Pack2<T>(sum.x * scale, sum.y * scale), Pack2<T>(sum.z * scale, sum.w * scale)};
}

// ---- expand: a block is 256 columns of 64 rows; a warp 64 columns of 32

constexpr int kRowTiles = 4;
constexpr int kTaskColumns = 4 * kBlock;

template <typename T>
__device__ void LoadShrunk(const T* shrunk, int32_t first_row, uint32_t (&out)[kRowTiles][2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const T* row = shrunk + (first_row + r * 8 + g) * kTileRanks + 2 * t;
    out[r][0] = *reinterpret_cast<const uint32_t*>(row);
    out[r][1] = *reinterpret_cast<const uint32_t*>(row + 8);
  }
}

template <typename T, typename Y, bool kScaled>
__global__ void __launch_bounds__(kThreads, 2)
    PromptExpand(const __grid_constant__ LowRankArgs args, int32_t blocks, const T* shrunk) {
  LetKernelAfterStart();
  WaitForKernelBefore();
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const ExpandItem item = args.list->expands[blockIdx.x / blocks];
  int32_t block = blockIdx.x % blocks, part = 0, first_column = 0;
  while (block >= DivideUp(args.out[part], kTaskColumns)) {
    block -= DivideUp(args.out[part], kTaskColumns);
    first_column += args.out[part++];
  }
  const int32_t out = args.out[part];
  const int32_t column = block * kTaskColumns + warp % 4 * kBlock + g * 8;
  const int32_t first_row = warp / 4 * kRowTiles * 8;
  const RankTile* tiles =
      item.tiles + int64_t{args.first_module + part} * item.tiles_per_module;
  const RankTile first = tiles[0];
  const int32_t tile_count = first.module_tiles;
  if (args.add && tile_count == 0 && first.out_scale == nullptr && first.bias == nullptr) return;
  if (first_row >= item.rows) return;
  float sums[kRowTiles][4][4] = {};
  uint4 b[1][4];
  if (tile_count > 0) LoadColumns<T, 1, false>(first, out, column, b);
  for (int32_t i = 0; i < tile_count; ++i) {
    uint32_t values[kRowTiles][2];
    const int64_t pair = int64_t{item.first_shrink} * args.parts + part * item.tiles_per_module + i;
    LoadShrunk(shrunk + pair * kSumFloats, first_row, values);
    MultiplyColumns<T, kRowTiles>(b[0], values, sums);
    if (i + 1 < tile_count) LoadColumns<T, 1, false>(tiles[i + 1], out, column, b);
  }
  if (column >= out) return;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t local = first_row + r * 8 + 2 * t + half;
      const int32_t row = item.row_begin + local - args.first_row;
      if (local >= item.rows || row < 0 || row >= args.y.rows) continue;
      const float* delta_scale = kScaled ? ScalesOf(args, row, part).delta : nullptr;
      UpdateColumns(args.y.row<Y>(row) + first_column, column, out, sums[r], half, first, delta_scale,
                    args.add);
    }
  }
}

// Where the 16-bit sums lie: behind those of the slices.
template <typename T>
T* Shrunk(const LowRankArgs& args) {
  const int64_t pairs = int64_t{args.expected_shrinks} * args.parts;
  return reinterpret_cast<T*>(args.slots + pairs * PromptSlices(args.x.width) * kSumFloats);
}

template <typename T>
cudaError_t Shrink(const LowRankArgs& args, cudaStream_t stream) {
  if (CanBringInputs(args)) return LaunchShrinkByCopyEngine(args, stream);
  const int32_t slices = PromptSlices(args.x.width);
  const int32_t groups = DivideUp(int64_t{args.parts} * args.max_tiles, kShrinkPairs);
  constexpr int32_t kShared = kStages * kStageBytes;
  const cudaError_t error = cudaFuncSetAttribute(
      PromptShrink<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  return Launch(PromptShrink<T>, {dim3(args.expected_expands * groups * slices), kThreads, kShared},
                stream, args, slices, groups);
}

template <typename T>
cudaError_t Sum(const LowRankArgs& args, cudaStream_t stream) {
  const int32_t blocks = args.expected_expands * args.parts * args.max_tiles;
  const auto kernel = args.scaled.parts != nullptr ? PromptSum<T, true> : PromptSum<T, false>;
  return Launch(kernel, {dim3(blocks), kThreads}, stream, args, PromptSlices(args.x.width),
                Shrunk<T>(args));
}

template <typename T, typename Y>
cudaError_t Expand(const LowRankArgs& args, cudaStream_t stream) {
  int32_t blocks = 0;
  for (int32_t p = 0; p < args.parts; ++p) blocks += DivideUp(args.out[p], kTaskColumns);
  const auto kernel = args.scaled.parts != nullptr ? PromptExpand<T, Y, true> : PromptExpand<T, Y, false>;
  return Launch(kernel, {dim3(args.expected_expands * blocks), kThreads}, stream, args, blocks,
                static_cast<const T*>(Shrunk<T>(args)));
}

}  // namespace

cudaError_t LaunchPromptShrink(const LowRankArgs& args, cudaStream_t stream) {
  return args.x.dtype == DType::kBF16 ? Shrink<BFloat16>(args, stream) : Shrink<Half>(args, stream);
}

cudaError_t LaunchPromptSum(const LowRankArgs& args, cudaStream_t stream) {
  return args.x.dtype == DType::kBF16 ? Sum<BFloat16>(args, stream) : Sum<Half>(args, stream);
}

cudaError_t LaunchPromptExpand(const LowRankArgs& args, cudaStream_t stream) {
  const bool wide = args.y.dtype == DType::kF32;
  if (args.x.dtype == DType::kBF16) {
    return wide ? Expand<BFloat16, float>(args, stream) : Expand<BFloat16, BFloat16>(args, stream);
  }
  return wide ? Expand<Half, float>(args, stream) : Expand<Half, Half>(args, stream);
}

}  // namespace lorikeet::cuda
