#include "engine/kernels/cuda/low_rank.h"

#include <algorithm>

#include "engine/api/limits.h"
#include "engine/kernels/cuda/launch.cuh"
#include "engine/kernels/cuda/low_rank.cuh"
#include "engine/kernels/cuda/vec.cuh"

namespace lorikeet::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 32;                       // elements of `in` that a warp takes at a time
constexpr int kStepsInFlight = 8;
constexpr int kWarpSlice = kStep * kStepsInFlight;
constexpr int kSlice = kWarps * kWarpSlice;     // elements of `in` a shrink task takes
constexpr int kWarpBlocks = 2;                  // of columns
constexpr int kTaskColumns = kWarps * kWarpBlocks * kBlock;
constexpr int kSlotFloats = kDecodeTileRows * kTileRanks;
// Of pairs with many tiles a block takes the columns of one warp, and its warps take the tiles by turns.
constexpr int kLongWarps = 8;
constexpr int kLongColumns = kWarpBlocks * kBlock;

// ---- shrink

struct ShrinkTask {
  ShrinkItem item;
  RankTile tile;
  int32_t column;  // first of this lane's
};

__device__ ShrinkTask ReadShrink(const LowRankArgs& args, int32_t task, int32_t slices) {
  ShrinkTask out;
  const int32_t sub = task % (args.parts * slices);
  out.item = args.list->shrinks[task / (args.parts * slices)];
  const ModuleId module = args.first_module + sub / slices;
  out.tile = out.item.tiles[int64_t{module} * out.item.tiles_per_module + out.item.rank_tile];
  out.column = sub % slices * kSlice + threadIdx.x / 32 * kWarpSlice + threadIdx.x % 4 * 8;
  return out;
}

template <typename T>
__device__ void LoadRankRows(const ShrinkTask& work, int32_t in, uint4 (&a)[kStepsInFlight][2]) {
  const int g = threadIdx.x % 32 / 4;
  const RankTile& tile = work.tile;
  const RowSpan span = SpanOfA(tile, in);
  const T* low = g < tile.ranks ? RankRow<T>(tile.a, tile.a_first, span, g) : nullptr;
  const T* high = g + 8 < tile.ranks ? RankRow<T>(tile.a, tile.a_first, span, g + 8) : nullptr;
#pragma unroll
  for (int s = 0; s < kStepsInFlight; ++s) {
    const int32_t c = work.column + s * kStep;
    const bool there = span.has(c);
    a[s][0] = low != nullptr && there ? LoadStreaming(low + c) : kZero;
    a[s][1] = high != nullptr && there ? LoadStreaming(high + c) : kZero;
  }
}

// Sums of the four warps, [row][rank], to the task's slot.
__device__ void StoreSums(const float (&sums)[4], float* slot) {
  constexpr int kPad = kTileRanks + 1;
  __shared__ float shared[kWarps][kDecodeTileRows * kPad];
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) shared[warp][(2 * t + i % 2) * kPad + g + i / 2 * 8] = sums[i];
  __syncthreads();
  const int row = threadIdx.x / kTileRanks, rank = threadIdx.x % kTileRanks;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared[w][row * kPad + rank];
  slot[threadIdx.x] = sum;
  __syncthreads();
}
static_assert(kThreads == kSlotFloats, "a thread a sum");

// Columns [slice * kSlice, ...) of 16 ranks against the item's rows. Factors do not depend on the
// kernel before, so the first task's are fetched while that still runs, and the next task's while
// this one's sums are stored.
template <typename T>
__global__ void __launch_bounds__(kThreads) Shrink(const __grid_constant__ LowRankArgs args, int32_t slices) {
  const int32_t tasks = args.list->shrink_count * args.parts * slices;
  const int g = threadIdx.x % 32 / 4;
  const int32_t in = args.x.width;
  LetKernelAfterStart();
  ShrinkTask work;
  uint4 a[kStepsInFlight][2];
  if (blockIdx.x < tasks) {
    work = ReadShrink(args, blockIdx.x, slices);
    LoadRankRows<T>(work, in, a);
  }
  WaitForKernelBefore();
  for (int32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int32_t row = work.item.row_begin + g - args.first_row;
    const bool mine = g < work.item.rows && row >= 0 && row < args.x.rows;
    const T* x = mine ? args.x.row<T>(row) : nullptr;
    const bool empty = work.tile.ranks == 0;
    const RowSpan span = SpanOfA(work.tile, in);
    uint4 values[kStepsInFlight];
#pragma unroll
    for (int s = 0; s < kStepsInFlight; ++s) {
      const int32_t c = work.column + s * kStep;
      values[s] = x != nullptr && !empty && span.has(c) ? LoadCached(x + c) : kZero;
    }
    float sums[4] = {};
#pragma unroll
    for (int s = 0; s < kStepsInFlight; ++s) MmaRows<T>(sums, a[s][0], a[s][1], values[s]);
    if (task + gridDim.x < tasks) {
      work = ReadShrink(args, task + gridDim.x, slices);
      LoadRankRows<T>(work, in, a);
    }
    if (!empty) StoreSums(sums, args.slots + int64_t{task} * kSlotFloats);
  }
}

// ---- expand

struct ExpandTask {
  ExpandItem item;
  const RankTile* tiles;  // of the module
  RankTile tile;          // the first
  int32_t part;
  int32_t column;         // first of this lane's, in the part
  int32_t first_column;   // of the part in y
};

// kColumns: of a block of tasks, of which the block's warps have a share each or all the whole.
template <int kColumns>
__device__ ExpandTask ReadExpand(const LowRankArgs& args, int32_t task, int32_t blocks) {
  ExpandTask out;
  out.item = args.list->expands[task / blocks];
  int32_t block = task % blocks;
  out.part = 0;
  out.first_column = 0;
  while (true) {
    const int32_t part_blocks = DivideUp(args.out[out.part], kColumns);
    if (block < part_blocks) break;
    block -= part_blocks;
    out.first_column += args.out[out.part++];
  }
  out.tiles =
      out.item.tiles + int64_t{args.first_module + out.part} * out.item.tiles_per_module;
  out.tile = out.tiles[0];
  const int32_t of_warp = kColumns == kTaskColumns ? threadIdx.x / 32 * kWarpBlocks * kBlock : 0;
  out.column = block * kColumns + of_warp + threadIdx.x % 32 / 4 * 8;
  return out;
}

// The slices' sums of row g, scaled, as the product's second operand. scale(k): of rank k of the tile.
template <typename T, typename Scale>
__device__ void LoadShrunk(const float* slot, int32_t slices, const Scale& scale,
                           uint32_t (&shrunk)[1][2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float2 low = {0, 0}, high = {0, 0};
  for (int32_t s = 0; s < slices; ++s) {
    const float* row = slot + s * kSlotFloats + g * kTileRanks;
    const float2 a = *reinterpret_cast<const float2*>(row + 2 * t);
    const float2 b = *reinterpret_cast<const float2*>(row + 2 * t + 8);
    low.x += a.x, low.y += a.y, high.x += b.x, high.y += b.y;
  }
  shrunk[0][0] = Pack2<T>(low.x * scale(2 * t), low.y * scale(2 * t + 1));
  shrunk[0][1] = Pack2<T>(high.x * scale(2 * t + 8), high.y * scale(2 * t + 9));
}

// The same of rank tile i of a task's module.
template <typename T, bool kScaled>
__device__ void LoadShrunkOf(const LowRankArgs& args, const ExpandTask& work, const RankTile& tile, int32_t i,
                             int32_t slices, const PairScales& scales, uint32_t (&shrunk)[1][2]) {
  const int64_t slot = (int64_t{work.item.first_shrink + i} * args.parts + work.part) * slices;
  const auto scale = [&](int k) {
    if (!kScaled) return tile.scale;
    return k < tile.ranks ? tile.scale * scales.of_rank(i * work.tile.ranks + k) : 0.0f;
  };
  LoadShrunk<T>(args.slots + slot * kSlotFloats, slices, scale, shrunk);
}

// Of this lane's row.
template <bool kScaled>
__device__ PairScales ScalesOf(const LowRankArgs& args, const ExpandTask& work) {
  const int g = threadIdx.x % 32 / 4;
  if (!kScaled || g >= work.item.rows) return {};
  return ScalesOf(args, work.item.row_begin + g - args.first_row, work.part);
}

template <typename T, typename Y, bool kScaled>
__device__ void StoreColumns(const LowRankArgs& args, const ExpandTask& work, const RankTile& first,
                             const float (&sums)[kWarpBlocks][1][4][4]) {
  const int t = threadIdx.x % 4;
  const int32_t out = args.out[work.part];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t row = work.item.row_begin + 2 * t + half - args.first_row;
    if (2 * t + half >= work.item.rows || row < 0 || row >= args.y.rows) continue;
    Y* y = args.y.row<Y>(row) + work.first_column;
    const float* delta_scale = kScaled ? ScalesOf(args, row, work.part).delta : nullptr;
#pragma unroll
    for (int n = 0; n < kWarpBlocks; ++n) {
      const int32_t c = work.column + n * kBlock;
      if (c < out) UpdateColumns(y, c, out, sums[n][0], half, first, delta_scale, args.add);
    }
  }
}

// kScaled: of what LowRankArgs::scaled says.
template <typename T, typename Y, bool kScaled>
__global__ void __launch_bounds__(kThreads)
    Expand(const __grid_constant__ LowRankArgs args, int32_t slices, int32_t blocks) {
  const int32_t tasks = args.list->expand_count * blocks;
  LetKernelAfterStart();
  ExpandTask work;
  uint4 b[kWarpBlocks][4];
  const auto read = [&](int32_t task) {
    work = ReadExpand<kTaskColumns>(args, task, blocks);
    LoadColumns<T, kWarpBlocks, true>(work.tile, args.out[work.part], work.column, b);
  };
  if (blockIdx.x < tasks) read(blockIdx.x);
  WaitForKernelBefore();
  for (int32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const ExpandTask mine = work;
    const int32_t tile_count = mine.tile.module_tiles;
    const bool is_long = tile_count > kFewTiles;
    RankTile tile = mine.tile;
    float sums[kWarpBlocks][1][4][4] = {};
    const PairScales scales = ScalesOf<kScaled>(args, mine);
    for (int32_t i = 0; i < tile_count && !is_long; ++i) {
      uint32_t shrunk[1][2];
      LoadShrunkOf<T, kScaled>(args, mine, tile, i, slices, scales, shrunk);
#pragma unroll
      for (int n = 0; n < kWarpBlocks; ++n) MultiplyColumns<T, 1>(b[n], shrunk, sums[n]);
      if (i + 1 == tile_count) break;
      tile = mine.tiles[i + 1];
      LoadColumns<T, kWarpBlocks, true>(tile, args.out[mine.part], mine.column, b);
    }
    if (task + gridDim.x < tasks) read(task + gridDim.x);
    const bool changed = !args.add || tile_count > 0 || mine.tile.out_scale != nullptr ||
                         mine.tile.bias != nullptr;
    if (changed && !is_long) StoreColumns<T, Y, kScaled>(args, mine, mine.tile, sums);
  }
}

// The first warp's sums become those of all warps.
__device__ void AddWarps(float (&sums)[kWarpBlocks][1][4][4]) {
  constexpr int kSums = sizeof(sums) / sizeof(float);
  __shared__ float shared[kLongWarps - 1][kSums][32];
  float* const mine = &sums[0][0][0][0];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    if (warp > 0) shared[warp - 1][i][lane] = mine[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    for (int w = 0; w < kLongWarps - 1 && warp == 0; ++w) mine[i] += shared[w][i][lane];
  }
  __syncthreads();
}

// Of the modules with more than kFewTiles, which Expand leaves out.
template <typename T, typename Y, bool kScaled>
__global__ void __launch_bounds__(32 * kLongWarps)
    ExpandLong(const __grid_constant__ LowRankArgs args, int32_t slices, int32_t blocks) {
  const int32_t tasks = args.list->expand_count * blocks, warp = threadIdx.x / 32;
  LetKernelAfterStart();
  WaitForKernelBefore();
  for (int32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const ExpandTask work = ReadExpand<kLongColumns>(args, task, blocks);
    const int32_t tile_count = work.tile.module_tiles;
    if (tile_count <= kFewTiles) continue;
    float sums[kWarpBlocks][1][4][4] = {};
    const PairScales scales = ScalesOf<kScaled>(args, work);
    for (int32_t i = warp; i < tile_count; i += kLongWarps) {
      const RankTile tile = work.tiles[i];
      uint4 b[kWarpBlocks][4];
      LoadColumns<T, kWarpBlocks, false>(tile, args.out[work.part], work.column, b);
      uint32_t shrunk[1][2];
      LoadShrunkOf<T, kScaled>(args, work, tile, i, slices, scales, shrunk);
#pragma unroll
      for (int n = 0; n < kWarpBlocks; ++n) MultiplyColumns<T, 1>(b[n], shrunk, sums[n]);
    }
    AddWarps(sums);
    if (warp == 0) StoreColumns<T, Y, kScaled>(args, work, work.tile, sums);
  }
}

// ---- float32

// A block is one row of an item and one part.
__global__ void LowRankFloat(const __grid_constant__ LowRankArgs args) {
  extern __shared__ float shrunk[];  // [rank]
  WaitForKernelBefore();
  const int32_t items = args.list->expand_count;
  const int32_t part = blockIdx.y, in = args.x.width, out = args.out[part];
  int32_t first_column = 0;
  for (int32_t p = 0; p < part; ++p) first_column += args.out[p];
  for (int32_t unit = blockIdx.x; unit < items * args.tile_rows; unit += gridDim.x) {
    const ExpandItem item = args.list->expands[unit / args.tile_rows];
    const int32_t local = unit % args.tile_rows;
    const int32_t row = item.row_begin + local - args.first_row;
    if (local >= item.rows || row < 0 || row >= args.x.rows) continue;
    const RankTile* tiles =
        item.tiles + int64_t{args.first_module + part} * item.tiles_per_module;
    const float* x = args.x.row<float>(row);
    const PairScales scales = args.scaled.parts != nullptr ? ScalesOf(args, row, part) : PairScales();
    const int32_t tile_count = tiles[0].module_tiles;
    const int32_t tile_ranks = tiles[0].ranks;  // of all but the last
    const int32_t rank =
        tile_count == 0 ? 0 : (tile_count - 1) * tile_ranks + tiles[tile_count - 1].ranks;
    for (int32_t k = threadIdx.x / 32; k < rank; k += blockDim.x / 32) {
      const RankTile& tile = tiles[k / tile_ranks];
      const RowSpan span = SpanOfA(tile, in);
      const float* a = RankRow<float>(tile.a, tile.a_first, span, k % tile_ranks);
      float sum = 0;
      for (int32_t i = span.begin + threadIdx.x % 32; span.has(i); i += 32) sum += x[i] * a[i];
      sum = WarpSum(sum);
      if (threadIdx.x % 32 == 0) shrunk[k] = sum * tile.scale * scales.of_rank(k);
    }
    __syncthreads();
    float* y = args.y.row<float>(row) + first_column;
    for (int32_t c = threadIdx.x; c < out; c += blockDim.x) {
      float sum = 0;
      for (int32_t k = 0; k < rank; ++k) {
        const RankTile& tile = tiles[k / tile_ranks];
        const RowSpan span = SpanOfB(tile, out);
        if (span.has(c)) sum += shrunk[k] * RankRow<float>(tile.b, tile.b_first, span, k % tile_ranks)[c];
      }
      float value = y[c] + (scales.delta != nullptr ? sum * scales.delta[c] : sum);
      if (tiles[0].out_scale != nullptr) value *= tiles[0].out_scale[c];
      if (tiles[0].bias != nullptr) value += tiles[0].bias[c];
      y[c] = value;
    }
    __syncthreads();
  }
}

// As many blocks as the device holds at a time, no more than there are likely to be tasks.
template <auto kKernel, int kBlockThreads = kThreads>
dim3 Grid(int64_t tasks) {
  static const int64_t most = [] {
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kBlockThreads, 0);
    return int64_t{blocks} * Multiprocessors();
  }();
  return dim3(static_cast<uint32_t>(std::clamp<int64_t>(tasks, 1, most)));
}

template <typename T>
cudaError_t ShrinkDecode(const LowRankArgs& args, cudaStream_t stream) {
  const int32_t slices = ShrinkSlices(args.x.width);
  const int64_t tasks = int64_t{args.expected_shrinks} * args.parts * slices;
  constexpr auto kKernel = Shrink<T>;
  return Launch(kKernel, {Grid<kKernel>(tasks), kThreads}, stream, args, slices);
}

template <auto kKernel, int kColumns, int kBlockThreads>
cudaError_t LaunchExpandDecode(const LowRankArgs& args, cudaStream_t stream) {
  int32_t blocks = 0;
  for (int32_t p = 0; p < args.parts; ++p) blocks += DivideUp(args.out[p], kColumns);
  const dim3 grid = Grid<kKernel, kBlockThreads>(int64_t{args.expected_expands} * blocks);
  return Launch(kKernel, {grid, kBlockThreads}, stream, args, ShrinkSlices(args.x.width), blocks);
}

template <typename T, typename Y, bool kScaled>
cudaError_t ExpandDecode(const LowRankArgs& args, cudaStream_t stream) {
  const cudaError_t error = LaunchExpandDecode<Expand<T, Y, kScaled>, kTaskColumns, kThreads>(args, stream);
  if (error != cudaSuccess || !args.long_ranks) return error;
  return LaunchExpandDecode<ExpandLong<T, Y, kScaled>, kLongColumns, 32 * kLongWarps>(args, stream);
}

}  // namespace

int32_t ShrinkSlices(int32_t in) { return DivideUp(in, kSlice); }

int64_t SlotFloats(int64_t shrinks, int32_t parts, int32_t in, int32_t tile_rows) {
  const int64_t floats = int64_t{tile_rows} * kTileRanks;
  if (tile_rows == kDecodeTileRows) return shrinks * parts * ShrinkSlices(in) * floats;
  return shrinks * parts * (PromptSlices(in) * floats + floats / 2);  // and what they add up to, in 16 bits
}

void PlanLowRank(const std::vector<DeviceSegment>& segments, int32_t tile_rows,
                 LowRankWork* work) {
  work->shrinks.clear();
  work->expands.clear();
  work->tile_rows = tile_rows;
  work->max_tiles = 0;
  for (const DeviceSegment& s : segments) {
    work->max_tiles = std::max(work->max_tiles, s.tiles_per_module);
    for (int32_t row = s.row_begin; row < s.row_end; row += work->tile_rows) {
      const int32_t rows = std::min(work->tile_rows, s.row_end - row);
      work->expands.push_back({s.tiles, row, rows, s.tiles_per_module,
                               static_cast<int32_t>(work->shrinks.size())});
      for (int32_t tile = 0; tile < s.tiles_per_module; ++tile) {
        work->shrinks.push_back({s.tiles, row, static_cast<int16_t>(rows),
                                 static_cast<int16_t>(tile), s.tiles_per_module});
      }
    }
  }
}

cudaError_t LaunchShrink(const LowRankArgs& args, cudaStream_t stream) {
  const bool brain = args.x.dtype == DType::kBF16;
  if (args.tile_rows == kPromptTileRows) {
    const cudaError_t error = LaunchPromptShrink(args, stream);
    return error != cudaSuccess ? error : LaunchPromptSum(args, stream);
  }
  return brain ? ShrinkDecode<BFloat16>(args, stream) : ShrinkDecode<Half>(args, stream);
}

cudaError_t LaunchExpand(const LowRankArgs& args, cudaStream_t stream) {
  if (args.tile_rows == kPromptTileRows) return LaunchPromptExpand(args, stream);
  const auto expand = [&]<typename T, typename Y>(T, Y) {
    return args.scaled.parts != nullptr ? ExpandDecode<T, Y, true>(args, stream) : ExpandDecode<T, Y, false>(args, stream);
  };
  const bool wide = args.y.dtype == DType::kF32;
  if (args.x.dtype == DType::kBF16) return wide ? expand(BFloat16(), float()) : expand(BFloat16(), BFloat16());
  return wide ? expand(Half(), float()) : expand(Half(), Half());
}

cudaError_t LaunchLowRankFloat(const LowRankArgs& args, cudaStream_t stream) {
  const int32_t rows = std::clamp(args.expected_expands * args.tile_rows, 1, 4096);
  const LaunchShape shape{dim3(rows, args.parts), 256, Limits::kMaxAdapterRank * sizeof(float)};
  return Launch(LowRankFloat, shape, stream, args);
}

}  // namespace lorikeet::cuda
